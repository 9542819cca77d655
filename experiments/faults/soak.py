"""A long run in which nothing may grow: memory, open files, threads."""

import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.faults.runs import Lab, Row, steps_written, train
from mar.learn import batch
from mar.policy.model import Decoder, ModelConfig
from mar.policy.sources import EMBEDDED
from mar.policy.weights import save_model
from mar.sample import rollout

STEPS, SETTLED, WINDOW = 2000, 200, 200
# With evaluations, checkpoints, and prompts that are made when they are asked for. The answers of a
# random model all earn 0: the entropy's bonus keeps gradients from being 0 too.
SOAK_WORDS = (
    f"train.steps={STEPS}",
    "model=hf",
    "model.thinking=false",
    "model.max_prompt_tokens=6000",
    "model.max_completion_tokens=12",
    "algo.entropy_coef=0.01",
    "eval.every=200",
    "checkpoint.every=100",
)
TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1180,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
# Texts that a sampler remembers, 65,536 otherwise: so that this memory is full when all is settled.
REMEMBERED = 4096
PATIENCE = 3600.0
# What the medians of memory may differ by. A run without a leak grows by about 1 MB.
MOST_GROWTH_MB = 4.0
Leak = Callable[[int], object]


@dataclass(frozen=True)
class Reading:
    """What the process holds when a step has been sampled."""

    memory_mb: float
    files: int
    threads: int


def read_process() -> Reading:
    """Of this process. Linux."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Reading(
        memory_mb=int(status["VmRSS"].split()[0]) / 1024,
        files=len(os.listdir("/proc/self/fd")) - 1,  # the listing itself
        threads=int(status["Threads"]),
    )


def tiny_model(folder: Path) -> Path:
    """One layer of random weights, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    save_model(Decoder(ModelConfig.from_hf(TINY)), folder)
    for file in EMBEDDED.iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


def watched(log: Path, leak: Leak | None = None) -> Callable[[], None]:
    """A fault for `runs.begin` that writes down a `Reading` in every step. `leak` is given the
    number of the step: a test of this test."""

    def fault() -> None:
        original = batch.make_batch
        steps = iter(range(1, 1 << 30))
        file = log.open("w", buffering=1)

        def make_batch(*args: object, **options: object) -> object:
            found = read_process()
            file.write(f"{found.memory_mb} {found.files} {found.threads}\n")
            if leak:
                leak(next(steps))
            return original(*args, **options)  # type: ignore[arg-type]

        batch.make_batch = make_batch  # type: ignore[assignment]
        remember = rollout.lru_cache
        rollout.lru_cache = lambda maxsize: remember(min(maxsize, REMEMBERED))  # type: ignore

    return fault


def readings(log: Path) -> list[Reading]:
    found = []
    for line in log.read_text().splitlines():
        memory, files, threads = line.split()
        found.append(Reading(float(memory), int(files), int(threads)))
    return found


def growth(found: Sequence[Reading]) -> tuple[str, list[str]]:
    """What is said of a run, and what has grown in it after the first steps."""
    settled = found[SETTLED:]
    first = settled[:WINDOW]
    last = settled[-WINDOW:]
    problems = []
    memory = [statistics.median(reading.memory_mb for reading in part) for part in (first, last)]
    if memory[1] - memory[0] > MOST_GROWTH_MB:
        problems.append(f"memory grows from {memory[0]:.1f} to {memory[1]:.1f} MB")
    # A checkpoint is written by threads of its own, so what counts is the most at one time.
    most = {}
    for name in ("files", "threads"):
        most[name] = [max(getattr(reading, name) for reading in part) for part in (first, last)]
        if most[name][1] > most[name][0]:
            problems.append(f"{name} grow from {most[name][0]} to {most[name][1]}")
    said = (
        f"{len(found)} steps; steps {SETTLED + 1} to {SETTLED + WINDOW} and the last {WINDOW}: "
        f"memory {memory[0]:.1f} and {memory[1]:.1f} MB (medians), at most "
        f"{most['files'][0]} and {most['files'][1]} open files, "
        f"{most['threads'][0]} and {most['threads'][1]} threads"
    )
    return said, problems


def soak(lab: Lab, row: Row, leak: Leak | None = None, words: Sequence[str] = ()) -> None:
    """No fault: 2,000 steps of a tiny random model with evaluations and checkpoints. After step 200
    memory, open files and threads stay flat (texts that the sampler remembers set to 4,096).
    """
    out = lab.folder / "run"
    log = lab.folder / "readings.txt"
    model = tiny_model(lab.folder / "tiny")
    all_words = (*SOAK_WORDS, f"model.path={model}", *words)
    ended = train(out, all_words, watched(log, leak), patience=PATIENCE)
    row.exit = ended.code
    row.check(ended.code == 0, f"it ends with {ended.code}: {ended.last}")
    found = readings(log)
    row.check(len(found) == steps_written(out), f"{len(found)} readings")
    if len(found) < SETTLED + 2 * WINDOW:
        row.problems.append(f"only {len(found)} steps")
        return
    row.said, problems = growth(found)
    row.problems += problems


CASES = (soak,)

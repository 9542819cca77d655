"""One row of the comparison on a real language model: a method and a seed, trained and measured.

    python -m experiments.real_model.row multi_rlcr_own 0 data.path=<folder of DDXPlus>

It trains with `mar.train`, 200 steps from the committed warm-up (`.._taught`: from the one that
`teach.py` taught on), then measures test questions with `mar.evaluate`, and writes
logs/rows/<method>_seed<seed>.json. The same command goes on where it was interrupted.

`warm_up_<reward>` is the warm-up itself, asked in that reward's form; a method is compared with it on
the same questions, so it is measured first where it is not there yet. `cold_<reward>` is the
warm-up drawn at a low temperature, `taught_multi_rlcr` the taught one.
`constant` is the answers that are most frequent among training questions, whatever is asked.

`out=<folder>` is where runs lie, by default runs/real_model. Other words may only say where the data
is and how this machine works: all rows are made with the same settings. A CPU without instructions
for bfloat16 takes model.lora_base=as_stored: the same weights, multiplied in float32.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from experiments.common.commands import (
    is_finished,
    kept_of_arm,
    read_evaluation,
    run_module,
    train_unless_finished,
    write_log,
)
from experiments.real_model.teach import PROMPTS, taught_from
from mar.errors import UserError, exit_code
from mar.files import read_jsonl
from mar.measure.metrics import AnswerArrays
from mar.measure.single_answers import gold_probabilities
from mar.policy.sources import environment
from mar.run.answering import read_other
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import load_data
from mar.run.warm_up import prior_of

HERE = Path(__file__).parent
ADAPTERS = HERE / "adapters"
LOGS = HERE / "logs" / "rows"
# Test questions, and answers of each.
ITEMS = 500
ANSWERS = 15
MEASURE = [f"eval.num_items={ITEMS}", f"k={ANSWERS}", "num_answers=", "arms=policy"]

BASE = ["+experiment=ddxplus_bayes", "model=smollm2-135m", "model.source=wheel"]
WARM_UP = [*BASE, *PROMPTS, "model.lora_rank=12", "model.lora_base=bfloat16"]
ASKED = [
    "+experiment=ddxplus_bayes",
    "model=hf",
    *PROMPTS,
    "model.thinking=false",
    "model.max_prompt_tokens=256",
    "model.max_completion_tokens=96",
    "model.lora_rank=8",
    "model.lora_base=bfloat16",
    "model.lr=3e-4",
    "model.threads=1",
    "data.num_train=4000",
    "algo.group_size=8",
]
TRAINED = ["train.steps=200", "eval.num_items=16", "checkpoint.every=10"]
# Patients of a step: a set is several times as long as a single answer.
SETS_OF_STEP = ["algo.prompts_per_step=4"]
SINGLES_OF_STEP = ["algo.prompts_per_step=8"]
OWN = ["algo=own", "reward=multi_rlcr", "reward.brier_weight=3", *SETS_OF_STEP]
METHODS = {
    "rlvr_single": ["algo=reinforce", "reward=rlvr_single", *SINGLES_OF_STEP],
    "rlcr_single": ["algo=reinforce", "reward=rlcr_single", *SINGLES_OF_STEP],
    "pass_at_k": [
        "algo=reinforce",
        "reward=rlvr_single",
        "algo.credit=set",
        "algo.pass_k=3",
        *SINGLES_OF_STEP,
    ],
    "multi_rlvr": ["algo=reinforce", "reward=multi_rlvr", *SETS_OF_STEP],
    "multi_rlcr": ["algo=reinforce", "reward=multi_rlcr", *SETS_OF_STEP],
    "multi_rlcr_own": OWN,
    "multi_rlcr_own_exact": [*OWN, "data.target=probabilities"],
    # Confidences are kept apart. Do they come to tell answers apart?
    "multi_rlcr_own_entropy": [
        *OWN,
        "algo.entropy_of=confidences",
        "algo.entropy_coef=0.05",
        "algo.entropy_decay=true",
    ],
    "multi_rlcr_own_taught": OWN,
}
# The methods whose completions are sets.
OF_SETS = [name for name, words in METHODS.items() if any("=multi_" in word for word in words)]
REWARDS = ("rlvr_single", "rlcr_single", "multi_rlvr", "multi_rlcr")
WARM_UPS = {f"warm_up_{reward}": [f"reward={reward}"] for reward in REWARDS}
# How much of what training does is only sharper draws?
COLD = ["algo.temperature=0.3"]
WARM_UPS |= {f"cold_{reward}": [f"reward={reward}", *COLD] for reward in REWARDS}
# The warm-up that was taught what a confidence means (teach.py), and what starts from it.
WARM_UPS["taught_multi_rlcr"] = ["reward=multi_rlcr"]
FROM_TAUGHT = ("taught_multi_rlcr", "multi_rlcr_own_taught")
IN_FLOAT32 = "model.lora_base=as_stored"
# What words on the command line may begin with.
OF_MACHINE = ("data.path=", "model.threads=", "logger.", "train.stop_at=", IN_FLOAT32)
# Of each training step, what the log keeps.
KEPT_OF_STEP = (
    "step",
    "reward/total",
    "policy/entropy",
    "policy/sampler_kl",
    "train/coverage@1",
    "train/coverage@3",
    "train/ece",
    "train/auroc",
    "train/q_mse",
    "train/format_rate",
    "train/repeats_per_set",
    "train/tokens_per_set",
)


def start_of(out: Path, words: list[str]) -> Path:
    """The checkpoint folder of the warm-up, made where it is not there yet."""
    start = out / "start"
    if not (start / "config.json").is_file():
        run_module("experiments.real_model.merge", str(ADAPTERS), str(start), *WARM_UP, *words)
    return start


def reward_of(method: str) -> str:
    """The reward that a method's words name, such as multi_rlcr."""
    words = METHODS[method]
    return next(word for word in words if word.startswith("reward=")).removeprefix("reward=")


def warm_up_of(method: str) -> str:
    """The warm-up that a method starts from, asked in its form."""
    kind = "taught" if method in FROM_TAUGHT else "warm_up"
    return f"{kind}_{reward_of(method)}"


def cold_of(method: str) -> str:
    """The warm-up drawn at a low temperature, asked in the form of a method."""
    return f"cold_{reward_of(method)}"


def curve_of(run: Path) -> list[dict[str, Any]]:
    """What the log keeps of each training step."""
    steps, _ = read_jsonl(run / "metrics.jsonl")
    return [{key: step[key] for key in KEPT_OF_STEP if key in step} for step in steps]


def seconds_of(run: Path) -> float:
    """What all training steps took, also of a run that was interrupted."""
    steps, _ = read_jsonl(run / "metrics.jsonl")
    return round(sum(step["perf/sample_s"] + step["perf/update_s"] for step in steps), 1)


def commit_of(run: Path) -> str | None:
    """The commit that the run was begun at, or the last one where it went on."""
    return OmegaConf.load(run / "config.yaml").provenance.commit


def coverage_of_questions(folder: Path, confident: bool) -> list[list[float]]:
    """For each question, in the order of the ids: coverage of 1, 2, .. sets.

    Any two rows can be compared on the same questions with it.
    """
    items = sorted(read_other(folder, LOGS), key=lambda item: item.id)
    return AnswerArrays(items, confident).coverage_curve.round(4).tolist()


def constant_coverage(words: Sequence[str]) -> list[list[float]]:
    """[test questions, ANSWERS]: what the 1, 2, .. most frequent conditions cover of each."""
    config = compose(words)
    display = Display("plain", 0, 0)
    examples = load_data(config, "test", ITEMS, 0, display)
    prior = prior_of(config, examples, display)
    assert prior is not None
    most_frequent = np.argsort(-prior)[:ANSWERS]
    covered = gold_probabilities(examples)[:, most_frequent].cumsum(axis=1)
    return covered.round(4).tolist()


class Rows:
    """The rows whose runs lie in `out`; `words` go to every command."""

    def __init__(self, out: Path, words: Sequence[str]) -> None:
        self.out = out
        self.words = list(words)
        self.data = [word for word in words if word.startswith("data.path=")]
        self.multiplied_in = "float32" if IN_FLOAT32 in words else "bfloat16"
        self.start = start_of(out, self.data)
        self.taught = out / "taught"

    def folder(self, method: str, seed: int) -> Path:
        return self.out / method / f"seed{seed}"

    def settings(self, method: str, seed: int) -> list[str]:
        """The words of a method, but for those of training alone."""
        of_method = (METHODS | WARM_UPS)[method]
        start = self.taught if method in FROM_TAUGHT else self.start
        return [*ASKED, *of_method, f"model.path={start}", f"seed={seed}", *self.words]

    def prepare(self, method: str) -> None:
        """Make the checkpoint that a method starts from, where it is not there yet."""
        if method in FROM_TAUGHT:
            taught_from(self.start, self.taught, self.data)

    def measure_warm_up(self, name: str, seed: int) -> None:
        """Measure a row that is not trained, and write its log."""
        self.prepare(name)
        folder = self.folder(name, seed)
        settings = self.settings(name, seed)
        run_module("mar.evaluate", "base", *settings, *MEASURE, f"out={folder}")
        write(name, seed, folder, multiplied_in=self.multiplied_in)

    def measure_constant(self) -> None:
        covered = constant_coverage(self.settings("warm_up_multi_rlcr", 0))
        write_log(
            LOGS.parent / "constant.json", {**environment(), "coverage_of_questions": covered}
        )

    def make(self, method: str, seed: int) -> None:
        """Train, measure and write the log."""
        self.prepare(method)
        before = warm_up_of(method)
        warm_up = self.folder(before, 0)
        measured = log_of(before, 0).exists() and (warm_up / "evaluation.json").exists()
        if not measured:
            self.measure_warm_up(before, 0)
        run = self.folder(method, seed)
        settings = [*self.settings(method, seed), *TRAINED]
        train_unless_finished(run, *settings, f"run_dir={run}")
        if not is_finished(run):
            raise UserError(f"{run} stopped before its last step: the same command goes on")
        run_module("mar.evaluate", str(run), *MEASURE, f"against={warm_up}")
        trained = {
            "trained_at": commit_of(run),
            "train_s": seconds_of(run),
            "multiplied_in": self.multiplied_in,
            # To the warm-up asked in the same form.
            "paired": read_evaluation(run)["paired"][f"policy - {warm_up}"],
        }
        write(method, seed, run, **trained, steps=curve_of(run))


def out_and_words(given: Sequence[str]) -> tuple[Path, list[str]]:
    """`out=<folder>`, where runs lie, and the other words.

    Raises UserError for a word that would make a row unlike the others.
    """
    out = Path("runs/real_model")
    words = []
    for word in given:
        if word.startswith("out="):
            out = Path(word.removeprefix("out="))
        elif word.startswith(OF_MACHINE):
            words.append(word)
        else:
            raise UserError(
                f"{word}: all rows are made with the same settings, so only out=, "
                f"{', '.join(OF_MACHINE)} can be said here; for others use python -m mar.train"
            )
    return out, words


def log_of(method: str, seed: int) -> Path:
    return LOGS / f"{method}_seed{seed}.json"


def write(method: str, seed: int, folder: Path, **more: Any) -> None:
    """Keep what the tables need of an evaluation's folder as the log of a method and seed."""
    evaluation = read_evaluation(folder)
    arm = evaluation["arms"]["policy"]
    log = {
        "method": method,
        "seed": seed,
        **environment(),
        "num_items": evaluation["num_items"],
        **more,
        **kept_of_arm(arm),
        "bars": evaluation["bars"],
        "coverage_of_questions": coverage_of_questions(folder, bool(arm["reliability"])),
    }
    write_log(log_of(method, seed), log)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("method", choices=[*METHODS, *WARM_UPS, "constant"])
    add("seed", type=int, help="of a method; 0 for what is not trained")
    add("words", nargs="*", metavar="WORD", help="such as data.path=<folder>")
    args = parser.parse_args()
    rows = Rows(*out_and_words(args.words))
    if args.method in METHODS:
        rows.make(args.method, args.seed)
    elif args.method == "constant":
        rows.measure_constant()
    else:
        rows.measure_warm_up(args.method, args.seed)


if __name__ == "__main__":
    sys.exit(exit_code(main))

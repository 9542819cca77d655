"""The first hour on a CUDA device: what no machine without one can measure.

    python experiments/gpu/first_hour.py          # make gpu

Runs the tests that need a device, times linear_logprobs, compares sampler and trainer in bfloat16,
graphs with eager decoding, trains twenty steps of two real models where their weights can be had,
and measures the memory of a training step. Writes TESTED_ON.md beside this file; the last line of
stdout is one JSON document. A part that fails is recorded with its reason and the others still run.
Without a CUDA device: one sentence, exit code 2, nothing written.
"""

import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mar.policy.model import Decoder, ModelConfig
from mar.policy.packing import pack_groups
from mar.sample import engine as sampler
from mar.sample.draws import SamplingParams, stream_key
from mar.sample.engine import Request, generate
from mar_kernels import linear_logprobs

ROOT = Path(__file__).resolve().parents[2]
REPORT = Path(__file__).with_name("TESTED_ON.md")
NO_DEVICE = (
    "first_hour measures a CUDA device and torch sees none here: nothing was measured or written."
)
N, D, V = 4096, 2048, 151_936  # tokens; Qwen3-1.7B
VLLM = """import sys
from vllm import LLM, SamplingParams
model = LLM(sys.argv[1], max_model_len=512, enforce_eager=True, gpu_memory_utilization=0.4)
print("TOKENS", len(model.generate("A patient", SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids))"""
TRAINED = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B")
STEPS = 20
QWEN3 = ModelConfig(
    "Qwen3ForCausalLM",
    V,
    1024,
    3072,
    28,
    16,
    8,
    128,
    rope_theta=1e6,
    max_positions=40_960,
    qk_norm=True,
    tied_embeddings=True,
)
PROMPT, GROUP, COMPLETION = 512, 8, 64
Found = dict[str, float | str]


def timed(
    work: Callable[[], object], runs: int, clock: Callable[[], float], wait: Callable[[], object]
) -> float:
    """Median seconds of `runs` calls after one that is not counted; `wait` returns when the device
    has nothing left to do.
    """
    times = []
    for _ in range(runs + 1):
        wait()
        began = clock()
        work()
        wait()
        times.append(clock() - began)
    return statistics.median(times[1:])


def on_device(work: Callable[[], object], runs: int = 5) -> float:
    return timed(work, runs, time.perf_counter, torch.cuda.synchronize)


def attainable(
    num_tokens: int, width: int, vocab: int, itemsize: int, flops: float, bandwidth: float
) -> float:
    """Seconds below which no forward and backward of linear_logprobs can come: three products of
    2NVD FLOPs, or hidden, weight and their gradients moved once; at `flops` per second and
    `bandwidth` bytes per second.
    """
    return max(
        6 * num_tokens * width * vocab / flops,
        2 * itemsize * width * (num_tokens + vocab) / bandwidth,
    )


def limits(device: str) -> tuple[float, float]:
    """What the device reaches: FLOP/s of a large bfloat16 product, bytes/s of a large copy."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * 8192**3 / on_device(lambda: a @ b), 2 * source.numel() / on_device(
        lambda: target.copy_(source)
    )


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What a plain trainer computes: log_softmax of [N, V] in float32."""
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]


def logprob_sides() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Sum of log-probabilities, by who computes it."""
    compiled = torch.compile(full_logits)
    sides: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "reference": lambda *case: linear_logprobs(*case, backend="reference")[0].sum(),
        "torch.compile of full logits": lambda *case: compiled(*case).sum(),
        "triton": lambda *case: linear_logprobs(*case, backend="triton")[0].sum(),
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        sides["liger"] = lambda hidden, weight, targets: -liger(weight, hidden, targets)
    return sides


def kernels(device: str) -> Found:
    """Forward and backward of linear_logprobs in bfloat16, and the fraction of what the device
    could do.
    """
    flops, bandwidth = limits(device)
    found: Found = {"product, TFLOP/s": flops / 1e12, "copy, GB/s": bandwidth / 1e9}
    least = attainable(N, D, V, 2, flops, bandwidth)
    hidden, weight = (
        torch.randn(n, D, device=device, dtype=torch.bfloat16).mul_(D**-0.25).requires_grad_()
        for n in (N, V)
    )
    targets = torch.randint(V, (N,), device=device)
    for name, side in logprob_sides().items():

        def both(side: Callable[..., Tensor] = side) -> None:
            hidden.grad = weight.grad = None
            side(hidden, weight, targets).backward()

        measured = attempt(lambda both=both: {"ms": on_device(both) * 1e3})
        if "reason" in measured:
            found[f"{name}, ms"] = measured["reason"]
        else:
            found[f"{name}, ms"] = measured["found"]["ms"]
            found[f"{name}, fraction of roofline"] = least * 1e3 / measured["found"]["ms"]
    if importlib.util.find_spec("liger_kernel") is None:
        found["liger, ms"] = "liger-kernel is not installed: pip install -e '.[bench]'"
    return found


def requests(vocab: int, num_prompts: int, prompt_tokens: int, group_size: int) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, vocab, prompt_tokens).tolist()) for _ in range(num_prompts)]
    return [
        Request(p, tuple(stream_key("first_hour", i, g) for g in range(group_size)))
        for i, p in enumerate(prompts)
    ]


def mismatch(
    model: Decoder,
    num_prompts: int = 2,
    prompt_tokens: int = PROMPT,
    group_size: int = GROUP,
    tokens: int = COMPLETION,
) -> Found:
    """max and mean |full_logprobs of the sampler - log-probability of the training pass| over
    sampled tokens, at temperature 1.
    """
    asked = requests(model.config.vocab_size, num_prompts, prompt_tokens, group_size)
    groups = generate(model, asked, SamplingParams(tokens), 10**7).groups
    packed = pack_groups(
        [r.prompt_ids for r in asked],
        [[s.ids.tolist() for s in g] for g in groups],
        model.head_weight.device,
    )
    with torch.no_grad():
        trained = model(packed)[0].double().cpu()
    sampled = torch.from_numpy(
        np.concatenate([s.full_logprobs for g in groups for s in g])
    ).double()
    gap = (sampled - trained).abs()
    return {"max": gap.max().item(), "mean": gap.mean().item(), "tokens": len(gap)}


def random_qwen3(device: str) -> Decoder:
    """The shape of Qwen3-0.6B with random weights, in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        return Decoder(QWEN3).to(torch.bfloat16)


def graphs(device: str) -> Found:
    """Greedy decoding by CUDA graphs and eagerly: rows whose tokens are the same, tokens per second
    (prefill and captures included).
    """
    model, params = random_qwen3(device), SamplingParams(256, 0.0)
    asked = requests(V, 4, PROMPT, GROUP)
    found: Found = {}
    rows = {}
    for name, graphed in (("graphs", sampler.GRAPHED), ("eager", ())):
        with patch.object(sampler, "GRAPHED", graphed), warnings.catch_warnings():
            warnings.filterwarnings("error", "decoding goes on without CUDA graphs")
            generate(model, asked, SamplingParams(8, 0.0), 10**7)
            torch.cuda.synchronize()
            began = time.perf_counter()
            rows[name] = [
                s for group in generate(model, asked, params, 10**7).groups for s in group
            ]
            found[f"{name}, tokens/s"] = sum(len(s.ids) for s in rows[name]) / (
                time.perf_counter() - began
            )
    pairs = list(zip(*rows.values(), strict=True))
    alike = [(a, b) for a, b in pairs if np.array_equal(a.ids, b.ids)]
    found["rows with the same tokens"] = f"{len(alike)} of {len(pairs)}"
    found["largest difference of their log-probabilities"] = max(
        (float(abs(a.full_logprobs - b.full_logprobs).max()) for a, b in alike), default=math.nan
    )
    return found


def memory(device: str) -> Found:
    """Peak memory of a training step's forward and backward beyond the weights."""
    model = random_qwen3(device)
    prompt, *completions = (
        torch.randint(V, (n,)).tolist() for n in (PROMPT, *[COMPLETION] * GROUP)
    )
    packed = pack_groups([prompt], [completions], device)
    model(packed)[0].mean().backward()  # compiles; the gradients are there from now on
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(packed)[0].mean().backward()
    return {
        "weights and gradients, MiB": before / 2**20,
        "peak beyond them, MiB": (torch.cuda.max_memory_allocated() - before) / 2**20,
    }


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


def read_by_vllm(
    run_dir: Path, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
) -> str:
    """How many tokens vLLM, in a process of its own, writes with the exported policy of a run; or
    why it does not.
    """
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    exported = str(run_dir.with_name("exported"))
    for command in (
        [sys.executable, "-m", "mar.export", str(run_dir), f"out={exported}"],
        [sys.executable, "-c", VLLM, exported],
    ):
        done = run(command, **options)
        if done.returncode:
            return last_line(done)
    return next(
        (line for line in done.stdout.splitlines() if line.startswith("TOKENS ")),
        "it wrote nothing",
    )


def train(
    model: str, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
) -> Found:
    """Some steps of the clinic with a model of the hub, by mar.train in a process of its own."""
    options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    fetched = run([sys.executable, "-m", "mar.fetch", model], **options)
    if fetched.returncode:
        return {"steps": f"not reachable: {last_line(fetched)}"}
    with tempfile.TemporaryDirectory() as scratch:
        words = ["+experiment=clinic", "scale=h100x1", "data.source=embedded", "model=hf", f"model.path={model}", "model.thinking=false",
                 "model.max_completion_tokens=256", f"train.steps={STEPS}", "eval.num_items=16",
                 f"out={scratch}", "logger.console=plain"]  # fmt: skip
        done = run([sys.executable, "-m", "mar.train", *words], **options)
        if done.returncode:
            raise RuntimeError(f"mar.train ended with {done.returncode}: {last_line(done)}")
        (file,) = Path(scratch).rglob("metrics.jsonl")
        steps = [json.loads(line) for line in file.read_text().splitlines()]
        read = read_by_vllm(file.parent, run)
    parts = [
        sum(step[f"perf/{part}_s"] for part in ("sample", "verify", "update")) for step in steps
    ]
    return {
        "steps": len(steps),
        "seconds a step, median": statistics.median(parts),
        "tokens/s, median": statistics.median(step["perf/tokens_per_s"] for step in steps),
        "largest sampler mismatch": max(step["policy/sampler_mismatch_max"] for step in steps),
        "vLLM reads the export": read,
    }


def gpu_tests(run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> Found:
    """The tests marked `gpu`: kernels compiled, not interpreted, and what must agree with the CPU."""
    done = run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    said = (done.stdout.strip() or last_line(done)).splitlines()[-1]
    if done.returncode:
        raise RuntimeError(said)
    return {"pytest": said}


PARTS: dict[str, Callable[[str], Found]] = {
    "tests that need a device": lambda device: gpu_tests(),
    f"linear_logprobs forward and backward, bf16, N {N}, D {D}, V {V}": kernels,
    "sampler against trainer, bf16, Qwen3-0.6B shape, random weights": lambda device: mismatch(
        random_qwen3(device)
    ),
    "CUDA graphs against eager decoding, the same model": graphs,
    f"training pass of one group, the same model, P{PROMPT} G{GROUP} R{COMPLETION}": memory,
    **{f"{STEPS} steps of {model}": lambda device, model=model: train(model) for model in TRAINED},
}


def attempt(part: Callable[[], Found]) -> dict[str, Any]:
    """{"found": ...}, or {"reason": ...} in one line where the part failed."""
    try:
        return {"found": part()}
    except Exception as error:  # of any kind: what fails on a new device is what this is for
        return {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def measure(parts: Mapping[str, Callable[[str], Found]], device: str) -> dict[str, dict[str, Any]]:
    """Every part, whatever becomes of the others."""
    results = {}
    for name, part in parts.items():
        print(f"{name} ...", flush=True)
        results[name] = attempt(lambda part=part: part(device))
        print(f"  {results[name]}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return results


def environment() -> dict[str, str]:
    """What the numbers were measured on."""

    def said(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        except FileNotFoundError:
            return "unknown"
        return (done.stdout.splitlines() or ["unknown"])[0].strip()

    return {
        "device": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__
        if importlib.util.find_spec("triton")
        else "not installed",
        "date": str(date.today()),
        "commit": said("git", "describe", "--always", "--dirty", "--exclude=*"),
    }


def render(document: Mapping[str, Any]) -> str:
    """TESTED_ON.md of {"environment": {name: text}, "parts": {name: {"found": {...}} or {"reason":
    text}}}.
    """
    lines = [
        "# Tested on",
        "",
        "Written by `python experiments/gpu/first_hour.py` (`make gpu`).",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in document["environment"].items()]
    lines += ["", "| part | what | measured |", "| --- | --- | --- |"]
    for part, result in document["parts"].items():
        rows = result["found"] if "found" in result else {"failed": result["reason"]}
        for what, value in rows.items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
            lines.append(f"| {part} | {what} | {shown} |")
    return "\n".join([*lines, ""])


def main() -> int:
    if not torch.cuda.is_available():
        print(NO_DEVICE, file=sys.stderr)
        return 2
    document = {"environment": environment(), "parts": measure(PARTS, "cuda")}
    REPORT.write_text(render(document), encoding="utf-8")
    print(f"wrote {REPORT.relative_to(ROOT)}")
    print(json.dumps({"first_hour": document}))
    return int(any("reason" in result for result in document["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())

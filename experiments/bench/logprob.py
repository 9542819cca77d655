"""linear_logprobs of the CPU (mar_kernels.reference) against log_softmax of full logits: forward
and backward, time, memory, gradient error.

    python experiments/bench/logprob.py [--quick | --bars] [--runs 1]

--quick: a small vocabulary (its ratios are not those of the bars). --bars: 4,096 tokens of
SmolLM2's width over Qwen3's vocabulary (the default). Logits are peaked like a language model's,
float32, on one thread. Every measurement is its own process and the sides alternate; memory is the
peak of resident memory (VmHWM) beyond the inputs and the two gradients. Appends to
results/logprob.csv; the last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.common import peak_bytes, quiet_machine, record
from mar_kernels import reference

RESULTS = Path(__file__).parent / "results" / "logprob.csv"
BARS = {
    "memory_ratio": ">= 40",
    "time_ratio": "<= 1.25",
    "entropy_time_ratio": "<= 1.0",
    "grad_error": "<= 1e-5",
}
SIZES = {"quick": (256, 576, 8192), "bars": (4096, 576, 151_936)}
ENTROPY_COEF = 0.01
ERROR_ROWS = 128  # of a block of the float64 gradients


def inputs(num_tokens: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], targets [N] and what arrives from above [N].

    Logits have a spread of 3; the target leads by less or more.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, width, generator=generator).mul_(width**-0.5)
    targets = torch.randint(vocab, (num_tokens,), generator=generator)
    lead = 8 + 16 * torch.rand(num_tokens, 1, generator=generator)
    hidden = torch.randn(num_tokens, width, generator=generator).mul_(3)
    hidden.addcmul_(lead, weight[targets])
    upstream = torch.randn(num_tokens, generator=generator) / num_tokens
    return hidden, weight, targets, upstream


def full_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """What a plain trainer computes: log_softmax of [N, V]."""
    logprobs = torch.log_softmax(hidden @ weight.T, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1) if with_entropy else None
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


def in_blocks(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logprobs, entropy, _ = reference.linear_logprobs(hidden, weight, targets)
    return logprobs, entropy if with_entropy else None


SIDES = {"ours": in_blocks, "log_softmax": full_logits}


def gradients(
    side: str, with_entropy: bool, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor
) -> None:
    """Forward and backward; the gradients add up in `hidden.grad` and `weight.grad`."""
    logprobs, entropy = SIDES[side](hidden, weight, targets, with_entropy)
    loss = (logprobs * upstream).sum()
    if entropy is not None:
        loss = loss + ENTROPY_COEF * entropy.mean()
    loss.backward()


def measure(side: str, with_entropy: bool, size: str) -> dict[str, float]:
    """Seconds and peak bytes beyond the two gradients."""
    hidden, weight, targets, upstream = inputs(*SIZES[size])
    hidden.requires_grad_()
    weight.requires_grad_()
    # A few tokens warm up.
    few_hidden = hidden.detach()[:8].requires_grad_()
    few_rows = weight.detach()[:8].requires_grad_()
    gradients(side, with_entropy, few_hidden, few_rows, targets[:8] % 8, upstream[:8])
    with peak_bytes() as peak:
        began = time.perf_counter()
        gradients(side, with_entropy, hidden, weight, targets, upstream)
        taken = time.perf_counter() - began
    return {"seconds": taken, "bytes": peak[0] - 4 * (hidden.numel() + weight.numel())}


def gradient_error(size: str) -> dict[str, float]:
    """Largest |ours - exact| over largest |exact| of either gradient, entropy included. And FLOPs.

    Exact: log_softmax in float64.
    """
    hidden, weight, targets, upstream = inputs(*SIZES[size])
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    num_tokens = len(targets)
    for start in range(0, num_tokens, ERROR_ROWS):
        rows = slice(start, start + ERROR_ROWS)
        logprobs, entropy = full_logits(exact[0][rows], exact[1], targets[rows], True)
        assert entropy is not None
        loss = (logprobs * upstream[rows]).sum()
        (loss + ENTROPY_COEF / num_tokens * entropy.sum()).backward()
    hidden.requires_grad_()
    weight.requires_grad_()
    with FlopCounterMode(display=False) as flops:
        gradients("ours", True, hidden, weight, targets, upstream)
    errors = []
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        largest_error = (ours.grad - theirs.grad).abs().max()
        errors.append((largest_error / theirs.grad.abs().max()).item())
    return {
        "grad_error": max(errors),
        "flops_over_nvd": flops.get_total_flops() / (num_tokens * weight.numel()),
    }


def child(*words: str) -> dict[str, float]:
    """The last line of this script in a process of its own."""
    command = [sys.executable, __file__, "--child", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(size: str, with_entropy: bool, runs: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(runs):
        for side in SIDES:
            found[side].append(child(size, side, str(int(with_entropy))))
    medians = {}
    for side, rows in found.items():
        medians[side] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    name = "with entropy" if with_entropy else "log-probability"
    for side, row in medians.items():
        mib = row["bytes"] / 2**20
        print(
            f"{name:16s} {side:12s} {row['seconds']:7.2f} s   {mib:8.0f} MiB beyond the gradients",
            flush=True,
        )
    return medians


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small vocabulary")
    parser.add_argument("--bars", action="store_true", help="the size of the bars (the default)")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.child:
        size, what, *rest = args.child
        found = gradient_error(size) if what == "error" else measure(what, rest == ["1"], size)
        print(json.dumps(found))
        return
    quiet_machine()
    size = "quick" if args.quick else "bars"
    plain = compare(size, False, args.runs)
    entropy = compare(size, True, args.runs)
    ours = plain["ours"]
    theirs = plain["log_softmax"]
    ratios = {
        "memory_ratio": theirs["bytes"] / ours["bytes"],
        "time_ratio": ours["seconds"] / theirs["seconds"],
        "entropy_time_ratio": entropy["ours"]["seconds"] / entropy["log_softmax"]["seconds"],
        **child(size, "error"),
    }
    for name, value in ratios.items():
        bar = f"bar {BARS[name]}" if name in BARS and size == "bars" else ""
        print(f"{name:20s} {value:10.3g}  {bar}")
    N, D, V = SIZES[size]
    record(RESULTS, list(ratios), {f"N{N} D{D} V{V}": list(ratios.values())})
    print(json.dumps({"logprob": ratios}))


if __name__ == "__main__":
    main()

"""Our sampler against transformers.generate: same weights, threads, sampling parameters and stop rule; tokens up to the stop are counted.

    python experiments/bench/sampler.py [--quick | --bars] [--runs 3] [--threads 1]

The two run alternately in one process, medians are shown. Appends to results/sampler.csv; the last line of stdout is one JSON document.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mar.draw import SamplingParams, stream_key
from mar.fetch import resolve_model
from mar.grammar import Grammar
from mar.prompts import build_prompt, load_tokenizer
from mar.sampler import Request, generate
from mar.tasks import clinic
from mar.weights import load_model

RESULTS = Path(__file__).parent / "results" / "sampler.csv"
BARS = {"embedded_16x8": 2.5, "embedded_ragged": 3.0, "smollm2_2x16": 4.0, "smollm2_16x1": 1.3}
PLENTY = 10**7


@dataclass(frozen=True)
class Case:
    """Prompts x samples, how long each completion may be, and which token ends it (None: the limits alone)."""

    name: str
    model: str
    prompts: list[tuple[int, ...]]
    group_size: int
    max_tokens: int
    limits: list[list[int]] | None = None
    stop_id: int | None = None


def embedded_prompts(folder: Path, count: int) -> list[tuple[int, ...]]:
    tokenizer, grammar = load_tokenizer(folder), Grammar("rlcr_multi", 3, thinking=False)
    return [build_prompt(e, grammar, tokenizer, clinic.NOUN).ids for e in clinic.load("validation", count)]


def text_prompts(vocab: int, count: int, length: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(0, vocab, (length,), generator=generator).tolist()) for _ in range(count)]


def cases(quick: bool, folders: dict[str, Path]) -> list[Case]:
    stop = load_tokenizer(folders["embedded"]).eos_token_id
    prompts = embedded_prompts(folders["embedded"], 16)
    ragged = [[8 + (37 * (8 * p + g)) % 121 for g in range(8)] for p in range(16)]
    out = [
        Case("embedded_16x8", "embedded", prompts, 8, 96, stop_id=stop),
        Case("embedded_ragged", "embedded", prompts, 8, 128, limits=ragged),
    ]
    if quick:
        return out
    return [
        *out,
        Case("smollm2_2x16", "smollm2-135m", text_prompts(49152, 2, 512), 16, 64),
        Case("smollm2_16x1", "smollm2-135m", text_prompts(49152, 16, 128), 1, 128),
    ]


def run_ours(model: Any, case: Case, seed: int) -> int:
    requests = [
        Request(
            prompt,
            tuple(stream_key(seed, i, g) for g in range(case.group_size)),
            tuple(case.limits[i]) if case.limits else (),
        )
        for i, prompt in enumerate(case.prompts)
    ]
    params = SamplingParams(case.max_tokens, 1.0, () if case.stop_id is None else (case.stop_id,))
    return sum(len(s.ids) for group in generate(model, requests, params, PLENTY).groups for s in group)


class RowLimits(transformers.StoppingCriteria):
    """Each row ends at its own length."""

    def __init__(self, prompt_length: int, limits: list[int]) -> None:
        self.ends = torch.tensor([prompt_length + limit for limit in limits])

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def run_theirs(model: Any, case: Case, seed: int) -> int:
    torch.manual_seed(seed)
    longest = max(map(len, case.prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in case.prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in case.prompts])
    limits = None if case.limits is None else [n for row in case.limits for n in row]
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=case.group_size,
            max_new_tokens=case.max_tokens,
            eos_token_id=case.stop_id,
            pad_token_id=0,
            stopping_criteria=None if limits is None else [RowLimits(longest, limits)],
        )[:, longest:]
    if limits is not None:
        return sum(limits)
    if case.stop_id is None:
        return out.numel()
    found = out == case.stop_id
    return int(torch.where(found.any(1), found.int().argmax(1) + 1, out.shape[1]).sum())


class CountOps(TorchDispatchMode):
    """How often each aten operator runs, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # composite operators arrive whole in inference mode: count what they do
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(run: Callable[[Case], Any], case: Case) -> tuple[float, int]:
    """aten ops of one decode step (the difference between 17 and 16 new tokens), FLOPs of the whole generation."""
    ops = []
    for tokens in (16, 17):
        with CountOps() as counter:
            run(Case(case.name, case.model, case.prompts, case.group_size, tokens))
        ops.append(sum(counter.count.values()))
    with FlopCounterMode(display=False) as flops:
        run(Case(case.name, case.model, case.prompts, case.group_size, 32))
    return ops[1] - ops[0], flops.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="embedded cases and counts only")
    parser.add_argument("--bars", action="store_true", help="every case")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    folders = {"embedded": resolve_model("embedded", "embedded", None)[0]}
    if not args.quick:
        folders["smollm2-135m"] = resolve_model("wheel", "smollm2-135m", None)[0]

    document: dict[str, Any] = {"cases": {}}
    loaded: dict[str, tuple[Any, Any]] = {}
    for case in cases(args.quick, folders):
        if case.model not in loaded:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[case.model], dtype=torch.float32).eval()
            loaded[case.model] = (load_model(folders[case.model]), theirs)
        models = dict(zip(("ours", "hf"), loaded[case.model], strict=True))
        speeds: dict[str, list[float]] = {"ours": [], "hf": []}
        for seed in range(args.runs + 1):
            for name, run in (("ours", run_ours), ("hf", run_theirs)):
                began = time.perf_counter()
                tokens = run(models[name], case, seed)
                if seed:  # the first run warms up
                    speeds[name].append(tokens / (time.perf_counter() - began))
        ours, theirs = (statistics.median(speeds[name]) for name in ("ours", "hf"))
        document["cases"][case.name] = {"ours_tok_s": ours, "hf_tok_s": theirs, "ratio": ours / theirs}
        bar = BARS[case.name]
        print(
            f"{case.name:18s} ours {ours:8.0f} tok/s  transformers {theirs:8.0f} tok/s  x{ours / theirs:.2f}  (bar {bar})"
        )
        if case.name == "embedded_16x8":
            counts = [
                count(lambda c, f=run, m=models[n]: f(m, c, 0), case)
                for n, run in (("ours", run_ours), ("hf", run_theirs))
            ]
            document["ops_ratio"] = counts[0][0] / counts[1][0]
            document["flops_ratio"] = counts[0][1] / counts[1][1]
            print(f"aten ops of a decode step {counts[0][0]} / {counts[1][0]}, FLOPs {document['flops_ratio']:.3f}")
    record(document, args.threads)
    print(json.dumps(document))


def record(document: dict[str, Any], threads: int) -> None:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    RESULTS.parent.mkdir(exist_ok=True)
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(
                "date commit machine cores threads torch transformers case ours_tok_s hf_tok_s ratio".split()
            )
        head = [
            date.today(),
            git,
            platform.machine(),
            os.cpu_count(),
            threads,
            torch.__version__,
            transformers.__version__,
        ]
        for name, row in document["cases"].items():
            writer.writerow([*head, name, *(round(row[key], 2) for key in ("ours_tok_s", "hf_tok_s", "ratio"))])


if __name__ == "__main__":
    main()

"""Our sampler against transformers.generate: same weights, threads, sampling parameters and stop
rule; tokens up to the stop are counted.

    python experiments/bench/sampler.py [--quick | --bars | --continuous] [--runs 3]

--quick: counts and the embedded model, on one thread. --bars: SmolLM2-135M too, on all cores that
are idle, within 600 s on any machine: a slow or busy one makes fewer runs, then smaller cases, and
says so. The two run alternately in one process, medians are shown. Appends to results/sampler.csv;
the last line of stdout is one JSON document. --continuous: transformers' continuous batching
against its generate, and nothing else (psutil is needed: the extra `bench`).
"""

import argparse
import itertools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.common import alternate, idle_cores, quiet_machine, record, seconds
from mar.answers.grammar import Grammar
from mar.answers.prompts import build_prompt
from mar.answers.tokenizer import load_tokenizer
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model
from mar.sample.draws import SamplingParams, stream_key
from mar.sample.engine import Generation, Request, generate
from mar.tasks import clinic

RESULTS = Path(__file__).parent / "results" / "sampler.csv"
BARS = {"embedded_16x8": 2.5, "embedded_ragged": 3.0, "smollm2_2x16": 4.0, "smollm2_16x1": 1.3}
PLENTY = 10**7
# A case begins no further run after so many seconds: on a slow machine it has fewer.
CASE_SECONDS = 30.0
# One run of both sides of a case may be expected to take so long; else the case becomes smaller.
LONGEST_RUN_SECONDS = 90.0
FEWEST_ROWS, FEWEST_TOKENS = 4, 8


@dataclass(frozen=True)
class Case:
    """Prompts x samples, how long each completion may be, and which token ends it (None: the limits
    alone).
    """

    name: str
    model: str
    prompts: list[tuple[int, ...]]
    group_size: int
    max_tokens: int
    limits: list[list[int]] | None = None
    stop_id: int | None = None
    threads: int = 1

    @property
    def num_rows(self) -> int:
        return len(self.prompts) * self.group_size


def embedded_prompts(folder: Path, count: int) -> list[tuple[int, ...]]:
    tokenizer, grammar = load_tokenizer(folder), Grammar("rlcr_multi", 3, thinking=False)
    return [
        tuple(build_prompt(e, grammar, tokenizer, clinic.NOUN).ids.tolist())
        for e in clinic.load("validation", count)
    ]


def text_prompts(vocab: int, count: int, length: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())
        for _ in range(count)
    ]


def cases(quick: bool, folders: dict[str, Path], threads: int = 1) -> list[Case]:
    """The embedded model has one thread, SmolLM2 `threads`."""
    stop = load_tokenizer(folders["embedded"]).eos_token_id
    prompts = embedded_prompts(folders["embedded"], 16)
    ragged = [[8 + (37 * (8 * p + g)) % 121 for g in range(8)] for p in range(16)]
    out = [
        Case("embedded_16x8", "embedded", prompts, 8, 96, stop_id=stop),
        Case("embedded_ragged", "embedded", prompts, 8, 128, limits=ragged),
    ]
    if quick:
        return out
    shared, different = text_prompts(49152, 2, 512), text_prompts(49152, 16, 128)
    return [
        *out,
        Case("smollm2_2x16", "smollm2-135m", shared, 16, 64, threads=threads),
        Case("smollm2_16x1", "smollm2-135m", different, 1, 128, threads=threads),
    ]


@dataclass(frozen=True)
class Price:
    """Seconds that transformers takes for one row: its prompt, and each new token."""

    prompt_s: float
    token_s: float

    def of_run(self, case: Case) -> float:
        """About the seconds of one run of both sides.

        A step of 16 rows takes three times as long as that of one; ours takes less than theirs.
        """
        steps_s = case.max_tokens * self.token_s * (1 + case.num_rows / 8)
        return 1.3 * (case.num_rows * self.prompt_s + steps_s)


def price_of(model: Any, case: Case) -> Price:
    row = replace(case, prompts=case.prompts[:1], group_size=1)
    run_theirs(model, replace(row, max_tokens=1), 0)  # warms up
    one, five = (
        seconds(partial(run_theirs, model, replace(row, max_tokens=tokens), 0), 1)
        for tokens in (1, 5)
    )
    return Price(one, max(five - one, 0.0) / 4)


def fitted(case: Case, price: Price) -> Case:
    """The case, or a smaller one where a run would take longer than LONGEST_RUN_SECONDS here.

    New tokens and rows are halved by turns, never the length of a prompt. A smaller case says so in
    its name.
    """
    smaller = case
    halve_rows = False
    while price.of_run(smaller) > LONGEST_RUN_SECONDS:
        can_halve_rows = smaller.num_rows > FEWEST_ROWS
        can_halve_tokens = smaller.max_tokens > FEWEST_TOKENS
        if not can_halve_rows and not can_halve_tokens:
            break
        if can_halve_rows and (halve_rows or not can_halve_tokens):
            smaller = with_half_the_rows(smaller)
        else:
            smaller = replace(smaller, max_tokens=smaller.max_tokens // 2)
        halve_rows = not halve_rows
    if smaller == case:
        return case
    size = f"{len(smaller.prompts)} x {smaller.group_size} rows, {smaller.max_tokens} tokens"
    return replace(smaller, name=f"{case.name} as {size}")


def with_half_the_rows(case: Case) -> Case:
    if case.group_size > 1:
        return replace(case, group_size=case.group_size // 2)
    return replace(case, prompts=case.prompts[: len(case.prompts) // 2])


def run_ours(model: Any, case: Case, seed: int) -> int:
    return sum(len(s.ids) for group in sample_case(model, case, seed).groups for s in group)


def sample_case(model: Any, case: Case, seed: int, budget: int = PLENTY) -> Generation:
    requests = [
        Request(
            prompt,
            tuple(stream_key(seed, i, g) for g in range(case.group_size)),
            tuple(case.limits[i]) if case.limits else (),
        )
        for i, prompt in enumerate(case.prompts)
    ]
    params = SamplingParams(case.max_tokens, 1.0, () if case.stop_id is None else (case.stop_id,))
    return generate(model, requests, params, budget)


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
    """How often each aten operator runs, views included; `computing`: how many of them are no
    views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.computing = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # composite operators arrive whole in inference mode: count what they do
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        self.count[str(func)] += 1
        self.computing += not func.is_view
        return func(*args, **(kwargs or {}))


def count(run: Callable[[Case], Any], case: Case) -> tuple[int, int]:
    """aten ops of one decode step (the difference between 17 and 16 new tokens), FLOPs of the whole
    generation.
    """
    case, ops = replace(case, limits=None, stop_id=None), []
    for tokens in (16, 17):
        with CountOps() as counter:
            run(replace(case, max_tokens=tokens))
        ops.append(sum(counter.count.values()))
    with FlopCounterMode(display=False) as flops:
        run(replace(case, max_tokens=32))
    return ops[1] - ops[0], flops.get_total_flops()


def counts(ours: Any, theirs: Any, case: Case) -> dict[str, float]:
    """What no noise touches: operators, FLOPs, bytes of the KV cache against one that keeps every
    row's prompt, and how full the slots are kept when 10 times as much waits as fits, of lengths
    that vary 10 times.
    """
    (our_ops, our_flops), (their_ops, their_flops) = (
        count(lambda c: run_ours(ours, c, 0), case),
        count(lambda c: run_theirs(theirs, c, 0), case),
    )
    P, G, R = max(map(len, case.prompts)), case.group_size, case.max_tokens
    same_length = replace(case, prompts=[(1,) * P] * len(case.prompts), max_tokens=R, stop_id=1)
    kv_bytes = sample_case(ours, same_length, 0).kv_bytes
    config = ours.config
    unshared = (
        2
        * 4
        * config.num_layers
        * config.num_kv_heads
        * config.head_dim
        * len(case.prompts)
        * G
        * (P + R)
    )
    limits = [[8 + (37 * (G * i + g)) % 73 for g in range(G)] for i in range(len(case.prompts))]
    rows = len(case.prompts) * G // 10
    tight = replace(case, limits=limits, stop_id=None)
    occupancy = sample_case(ours, tight, 0, budget=rows * R + (2 * -(-rows // G) + 1) * P).occupancy
    return {
        "ops": our_ops,
        "ops_ratio": our_ops / their_ops,
        "flops_ratio": our_flops / their_flops,
        "kv_ratio": kv_bytes / unshared,
        "kv_formula": (P + G * R) / (G * (P + R)),
        "occupancy": occupancy or 0.0,
    }


def products(lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> None:
    """Multiply each of the one with each of the other."""
    for left, right in itertools.product(lefts, rights):
        torch.matmul(left, right)


def roofline(model: Any, rows: int, context: int, step_s: float) -> dict[str, float]:
    """How near a decode step of `rows` rows comes to what this machine attains: its linear layers
    at this row count, each at the better of `x @ W.T` and `W @ x.T`, and the keys and values read
    at the measured bandwidth. And the same FLOPs at the speed of one large product.
    """
    of_shape: dict[tuple[int, ...], list[torch.Tensor]] = {}
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    for weight in (*matrices, model.head_weight):
        of_shape.setdefault(tuple(weight.shape), []).append(weight.detach())
    linear_s = 0.0
    flops = 0.0
    for (out, size), weights in of_shape.items():
        x = torch.randn(rows, size)
        columns = torch.randn(size, rows)
        transposed = [w.T for w in weights]
        by_rows = seconds(partial(products, [x], transposed), 5)
        by_columns = seconds(partial(products, weights, [columns]), 5)
        linear_s += min(by_rows, by_columns)
        flops += 2.0 * rows * out * size * len(weights)
    big = torch.randn(1 << 26)
    bandwidth = big.numel() * 4 / seconds(big.sum, 5)
    config = model.config
    kv_bytes = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * context
    square = torch.randn(2048, 2048)
    peak = 2 * 2048**3 / seconds(lambda: square @ square, 3)
    attainable = linear_s + kv_bytes / bandwidth
    return {
        "roofline_frac": attainable / step_s,
        "large_gemm_frac": flops / peak / step_s,
        "decode_step_s": step_s,
    }


def require_the_same_policy(case: Case, ours: Any, theirs: Any) -> None:
    """Exit where their model finds other probabilities for tokens that ours drew: what is fast must
    also be right.
    """
    few_tokens = replace(case, prompts=case.prompts[:2], max_tokens=12, limits=None, stop_id=None)
    groups = sample_case(ours, few_tokens, 0).groups
    # The last completion of each of the first two prompts.
    for prompt, group in zip(few_tokens.prompts, groups, strict=True):
        sampled = group[-1]
        ids = torch.from_numpy(sampled.ids)
        with torch.inference_mode():
            all_logits = theirs(torch.tensor([[*prompt, *ids.tolist()]])).logits[0]
        logits = all_logits[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        ours_logprobs = torch.from_numpy(sampled.full_logprobs)
        if not torch.allclose(ours_logprobs, expected, rtol=0, atol=1e-3):
            sys.exit(f"{case.name}: log-probabilities of sampled tokens differ from transformers'")


def compare(case: Case, ours: Any, theirs: Any, runs: int) -> dict[str, float]:
    """Medians in tokens a second.

    Two tokens of one row warm both up. Where all completions are equally long, one token of each is
    measured too, as the prefill.
    """
    sides = {
        "ours": lambda seed: run_ours(ours, case, seed),
        "hf": lambda seed: run_theirs(theirs, case, seed),
    }
    rows = case.num_rows
    first = replace(case, max_tokens=1, limits=None)
    few = replace(case, prompts=case.prompts[:1], group_size=1, max_tokens=2, limits=None)
    run_ours(ours, few, 0)
    run_theirs(theirs, few, 0)
    once = {
        "ours": lambda seed: run_ours(ours, first, seed),
        "hf": lambda seed: run_theirs(theirs, first, seed),
    }
    found = alternate(runs, sides, CASE_SECONDS)
    speeds = {name: statistics.median(values) for name, values in found.items()}
    row = {
        "runs": len(found["ours"]),
        "ours_tok_s": speeds["ours"],
        "hf_tok_s": speeds["hf"],
        "ratio": speeds["ours"] / speeds["hf"],
    }
    if case.limits is None and case.stop_id is None:  # as many tokens each time
        for name, values in alternate(2, once, CASE_SECONDS / 3).items():
            prefill_s = rows / statistics.median(values)
            decode_s = rows * case.max_tokens / speeds[name] - prefill_s
            row |= {
                f"{name}_prefill_s": prefill_s,
                f"{name}_decode_tok_s": rows * (case.max_tokens - 1) / decode_s,
            }
    return row


def continuous(theirs: Any, case: Case) -> dict[str, float]:
    """transformers against itself, tokens a second: `generate_batch` (a paged cache, new prompts in
    freed rows) and `generate`.
    """
    torch.set_num_threads(case.threads)
    settings = transformers.GenerationConfig(
        max_new_tokens=case.max_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=-1,
        pad_token_id=0,
    )

    def batch(seed: int) -> int:
        torch.manual_seed(seed)
        inputs = [list(prompt) for prompt in case.prompts for _ in range(case.group_size)]
        return sum(
            len(o.generated_tokens)
            for o in theirs.generate_batch(inputs, generation_config=settings).values()
        )

    speeds = alternate(
        2, {"generate": lambda seed: run_theirs(theirs, case, seed), "continuous": batch}
    )
    return {name: statistics.median(values) for name, values in speeds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="counts and the embedded cases only")
    parser.add_argument("--bars", action="store_true", help="every case (the default)")
    parser.add_argument(
        "--continuous",
        action="store_true",
        help="transformers' continuous batching against its generate, and nothing else",
    )
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(arguments)
    quiet_machine()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folders = {"embedded": resolve_model("embedded", "embedded", None)[0]}
    if not args.quick:
        folders["smollm2-135m"] = resolve_model("wheel", "smollm2-135m", None)[0]

    if args.continuous:
        every = cases(False, folders, idle_cores())
        case = next(case for case in every if case.name == "smollm2_16x1")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folders[case.model], dtype=torch.float32
        ).eval()
        return print(json.dumps(continuous(theirs, replace(case, max_tokens=32))))

    document: dict[str, Any] = {"cases": {}}
    models: dict[str, tuple[Any, Any]] = {}
    threads: dict[str, int] = {}
    for case in cases(args.quick, folders, idle_cores()):
        if case.model not in models:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                folders[case.model], dtype=torch.float32
            ).eval()
            models[case.model] = (load_model(folders[case.model]), theirs)
        torch.set_num_threads(case.threads)
        require_the_same_policy(case, *models[case.model])
        bar = f"bar {BARS[case.name]}"
        whole = case
        if case.limits is None and case.stop_id is None:
            case = fitted(whole, price_of(models[case.model][1], case))
        if case != whole:
            bar += f" of the whole {whole.name}"
        threads[case.name] = case.threads
        row = document["cases"][case.name] = compare(case, *models[case.model], args.runs)
        print(
            f"{case.name:16s} ours {row['ours_tok_s']:7.0f} tok/s  "
            f"transformers {row['hf_tok_s']:7.0f} tok/s  x{row['ratio']:.2f}  "
            f"({bar}; {case.threads} threads, {row['runs']} runs)",
            flush=True,
        )
        if "hf_prefill_s" in row:
            prefill, decode = (
                f"{row[f'ours_{what}']:.1f} against {row[f'hf_{what}']:.1f}"
                for what in ("prefill_s", "decode_tok_s")
            )
            print(f"{'':16s} prefill {prefill} s, decode {decode} tok/s")
        if case.name == "embedded_16x8":
            document |= (found := counts(*models[case.model], case))
            print(f"{'':16s} " + "  ".join(f"{name} {value:.3g}" for name, value in found.items()))
        if whole.name == "smollm2_2x16":
            rows = case.num_rows
            context = sum(map(len, case.prompts)) + rows * case.max_tokens // 2
            document |= (
                found := roofline(
                    models[case.model][0], rows, context, rows / row["ours_decode_tok_s"]
                )
            )
            print(f"{'':16s} " + "  ".join(f"{name} {value:.3g}" for name, value in found.items()))
    columns = ("ours_tok_s", "hf_tok_s", "ratio")
    record(
        RESULTS,
        columns,
        {name: [row[c] for c in columns] for name, row in document["cases"].items()},
        threads,
    )
    print(json.dumps(document))


if __name__ == "__main__":
    main()

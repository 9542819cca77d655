"""Where a training step of SmolLM2 on DDXPlus goes, and how far that is from what this machine
could do:

    OMP_NUM_THREADS=1 python -m experiments.ddxplus_smollm2.profile DATA [--steps 3]

Times the parts of a step (`train_step` with its functions wrapped), divides each part's arithmetic
by the speed of the fastest large product and its reads of weights by the measured bandwidth, counts
the operators that CUDA's way through the code would have, and predicts a GPU's times from the
planner's assumptions and from LAUNCH seconds an operator. Writes profile.json; `make report` makes
the table.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

import mar.learn.update
import mar.policy.attention
import mar.policy.model
import mar.sample.engine
import mar.sample.kv_cache
import mar.train
from experiments.bench.common import peak_bytes, quiet_machine, seconds
from experiments.bench.sampler import CountOps
from experiments.ddxplus_smollm2.run import PATIENTS, SHARED, warmed_up
from mar.policy.sources import environment, resolve_model
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.planning import BANDWIDTH, BANDWIDTH_USED, MFU, PEAK_FLOPS
from mar.run.setup import Training, build_training
from mar_kernels import reference

RESULT = Path(__file__).parent / "profile.json"
LAUNCH = 5e-6  # assumed: what a host needs to issue one operator to a GPU
Meter = Callable[[], AbstractContextManager[Callable[[], float]]]
PARTS: dict[
    str, list[tuple[Any, str]]
] = {  # part -> the functions whose time it is, none inside another of them
    "packing weights": [
        (mar.policy.model, "reorder_weight"),
        (mar.sample.engine, "reorder_weight"),
    ],
    "prefill": [(mar.sample.engine.Engine, "prefill")],
    "decoding": [(mar.sample.engine.Engine, "feed")],
    "drawing": [(mar.sample.engine.Engine, "draw")],
    "verification": [(mar.train, "judge_groups")],
    "forward": [(mar.policy.model.Decoder, "forward")],
    "backward": [(torch.Tensor, "backward")],
    "optimizer": [(mar.learn.update, "_clip_and_step")],
}
# one kernel each on CUDA (FlexAttention, Triton), where a CPU has many operators
KERNELS = [
    (owner, way)
    for owner in (mar.policy.attention._GroupAttention, reference._LinearLogprobs)
    for way in ("forward", "backward")
]


@contextmanager
def clock() -> Iterator[Callable[[], float]]:
    began = time.perf_counter()
    yield lambda: time.perf_counter() - began


@contextmanager
def computing() -> Iterator[Callable[[], float]]:
    with CountOps() as operators:
        yield lambda: operators.computing


def watch(found: dict[str, float], meter: Meter) -> None:
    """Wrap the functions of PARTS, so that `found` adds up what the meter reads in each."""

    def wrapped(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **more: Any) -> Any:
            with meter() as read:
                result = function(*args, **more)
                found[part] += read()
            return result

        return call

    for part, functions in PARTS.items():
        for owner, name in functions:
            setattr(owner, name, wrapped(getattr(owner, name), part))


def take_cuda_paths() -> None:
    """Decode with CUDA's attention from here on, and count each of KERNELS as one operator. (Casts
    to bfloat16 are not there.)
    """

    def one(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counter = _get_current_dispatch_mode()
            assert isinstance(counter, CountOps)
            before = counter.computing
            result = function(*args)
            counter.computing = before + 1
            return result

        return call

    mar.sample.kv_cache._mix_cpu = mar.sample.kv_cache._mix
    for owner, way in KERNELS:
        setattr(owner, way, staticmethod(one(getattr(owner, way))))


def work_of(
    training: Training, prompt_tokens: int, tokens: int, decode_steps: int
) -> dict[str, dict[str, float]]:
    """Part -> its floating-point operations in matrix products (attention is not counted) and the
    bytes of weights that it has to read.
    """
    model, head = training.learner.policy, training.learner.policy.head_weight.numel()
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    matrices = [[p for p in block.parameters() if p.ndim == 2] for block in model.blocks]
    trained = sum(p.numel() for block in matrices for p in block if p.requires_grad)
    first = next(i for i, block in enumerate(matrices) if any(p.requires_grad for p in block))
    passed = sum(
        p.numel() for block in matrices[first:] for p in block
    )  # gradients of what goes in, trained or not
    width = training.learner.policy.head_weight.element_size()
    return {
        "prefill": {"flops": 2.0 * blocks * prompt_tokens, "bytes": width * blocks},
        "decoding": {"flops": 2.0 * blocks * tokens, "bytes": width * blocks * decode_steps},
        "drawing": {"flops": 2.0 * head * tokens, "bytes": width * head * decode_steps},
        "forward": {
            "flops": 2.0 * (blocks * (prompt_tokens + tokens) + head * tokens),
            "bytes": width * (blocks + head),
        },
        # logits are computed again for the gradient of what goes into the head
        "backward": {
            "flops": 2.0 * ((trained + passed) * (prompt_tokens + tokens) + 2 * head * tokens),
            "bytes": width * (passed + head),
        },
    }


def products(training: Training, rows: int) -> dict[str, list[float]]:
    """Layer of a block -> FLOP/s of its product with `rows` rows, as training computes it and with
    packed weights, as sampling does.
    """
    found = {}
    for name, layer in training.learner.policy.blocks[0].named_modules():
        if isinstance(layer, mar.policy.model.Linear):
            x, weight = torch.randn(rows, layer.in_features), layer.weight.detach()
            times = [
                seconds(partial(mar.policy.model.project, x, weight, None, packed), 7)
                for packed in (None, mar.policy.model.reorder_weight(weight))
            ]
            found[name] = [2 * rows * weight.numel() / s for s in times]
    return found


def measure(data: Path, steps: int) -> dict[str, Any]:
    """Seconds of each part of the step that took the median time of `steps`, after one to warm up,
    its least seconds here, and what is held in memory.
    """
    warmed_up(data)
    display = Display("plain", 0, 0)
    display.console.quiet = True
    config = compose([*SHARED, f"data.path={data / PATIENTS}", "reward=multi_rlcr"])
    square, big = torch.randn(2048, 2048), torch.randn(1 << 26)
    packed = mar.policy.model.reorder_weight(square)
    fastest = (
        2
        * 2048**3
        / min(
            seconds(partial(mar.policy.model.project, square, square, None, w), 5)
            for w in (None, packed)
        )
    )
    bandwidth = big.numel() * 4 / seconds(big.sum, 5)
    spent: dict[str, float] = defaultdict(float)
    rows, sizes = [], []
    training = build_training(config, resolve_model("folder", "hf", config.model.path)[0], display)
    mar.train.train_step(training, 0)
    watch(spent, clock)
    with peak_bytes() as peak:
        for step in range(1, steps + 1):
            spent.clear()
            began = time.perf_counter()
            done = mar.train.train_step(training, step)
            metrics, rollouts = done.metrics, done.rollouts
            row = dict(spent) | {"step": time.perf_counter() - began}
            rows.append(row | {"rest": row["step"] - sum(spent.values())})
            prompts = {r.prompt.id: len(r.prompt.ids) for r in rollouts}
            sizes.append(
                (
                    sum(prompts.values()),
                    sum(len(r.completion.ids) for r in rollouts),
                    metrics["sampler/decode_steps"],
                )
            )
    operators: dict[str, float] = defaultdict(float)
    watch(operators, computing)
    take_cuda_paths()
    counted = mar.train.train_step(training, steps + 1).metrics["sampler/decode_steps"]
    middle = sorted(range(steps), key=lambda i: rows[i]["step"])[steps // 2]
    prompt_tokens, tokens, decode_steps = sizes[middle]
    speeds = products(training, prompt_tokens + tokens)
    peak_flops = max(fastest, *(flops for layer in speeds.values() for flops in layer))
    work = work_of(training, prompt_tokens, tokens, decode_steps)
    parts = {}
    for part in (*PARTS, "rest", "step"):
        found = {"seconds": rows[middle][part]} | (
            {"operators": int(operators[part])} if part in operators else {}
        )
        if part in work:
            w = work[part]
            found |= {"least_here": max(w["flops"] / peak_flops, w["bytes"] / bandwidth)}
            # two bytes a weight there
            found |= {
                "on_a_gpu": max(
                    w["flops"] / (PEAK_FLOPS * MFU), w["bytes"] / 2 / (BANDWIDTH * BANDWIDTH_USED)
                )
            }
        parts[part] = found
    all_of = sum(p.numel() for p in training.learner.policy.parameters())
    trained = sum(p.numel() for p in training.learner.policy.parameters() if p.requires_grad)
    c = training.learner.policy.config
    kv = 2 * 4 * c.num_layers * c.num_kv_heads * c.head_dim * (prompt_tokens + tokens)
    memory = {
        "weights": 4 * all_of,
        "packed weights": 4 * all_of,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "KV cache in use": kv,
    }
    told = {
        "threads": torch.get_num_threads(),
        "peak_flops": peak_flops,
        "bandwidth": bandwidth,
        **environment(),
    }
    shape = {
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "decode_steps": decode_steps,
        "steps": steps,
    }
    told |= {"products": speeds, "counted_decode_steps": counted}
    return {
        **told,
        **shape,
        "parts": parts,
        "memory": memory | {"rise of the peak in a step": peak[0]},
    }


def markdown() -> str:
    """Seconds of each part of a step, the least that they could take, and a GPU's by the planner's
    assumptions.
    """
    document = json.loads(RESULT.read_text(encoding="utf-8"))
    lines = [
        [
            "part",
            "seconds",
            "share",
            "least here",
            "of the roofline",
            "operators on CUDA",
            "an H100: roofline",
            "issued one by one",
        ]
    ]
    lines.append(["---"] * len(lines[0]))
    whole = document["parts"]["step"]["seconds"]
    for name, part in document["parts"].items():
        least, gpu = part.get("least_here"), part.get("on_a_gpu")
        here = [f"{least:.2f}", f"{least / part['seconds']:.0%}"] if least else ["–"] * 2
        issued = (
            [f"{part['operators']:,}", f"{1000 * LAUNCH * part['operators']:.1f} ms"]
            if part.get("operators")
            else ["–"] * 2
        )
        there = [issued[0], f"{1000 * gpu:.1f} ms" if gpu else "–", issued[1]]
        lines.append(
            [name, f"{part['seconds']:.2f}", f"{part['seconds'] / whole:.0%}", *here, *there]
        )
    held = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in document["memory"].items())
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    speeds = ", ".join(
        f"{name} {plain / 1e9:.0f} / {packed / 1e9:.0f}"
        for name, (plain, packed) in document["products"].items()
    )
    rows = document["prompt_tokens"] + document["tokens"]
    fastest = f"fastest product {document['peak_flops'] / 1e9:.0f} GFLOP/s, memory {document['bandwidth'] / 1e9:.0f} GB/s"
    return f"{table}\n\nMiB: {held}.\n\nHere: {fastest}; a block's products with {rows} rows, GFLOP/s, as training / as sampling: {speeds}."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of DDXPlus")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    quiet_machine()
    document = measure(args.data, args.steps)
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(markdown())


if __name__ == "__main__":
    main()

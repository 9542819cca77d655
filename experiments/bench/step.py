"""The training step: prompts shared against a copy of the prompt per row, and the whole RL step against TRL's GRPOTrainer.

    python experiments/bench/step.py [--quick | --bars] [--runs 3]

--quick: FLOPs and the smallest case. --bars: every case (the default); TRL's where `trl` is installed (pip install -e '.[bench]'). A random Qwen3 of
6.8M parameters, float32, one thread, lengths forced to be equal. Appends to results/step.csv; the last line of stdout is one JSON document.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.common import alternate, quiet_machine, record
from experiments.bench.rl_step import SIDES, VOCAB, policy, random_prompt
from mar.attention import pack_groups

RESULTS = Path(__file__).parent / "results" / "step.csv"
BARS = {"shared_frac": ">= 0.85", "growth_g4_g32": "<= 3.2", "trl_p512_g8": ">= 4", "trl_p512_g32": ">= 6",
        "trl_p256_g16": ">= 2.5", "memory_ratio": ">= 2"}  # fmt: skip
SHARED = [(512, 8, 64), (512, 32, 64), (256, 16, 128)]  # prompt tokens, group size, completion tokens
WHOLE = {"trl_p512_g8": (512, 8, 64), "trl_p512_g32": (512, 32, 64), "trl_p256_g16": (256, 16, 128)}


def train_step(model: Any, prompt_tokens: int, group_size: int, completion_tokens: int, shared: bool) -> float:
    """Forward and backward of one group; 1.0 for `alternate`."""
    prompt = random_prompt(prompt_tokens, 0)
    completions = [random_prompt(completion_tokens, 1 + g) for g in range(group_size)]
    packed = pack_groups([prompt], [completions]) if shared else pack_groups([prompt] * group_size, [[c] for c in completions])
    model.zero_grad()
    model(packed)[0].mean().backward()
    return 1.0


def flops(model: Any, case: tuple[int, int, int], shared: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        train_step(model, *case, shared)
    return counter.get_total_flops()


def shared_frac(model: Any, case: tuple[int, int, int], runs: int) -> dict[str, float]:
    """Per row / shared, in seconds and in FLOPs, each as a fraction of the ratio of tokens."""
    P, G, R = case
    tokens = G * (P + R) / (P + G * R)
    sides = {name: lambda _, s=name == "shared": train_step(model, *case, s) for name in ("shared", "per_row")}
    alternate(1, sides)
    speeds = {name: statistics.median(found) for name, found in alternate(runs, sides).items()}
    ratio = speeds["shared"] / speeds["per_row"]
    of_flops = flops(model, case, False) / flops(model, case, True)
    print(f"P{P} G{G} R{R}: per row / shared x{ratio:.2f}, in FLOPs x{of_flops:.2f}, in tokens x{tokens:.2f}", flush=True)
    return {"time": ratio / tokens, "flops": of_flops / tokens}


def growth(model: Any, runs: int) -> float:
    """Seconds of our training step at G=32 over those at G=4, P512 R32."""
    sides = {str(G): lambda _, G=G: train_step(model, 512, G, 32, True) for G in (4, 32)}
    alternate(1, sides)
    speeds = alternate(runs, sides)
    return statistics.median(speeds["4"]) / statistics.median(speeds["32"])


def whole_step(case: tuple[int, int, int], runs: int) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes of a whole RL step of either side, each in its own process."""
    found = {}
    for side in SIDES:
        command = [sys.executable, "-m", "experiments.bench.rl_step", side, *map(str, (*case, runs))]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="FLOPs and the smallest case")
    parser.add_argument("--bars", action="store_true", help="every case (the default)")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quiet_machine()
    model = policy()
    cases = SHARED[:1] if args.quick else SHARED
    fractions = [shared_frac(model, case, args.runs) for case in cases]
    found = {"shared_frac": min(f["time"] for f in fractions), "flops_frac": min(f["flops"] for f in fractions)}
    if not args.quick:
        found["growth_g4_g32"] = growth(model, args.runs)
    trl = importlib.util.find_spec("trl") is not None
    print("whole steps against TRL: " + ("" if trl else "left out, trl is not installed: pip install -e '.[bench]'"))
    for name, case in WHOLE.items() if trl else ():
        if args.quick and name != "trl_p512_g8":
            continue
        sides = whole_step((64, 4, 8) if args.quick else case, args.runs)
        found[name if not args.quick else "trl_small"] = sides["trl"]["seconds"] / sides["ours"]["seconds"]
        ratio = sides["trl"]["bytes"] / sides["ours"]["bytes"]
        found["memory_ratio"] = min(ratio, found.get("memory_ratio", ratio))
    for name, value in found.items():
        print(f"{name:16s} {value:8.3g}  " + (f"bar {BARS[name]}" if name in BARS else ""))
    record(RESULTS, ["value"], {name: [value] for name, value in found.items()})
    print(json.dumps({"step": found, "parameters": sum(p.numel() for p in model.parameters()), "vocab": VOCAB}))


if __name__ == "__main__":
    main()

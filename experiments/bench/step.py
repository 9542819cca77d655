"""The training step: prompts shared against a copy of the prompt per row, and the whole RL step
against TRL's GRPOTrainer.

    python experiments/bench/step.py [--quick | --bars] [--runs 2]

--quick: FLOPs and the smallest case. --bars: every case (the default); TRL's where `trl` is
installed (pip install -e '.[bench]'). A random Qwen3 of 6.8M parameters, and SmolLM2-135M; float32,
one thread, lengths forced to be equal. TRL's resolved configuration goes to
results/trl_config.json. Appends to results/step.csv; the last line of stdout is one JSON document.
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
from mar.policy.packing import pack_groups

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "step.csv"
TRL_CONFIG = RESULTS.with_name("trl_config.json")
BARS = {
    "shared_frac": ">= 0.85",
    "growth_g4_g32": "<= 3.2",
    "trl_p512_g8": ">= 4",
    "trl_p512_g32": ">= 6",
    "trl_p256_g16": ">= 2.5",
    "trl_smollm2": ">= 3",
    "memory_ratio": ">= 2",
}
# Prompt tokens, group size, completion tokens.
SHARED = [(512, 8, 64), (512, 32, 64), (256, 16, 128)]
WHOLE = {
    "trl_p512_g8": ("random", 512, 8, 64),
    "trl_p512_g32": ("random", 512, 32, 64),
    "trl_p256_g16": ("random", 256, 16, 128),
    "trl_smollm2": ("smollm2", 256, 8, 64),
}
# Half a minute a step: one is timed, after one that warms up.
SLOW = ("trl_p512_g32", "trl_smollm2")


def train_step(
    model: Any, prompt_tokens: int, group_size: int, completion_tokens: int, shared: bool
) -> float:
    """Forward and backward of one group; 1.0 for `alternate`."""
    prompt = random_prompt(prompt_tokens, 0)
    completions = [random_prompt(completion_tokens, 1 + g) for g in range(group_size)]
    if shared:
        packed = pack_groups([prompt], [completions])
    else:
        packed = pack_groups([prompt] * group_size, [[ids] for ids in completions])
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
    sides = {
        "shared": lambda _: train_step(model, *case, True),
        "per_row": lambda _: train_step(model, *case, False),
    }
    alternate(1, sides)
    speeds = {name: statistics.median(found) for name, found in alternate(runs, sides).items()}
    ratio = speeds["shared"] / speeds["per_row"]
    of_flops = flops(model, case, False) / flops(model, case, True)
    print(
        f"P{P} G{G} R{R}: per row / shared x{ratio:.2f}, in FLOPs x{of_flops:.2f}, "
        f"in tokens x{tokens:.2f}",
        flush=True,
    )
    return {"time": ratio / tokens, "flops": of_flops / tokens}


def growth(model: Any, runs: int) -> float:
    """Seconds of our training step at G=32 over those at G=4, P512 R32."""
    sides = {str(G): lambda _, G=G: train_step(model, 512, G, 32, True) for G in (4, 32)}
    alternate(1, sides)
    speeds = alternate(runs, sides)
    return statistics.median(speeds["4"]) / statistics.median(speeds["32"])


def whole_step(case: tuple[str, int, int, int], runs: int) -> dict[str, list[dict[str, float]]]:
    """What `rl_step` says of each step of either side, each in its own process, one step in turn."""
    children = {}
    found: dict[str, list[dict[str, float]]] = {}
    numbers = [str(number) for number in (*case, runs)]
    for side in SIDES:
        command = [sys.executable, "-m", "experiments.bench.rl_step", side, *numbers]
        children[side] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        ready = answer(children[side])["ready"]
        if side == "trl":
            TRL_CONFIG.write_text(json.dumps(ready, indent=1, sort_keys=True) + "\n")
    for _ in range(runs):
        for side, child in children.items():
            assert child.stdin is not None
            print(file=child.stdin, flush=True)
            found.setdefault(side, []).append(answer(child))
    for child in children.values():
        child.communicate()
    return found


def answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of a child that is a JSON document; libraries print too."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith('{"'):
            return json.loads(line)
    raise SystemExit(f"a side of the comparison stopped with code {child.wait()}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="FLOPs and the smallest case")
    parser.add_argument("--bars", action="store_true", help="every case (the default)")
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quiet_machine()
    model = policy()
    cases = SHARED[:1] if args.quick else SHARED
    fractions = [shared_frac(model, case, args.runs) for case in cases]
    found = {
        "shared_frac": min(f["time"] for f in fractions),
        "flops_frac": min(f["flops"] for f in fractions),
    }
    if not args.quick:
        found["growth_g4_g32"] = growth(model, args.runs)
    if args.quick:
        print("whole steps against TRL: not with --quick")
    elif importlib.util.find_spec("trl") is None:
        print("whole steps against TRL: left out, trl is not installed: pip install -e '.[bench]'")
    else:
        print("whole steps against TRL: ")
        found |= against_trl(args.runs)
    for name, value in found.items():
        bar = f"bar {BARS[name]}" if name in BARS else ""
        print(f"{name:16s} {value:8.3g}  {bar}")
    record(RESULTS, ["value"], {name: [value] for name, value in found.items()})
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"step": found, "parameters": parameters, "vocab": VOCAB}))


def against_trl(runs: int) -> dict[str, float]:
    """TRL's seconds over ours of each case, and the least of their ratios of memory."""
    found: dict[str, float] = {}
    for name, case in WHOLE.items():
        sides = whole_step(case, 1 if name in SLOW else runs)
        medians = {}
        for side, steps in sides.items():
            medians[side] = {key: statistics.median(s[key] for s in steps) for key in steps[0]}
        ours = medians["ours"]
        theirs = medians["trl"]
        found[name] = theirs["seconds"] / ours["seconds"]
        memory = theirs["bytes"] / ours["bytes"]
        found["memory_ratio"] = min(memory, found.get("memory_ratio", memory))
        shown = []
        for side, row in medians.items():
            shown.append(f"{side} {row['seconds']:.2f} s, {row['bytes'] / 2**20:,.0f} MiB")
        print(f"{name}: {'; '.join(shown)}", flush=True)
    return found


if __name__ == "__main__":
    main()

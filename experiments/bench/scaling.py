"""Weak scaling on one machine: the same training step on 1 and on 2 one-thread ranks, each with as
many prompts of its own.

    python experiments/bench/scaling.py [--ranks 1,2] [--steps 6]

Shows seconds of a step by part. Communication is what the collectives of rank 0 took, waiting for
the other ranks included, measured in steps of their own under the profiler; it is part of the other
columns. The last line of stdout is one JSON document; results/scaling.csv has the history.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.common import quiet_machine, record
from mar.config import Config
from mar.policy.distributed import join
from mar.policy.sources import resolve_model
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import announce, build_training
from mar.train import train_step

WORDS = (
    "+experiment=clinic eval.num_items=2 model.trainable= model.lora_rank=0 model.lr=1e-4".split()
)
PROMPTS = 8  # of each rank
PARTS = ("sample_s", "verify_s", "update_s")


def worker(steps: int) -> None:
    """One rank: warm up, time some steps, profile two more; rank 0 prints."""
    display, size = Display("plain", 0, 0), int(os.environ.get("WORLD_SIZE", 1))
    display.console.quiet = True
    config: Config = announce(
        compose([*WORDS, f"algo.prompts_per_step={PROMPTS * size}", f"train.steps={steps + 4}"]),
        display,
    )
    world = join("cpu", config.scale)
    training = build_training(
        config, resolve_model("embedded", "embedded", None)[0], display, world
    )
    rows = [train_step(training, step).metrics for step in range(steps + 2)][2:]
    with torch.profiler.profile() as profile:
        for step in (steps + 2, steps + 3):
            train_step(training, step)
    talked = (
        sum(event.cpu_time_total for event in profile.events() if event.name.startswith("gloo:"))
        / 2e6
    )
    if world.leads:
        told = {part: statistics.median(row[f"perf/{part}"] for row in rows) for part in PARTS}
        tokens_per_s = statistics.median(row["perf/tokens_per_s"] for row in rows)
        print(
            json.dumps(
                told
                | {
                    "step_s": sum(told.values()),
                    "communication_s": talked,
                    "tokens_per_s": tokens_per_s,
                }
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.steps)
        return
    quiet_machine()
    found = {}
    for ranks in map(int, args.ranks.split(",")):
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            if ranks > 1
            else []
        )
        command = [sys.executable, *launcher, __file__, "--worker", "--steps", str(args.steps)]
        done = subprocess.run(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[ranks] = json.loads(done.stdout.splitlines()[-1])
    columns = [*PARTS, "communication_s", "step_s", "tokens_per_s"]
    print("ranks  " + "  ".join(f"{name:>15}" for name in columns))
    for ranks, row in found.items():
        print(f"{ranks:5}  " + "  ".join(f"{row[name]:15.4g}" for name in columns))
    few, many = min(found), max(found)
    document = {"ranks": found, "efficiency": found[few]["step_s"] / found[many]["step_s"]}
    record(
        Path(__file__).parent / "results/scaling.csv",
        columns,
        {f"{n}_ranks": [row[c] for c in columns] for n, row in found.items()},
        dict.fromkeys((f"{n}_ranks" for n in found), 1),
    )
    print(json.dumps(document))


if __name__ == "__main__":
    main()

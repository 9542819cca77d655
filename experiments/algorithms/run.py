"""One setting and seed of the comparison of algorithms on clinic, to a committed log:  python experiments/algorithms/run.py grpo 0

Where its log is there, it is written over: `git diff` shows what came out otherwise. Without a seed: every seed, without a setting: every setting;
what has a log already is passed over. A run that was cut off goes on. `--part 1/2` and `2/2` share
the work between two processes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from mar.files import read_jsonl
from mar.policy.sources import environment

HERE = Path(__file__).parent
RUNS, LOGS = Path("runs/algorithms"), HERE / "logs"
# one reward and one learning rate for all, so that the estimator alone differs
SHARED = [
    "+experiment=clinic",
    "model.lr=0.1",
    "train.steps=140",
    "eval.every=35",
    "eval.num_items=1000",
    "logger.console=plain",
]
SETTINGS = {
    "rloo, to_go": (["algo=rloo", "algo.credit=to_go"], 5),
    "rloo, set": (["algo=rloo"], 5),
    "grpo": (["algo=grpo"], 5),
    "reinforce": (["algo=reinforce"], 3),
    "own": (["algo=own", "reward.brier_weight=1"], 3),
    **{
        name: ([f"algo={name}"], 1)
        for name in ("dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp", "ppo")
    },
    "ppo, rate .01": (
        ["algo=ppo", "model.lr=0.01"],
        1,
    ),  # eight updates a batch, where all others but gspo have one
    "paper": (
        ["algo=paper", "algo.group_size=8", "algo.prompts_per_step=16", "algo.temperature=1"],
        1,
    ),
}
CURVES = (
    "train/coverage@3",
    "train/ece",
    "policy/entropy",
    "reward/total",
    "adv/zero_group_frac",
    "optim/grad_norm",
)


def log_of(setting: str, seed: int) -> Path:
    return LOGS / f"{setting.replace(', ', '_').replace(' ', '_')}_seed{seed}.json"


def one(setting: str, seed: int, again: bool) -> None:
    """Train with one setting and seed; where its log is there, only if it is to be made again."""
    if not again and log_of(setting, seed).exists():
        return
    words = [
        *SHARED,
        f"name={log_of(setting, 0).stem}",
        f"seed={seed}",
        f"out={RUNS}",
        *SETTINGS[setting][0],
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mar.train", *words], check=False, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"mar.train {' '.join(words)} ended with {done.returncode}")
    end = json.loads(done.stdout.splitlines()[-1])
    history = json.loads((Path(end["run_dir"]) / "eval.json").read_text())["history"]
    rows, _ = read_jsonl(Path(end["run_dir"]) / "metrics.jsonl")
    told = {
        "setting": setting,
        "seed": seed,
        "words": words,
        **environment(),
        **end,
        "history": history,
    }
    LOGS.mkdir(exist_ok=True)
    log_of(setting, seed).write_text(
        json.dumps({**told, "curves": {name: [row.get(name) for row in rows] for name in CURVES}})
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", nargs="?", choices=[*SETTINGS])
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument("--part", default="1/1")
    args = parser.parse_args()
    mine, parts = (int(number) for number in args.part.split("/"))
    chosen = [args.setting] if args.setting else [*SETTINGS]
    jobs = [
        (name, seed)
        for seed in range(5)
        for name in chosen
        if (seed < SETTINGS[name][1] if args.seed is None else seed == args.seed)
    ]
    for job in jobs[mine - 1 :: parts]:
        one(*job, again=bool(args.setting) and args.seed is not None)


if __name__ == "__main__":
    main()

"""One setting and seed of the comparison of algorithms on clinic, to a committed log.

    python experiments/algorithms/run.py grpo 0

trains that setting anew and overwrites its log: `git diff` shows what changed. Without a seed:
every seed; without a setting: every setting; logs that exist are then kept. A run that was
interrupted goes on. `--part 1/2` and `2/2` share the work between two processes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.common.commands import share_of, write_log
from mar.files import read_jsonl
from mar.policy.sources import environment

HERE = Path(__file__).parent
RUNS = Path("runs/algorithms")
LOGS = HERE / "logs"
# One reward and one learning rate for all, so that only the estimator differs.
SHARED = [
    "+experiment=clinic",
    "algo.entropy_coef=0",
    "model.lr=0.1",
    "train.steps=140",
    "eval.every=35",
    "eval.num_items=1000",
    "logger.console=plain",
]
# Setting -> its words, and how many seeds it has.
SETTINGS = {
    "rloo, to_go": (["algo=rloo", "algo.credit=to_go"], 5),
    "rloo, set": (["algo=rloo"], 5),
    "grpo": (["algo=grpo"], 5),
    "reinforce": (["algo=reinforce"], 3),
    "own": (["algo=own", "reward.brier_weight=1"], 3),
    "dr_grpo": (["algo=dr_grpo"], 1),
    "dapo": (["algo=dapo"], 1),
    "gspo": (["algo=gspo"], 1),
    "cispo": (["algo=cispo"], 1),
    "reinforce_pp": (["algo=reinforce_pp"], 1),
    "ppo": (["algo=ppo"], 1),
    # Eight updates a batch, where all others but gspo have one.
    "ppo, rate .01": (["algo=ppo", "model.lr=0.01"], 1),
    "paper": (
        ["algo=paper", "algo.group_size=8", "algo.prompts_per_step=16", "algo.temperature=1"],
        1,
    ),
}
MOST_SEEDS = 5
CURVES = (
    "train/coverage@3",
    "train/ece",
    "policy/entropy",
    "reward/total",
    "adv/zero_group_frac",
    "optim/grad_norm",
)


def log_of(setting: str, seed: int) -> Path:
    name = setting.replace(", ", "_").replace(" ", "_")
    return LOGS / f"{name}_seed{seed}.json"


def one(setting: str, seed: int, again: bool) -> None:
    """Make the log of one setting and seed; one that exists only if it is to be made again."""
    log = log_of(setting, seed)
    if log.exists() and not again:
        return
    setting_words, _ = SETTINGS[setting]
    name = log_of(setting, 0).stem
    words = [*SHARED, f"name={name}", f"seed={seed}", f"out={RUNS}", *setting_words]
    command = [sys.executable, "-m", "mar.train", *words]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"mar.train {' '.join(words)} ended with {done.returncode}")
    end = json.loads(done.stdout.splitlines()[-1])
    run_dir = Path(end["run_dir"])
    rows, _ = read_jsonl(run_dir / "metrics.jsonl")
    document = {
        "setting": setting,
        "seed": seed,
        "words": words,
        **environment(),
        **end,
        "history": json.loads((run_dir / "eval.json").read_text())["history"],
        "curves": {curve: [row.get(curve) for row in rows] for curve in CURVES},
    }
    write_log(log, document)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", nargs="?", choices=[*SETTINGS])
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument("--part", default="1/1")
    args = parser.parse_args()
    settings = [args.setting] if args.setting else [*SETTINGS]
    jobs = []
    for seed in range(MOST_SEEDS) if args.seed is None else [args.seed]:
        for setting in settings:
            _, num_seeds = SETTINGS[setting]
            if args.seed is not None or seed < num_seeds:
                jobs.append((setting, seed))
    again = bool(args.setting) and args.seed is not None
    for setting, seed in share_of(jobs, args.part):
        one(setting, seed, again)


if __name__ == "__main__":
    main()

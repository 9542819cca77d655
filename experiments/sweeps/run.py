"""One setting and seed of a sweep on clinic, to a committed log.

    python -m experiments.sweeps.run k_sweep "K = 4" 0

trains and measures that setting anew and overwrites its log: `git diff` shows what changed.
SWEEPS says which settings each sweep has. Without a seed: every seed; without a setting: all of
them; without a sweep: every sweep; logs that exist are then kept. A run that was interrupted goes
on. `--part 1/2` and `2/2` share the work between two processes. Logs: experiments/<sweep>/logs/.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.commands import (
    confidence_sums,
    kept_of_arm,
    read_evaluation,
    run_module,
    share_of,
    train_unless_finished,
    write_log,
)
from mar.files import read_jsonl, stable_hash
from mar.policy.sources import environment
from mar.tasks import clinic

EXPERIMENTS = Path(__file__).parents[1]
RUNS = Path("runs/sweeps")
# The patients with several right answers.
VISITS = RUNS / "visits6.jsonl"
SEEDS = 3
# Held-out patients, and answers of each.
ITEMS = 500
ANSWERS = 12
CLINIC = [
    "+experiment=clinic",
    "algo.entropy_coef=0",
    "train.steps=140",
    "reward.brier_weight=3",
    f"eval.num_items={ITEMS}",
]
MANY = [
    "+experiment=jsonl",
    "model=embedded",
    f"data.path={VISITS}",
    "algo=own",
    "train.steps=140",
    "reward.brier_weight=3",
    f"eval.num_items={ITEMS}",
    "model.lr=0.05",
    # A breach of the sum rule costs 1, which is more than an honest set would gain by it.
    "reward.gate=false",
    "reward.format_weight=1",
]
THINKING = ["model.thinking=true", "model.max_completion_tokens=96"]
# What the policy of three answers is asked for, too.
SIZES = [f"K={k}" for k in (1, 2, 4, 5, 6)]
# Sweep -> setting -> words.
SWEEPS: dict[str, dict[str, list[str]]] = {
    # With credit `own` a slot is paid y - weight/K (q - y)^2, so the weight grows with K.
    "k_sweep": {
        f"K = {k}": [*CLINIC, f"reward.num_answers={k}", f"reward.brier_weight={k}"]
        for k in (2, 3, 4, 5)
    },
    # Weight 3 is K = 3 of the first sweep.
    "brier_weight": {f"weight {w}": [*CLINIC, f"reward.brier_weight={w}"] for w in (0, 1, 9)},
    "sum_rule": {
        "sum rule": [*MANY, "reward.sum_rule=true"],
        "none": MANY,
        "<other>": [*MANY, "reward.other=true"],
        "sum rule, gated": [*MANY, "reward.sum_rule=true", "reward.gate=true"],
    },
    "thinking": {
        "multi_rlcr": [*CLINIC, *THINKING],
        "rlcr_single": [*CLINIC, "reward=rlcr_single", "reward.brier_weight=1", *THINKING],
    },
}


def write_visits(file: Path, num: int = 6000, problems: int = 6) -> None:
    """Clinic's patients with several right answers at once.

    The right answers are the different conditions of `problems` independent draws from the
    posterior p, so condition c is right with probability 1 - (1 - p_c)^problems, and these
    probabilities add up to more than 1.
    """
    rows = []
    for example in clinic.load("train", num, seed=1_000):
        rng = np.random.default_rng(stable_hash(example.id) % 2**32)
        posterior = np.array([gold.probability for gold in example.golds], dtype=np.float64)
        draws = rng.choice(len(example.golds), size=problems, p=posterior)
        golds = []
        for i in sorted(set(draws.tolist())):
            gold = example.golds[i]
            golds.append({"name": gold.name, "aliases": list(gold.aliases)})
        rows.append(
            {"question": example.question, "golds": golds, "id": example.id, "truth": "uniform"}
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may write it at once.
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unfinished.rename(file)


def by_slot(folder: Path) -> dict[str, Any]:
    """For each slot of the policy's sets its mean confidence and how often it was right.

    `above_1`: the share of sets whose confidences add up to more than 1. Sets that do not follow
    the form are left out.
    """
    confidences = []
    hits = []
    items, _ = read_jsonl(folder / "eval_items.jsonl")
    for item in items:
        if item.get("arm") != "policy":
            continue
        for answer_set in item["sets"]:
            if answer_set["reason"] is None:
                # Behind the answers' confidences there may be the one of <other>.
                num_answers = len(answer_set["answers"])
                confidences.append(answer_set["confidences"][:num_answers])
                hits.append(answer_set["hits"])
    q = np.array(confidences, dtype=float)
    y = np.array(hits, dtype=float)
    return {
        "confidence": q.mean(0).tolist(),
        "right": y.mean(0).tolist(),
        "above_1": float(np.mean(q.sum(1) > 1 + 1e-6)),
    }


def name_of(setting: str) -> str:
    """A setting as part of a file name."""
    return "".join(c for c in setting if c.isalnum() or c == "_")


def log_of(sweep: str, setting: str, seed: int) -> Path:
    return EXPERIMENTS / sweep / "logs" / f"{name_of(setting)}_seed{seed}.json"


def one(sweep: str, setting: str, seed: int, again: bool) -> None:
    """Make the log of one setting and seed; one that exists only if it is to be made again."""
    log = log_of(sweep, setting, seed)
    if log.exists() and not again:
        return
    if sweep == "sum_rule" and not VISITS.exists():
        write_visits(VISITS)
    name = name_of(setting)
    words = [*SWEEPS[sweep][setting], f"name={name}", f"seed={seed}", f"out={RUNS / sweep}"]
    folder = RUNS / sweep / name / f"seed{seed}"
    train_s = train_unless_finished(folder, *words, again=log.exists())
    # The policy that was trained for three answers is asked for other numbers, too.
    sizes = SIZES if (sweep, setting) == ("k_sweep", "K = 3") else []
    evaluate_s = run_module(
        "mar.evaluate",
        str(folder),
        f"k={ANSWERS}",
        "num_answers=1..6" if sizes else "num_answers=",
        "arms=" + ",".join(["policy", *sizes]),
    )
    evaluation = read_evaluation(folder)
    arms = evaluation["arms"]
    document = {
        "setting": setting,
        "seed": seed,
        "words": words,
        **environment(),
        "num_items": evaluation["num_items"],
        "train_s": train_s,
        "evaluate_s": evaluate_s,
        "bars": evaluation.get("bars"),
        **kept_of_arm(arms["policy"]),
        "slots": by_slot(folder),
        "sums": confidence_sums(folder),
    }
    if sizes:
        document["sizes"] = {size: kept_of_arm(arms[size]) for size in sizes}
    write_log(log, document)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", nargs="?", choices=[*SWEEPS])
    parser.add_argument("setting", nargs="?")
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument("--part", default="1/1")
    args = parser.parse_args()
    seeds = range(SEEDS) if args.seed is None else [args.seed]
    sweeps = [args.sweep] if args.sweep else [*SWEEPS]
    jobs = []
    for seed in seeds:
        for sweep in sweeps:
            for setting in SWEEPS[sweep]:
                if args.setting in (None, setting):
                    jobs.append((sweep, setting, seed))
    if not jobs:
        settings = ", ".join(SWEEPS[args.sweep])
        parser.error(f"{args.sweep} has no setting {args.setting!r}, only {settings}")
    again = bool(args.setting) and args.seed is not None
    for sweep, setting, seed in share_of(jobs, args.part):
        one(sweep, setting, seed, again)


if __name__ == "__main__":
    main()

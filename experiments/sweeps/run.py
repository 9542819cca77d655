"""One setting and seed of a sweep on clinic, to a committed log:  python -m experiments.sweeps.run k_sweep "K = 4" 0

SWEEPS says which settings each sweep has. Where its log is there, it is trained and measured anew
and the log written over: `git diff` shows what came out otherwise. Without a seed: every seed, without a setting: all of them, seed
after seed; without a sweep: every sweep; what has a log already is passed over. A run that was cut off goes on. `--part 1/2` and `2/2` share the work
between two processes. Logs: experiments/<sweep>/logs/.
"""

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claims.run import command, kept, trained
from mar.files import read_jsonl, stable_hash
from mar.policy.sources import environment
from mar.tasks import clinic

EXPERIMENTS, RUNS = Path(__file__).parents[1], Path("runs/sweeps")
VISITS = RUNS / "visits6.jsonl"  # the multi-label variant
SEEDS, ITEMS, ANSWERS, WINDOW = 3, 500, 12, 20
CLINIC = [
    "+experiment=clinic",
    "train.steps=140",
    "reward.brier_weight=3",
    f"eval.num_items={ITEMS}",
]
MANY = [
    "+experiment=jsonl",
    f"data.path={VISITS}",
    "algo=own",
    "train.steps=140",
    "reward.brier_weight=3",
    f"eval.num_items={ITEMS}",
]
MANY += [
    "model.lr=0.05",
    "reward.gate=false",
    "reward.format_weight=1",
]  # a breach costs 1: more than obeying does
SIZES = [f"K={k}" for k in (1, 2, 4, 5, 6)]  # what the policy of three answers is asked for, too
SWEEPS: dict[str, dict[str, list[str]]] = {  # sweep -> setting -> words
    # 3 is K = 3 of the first sweep; with `own` a slot is paid y - weight/K (q - y)^2, so the weight grows with K
    "k_sweep": {
        f"K = {k}": [*CLINIC, f"reward.num_answers={k}", f"reward.brier_weight={k}"]
        for k in (2, 3, 4, 5)
    },
    "brier_weight": {f"weight {w}": [*CLINIC, f"reward.brier_weight={w}"] for w in (0, 1, 9)},
    "sum_rule": {
        "sum rule": [*MANY, "reward.sum_rule=true"],
        "none": MANY,
        "<other>": [*MANY, "reward.other=true"],
        "sum rule, gated": [*MANY, "reward.sum_rule=true", "reward.gate=true"],
    },
    "thinking": {
        "multi_rlcr": [*CLINIC, "model.thinking=true", "model.max_completion_tokens=96"],
        "rlcr_single": [
            *CLINIC,
            "reward=rlcr_single",
            "reward.brier_weight=1",
            "model.thinking=true",
            "model.max_completion_tokens=96",
        ],
    },
}


def write_visits(file: Path, num: int = 6000, problems: int = 6) -> None:
    """Clinic's patients with several right answers at once: the different conditions of `problems` independent draws from the posterior, so that
    condition c is right with probability 1 - (1 - p_c)^problems and those of a patient's conditions add up to more than 1."""
    rows = []
    for example in clinic.load("train", num, seed=1_000):
        rng = np.random.default_rng(stable_hash(example.id) % 2**32)
        drawn = sorted(
            set(
                rng.choice(
                    len(example.golds),
                    size=problems,
                    p=[gold.probability for gold in example.golds],
                ).tolist()
            )
        )
        golds = [
            {"name": example.golds[i].name, "aliases": list(example.golds[i].aliases)}
            for i in drawn
        ]
        rows.append(
            {"question": example.question, "golds": golds, "id": example.id, "truth": "uniform"}
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.getpid()}")  # two processes may write it at once
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.rename(file)


def by_slot(folder: Path) -> dict[str, Any]:
    """Of the policy's sets, for each slot: the mean confidence, how often it was right, and how often the confidences add up to more than 1."""
    rows = [row for row in read_jsonl(folder / "eval_items.jsonl")[0] if row.get("arm") == "policy"]
    sets = [s for row in rows for s in row["sets"] if s["reason"] is None]
    q = np.array([s["confidences"][: len(s["answers"])] for s in sets], dtype=float)
    y = np.array([s["hits"] for s in sets], dtype=float)
    return {
        "confidence": q.mean(0).tolist(),
        "right": y.mean(0).tolist(),
        "above_1": float(np.mean(q.sum(1) > 1 + 1e-6)),
    }


def by_steps(folder: Path) -> list[float | None]:
    """Of the training completions of every WINDOW steps: the mean of what their confidences add up to, None where not one has the form."""
    sums: dict[int, list[float]] = defaultdict(list)
    for row in read_jsonl(folder / "completions.jsonl")[0]:
        said = row["confidences"][: len(row["answers"])]
        if (
            row["stage"] == "train" and row["reason"] is None and said and None not in said
        ):  # a form may have none
            sums[(row["step"] - 1) // WINDOW].append(sum(said))
    return [
        float(np.mean(sums[window])) if window in sums else None
        for window in range(max(sums, default=-1) + 1)
    ]


def log_of(sweep: str, setting: str, seed: int) -> Path:
    name = "".join(c for c in setting if c.isalnum() or c == "_")
    return EXPERIMENTS / sweep / "logs" / f"{name}_seed{seed}.json"


def one(sweep: str, setting: str, seed: int, again: bool) -> None:
    """Train with one setting and seed and measure it on held-out patients; where its log is there, only if it is to be made again."""
    log = log_of(sweep, setting, seed)
    if log.exists() and not again:
        return
    if sweep == "sum_rule" and not VISITS.exists():
        write_visits(VISITS)
    words = [
        *SWEEPS[sweep][setting],
        f"name={log_of(sweep, setting, 0).stem[:-6]}",
        f"seed={seed}",
        f"out={RUNS / sweep}",
    ]
    folder = RUNS / sweep / log.stem.rpartition("_")[0] / f"seed{seed}"
    train_s = trained(folder, *words, again=log.exists())
    other_sizes = (sweep, setting) == ("k_sweep", "K = 3")
    measured = [f"k={ANSWERS}", "num_answers=1..6" if other_sizes else "num_answers="]
    evaluate_s = command(
        "mar.evaluate",
        str(folder),
        *measured,
        "arms=" + ",".join(["policy", *(SIZES if other_sizes else [])]),
    )
    document = json.loads((folder / "evaluation.json").read_text())
    told = {
        "setting": setting,
        "seed": seed,
        "words": words,
        **environment(),
        "num_items": document["num_items"],
    }
    told |= {
        "train_s": train_s,
        "evaluate_s": evaluate_s,
        "bars": document.get("bars"),
        **kept(document["arms"]["policy"]),
    }
    told |= {"slots": by_slot(folder), "sums": by_steps(folder)}
    if other_sizes:
        told["sizes"] = {name: kept(document["arms"][name]) for name in SIZES}
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(json.dumps(told) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", nargs="?", choices=[*SWEEPS])
    parser.add_argument("setting", nargs="?")
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument("--part", default="1/1")
    args = parser.parse_args()
    mine, parts = (int(number) for number in args.part.split("/"))
    seeds = range(SEEDS) if args.seed is None else [args.seed]
    sweeps = [args.sweep] if args.sweep else [*SWEEPS]
    jobs = [
        (sweep, setting, seed)
        for seed in seeds
        for sweep in sweeps
        for setting in SWEEPS[sweep]
        if args.setting in (None, setting)
    ]
    if not jobs:
        parser.error(
            f"{args.sweep} has no setting {args.setting!r}, only {', '.join(SWEEPS[args.sweep])}"
        )
    for job in jobs[mine - 1 :: parts]:
        one(*job, again=bool(args.setting) and args.seed is not None)


if __name__ == "__main__":
    main()

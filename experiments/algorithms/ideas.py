"""One later idea and seed of the comparison on clinic, to a committed log.

    python experiments/algorithms/ideas.py "simplex Brier" 0

trains and measures that setting anew and overwrites its log: `git diff` shows what changed. Without
a seed: every seed; without a setting: every setting; logs that exist are then kept. A run that was
interrupted goes on. All settings of a seed come before the next seed.

A setting is `mar.train` with the words below, then `mar.evaluate` with 30 answers a patient. Logs:
experiments/algorithms/logs/ideas/.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.common.commands import (
    kept_of_arm,
    read_evaluation,
    run_module,
    train_unless_finished,
    write_log,
)
from mar.files import read_jsonl
from mar.policy.sources import environment

HERE = Path(__file__).parent
RUNS = Path("runs/ideas")
LOGS = HERE / "logs" / "ideas"
SEEDS = 3
# Held-out patients, and answers of each.
ITEMS = 300
ANSWERS = 30
# The main job with half of its patients a step, on one thread.
SHARED = [
    "+experiment=clinic",
    "algo.entropy_coef=0",
    "train.steps=200",
    "algo.prompts_per_step=8",
    f"eval.num_items={ITEMS}",
    "model.threads=1",
]
# What `<other>` decides, as the scores of the whole set, must reach the confidences before it. `own`
# would pay it to `<other>` alone.
TO_GO = ["algo=reinforce", "reward.other=true"]
# Answers are paid for answers, confidences and `<other>` for confidences.
DECOUPLED = ["algo.credit=decoupled", "reward.other=true"]
# In place of an error of each slot, one score of the whole set.
SIMPLEX = ["reward.brier_weight=0", "reward.terms.simplex_brier=1"]
SPHERICAL = ["reward.brier_weight=0", "reward.terms.spherical=1"]
# Without a lag, and with one update a step, all ratios are 1.
LAG = ["algo.lag=8"]
# Only thoughts can be made shorter here: the answers of a form take what they take.
THINKING = ["model.thinking=true"]
# Rewards of 0 and 1.
SINGLE = [
    "reward=rlvr_single",
    "reward.format_weight=0",
    "algo.credit=set",
    "algo.baseline=mean",
]
# Setting -> its words, in the order in which they are run.
SETTINGS = {
    "own": [],
    "to_go": [*TO_GO, "reward.brier_weight=3"],
    "simplex Brier": [*TO_GO, *SIMPLEX],
    "single": SINGLE,
    "single, batch exploration": [*SINGLE, "reward.terms.batch_exploration=1"],
    "single, MaxRL": [*SINGLE, "algo.scale_by=group_mean"],
    "decoupled": DECOUPLED,
    "decoupled, simplex Brier": [*DECOUPLED, *SIMPLEX],
    "decoupled, Brier and simplex": [*DECOUPLED, "reward.terms.simplex_brier=1"],
    "decoupled, spherical": [*DECOUPLED, *SPHERICAL],
    "DCPO": [
        "algo.credit=decoupled",
        "algo.scale_by=term_std",
        "algo.baseline=leave_one_out",
    ],
    "GDPO": ["algo=gdpo"],
    "lag": LAG,
    "lag, masked": [*LAG, "algo.importance=masked"],
    "lag, DPPO": [*LAG, "algo.loss=dppo"],
    "thinking": THINKING,
    "thinking, length": [*THINKING, "reward.terms.length=1"],
}


def name_of(setting: str) -> str:
    """A setting as part of a file name."""
    return re.sub(r"\W+", "_", setting)


def log_of(setting: str, seed: int) -> Path:
    return LOGS / f"{name_of(setting)}_seed{seed}.json"


def of_scaled_sets(folder: Path) -> dict[str, Any]:
    """Of the policy's sets that say everything: what they say in all, and what is left when that
    is scaled to the sum 1.

    `said`: the mean sum of the confidences and `<other>`. `q_mse_scaled`: the mean (p - mass)^2 of
    the answers, p = q / sum. Empty where the form has no confidences.
    """
    sums = []
    errors = []
    items, _ = read_jsonl(folder / "eval_items.jsonl")
    for item in items:
        if item.get("arm") != "policy":
            continue
        for answer_set in item["sets"]:
            said = [*answer_set["confidences"]]
            found = re.search(r"<other>\s*([\d.]+)\s*</other>", answer_set["text"])
            if found:
                said.append(float(found[1]))
            if answer_set["reason"] is not None or not said or None in said or sum(said) == 0:
                continue
            sums.append(sum(said))
            p = np.array(answer_set["confidences"]) / sum(said)
            errors.append(np.mean((p - np.array(answer_set["mass"])) ** 2))
    if not sums:
        return {}
    return {"said": float(np.mean(sums)), "q_mse_scaled": float(np.mean(errors))}


def one(setting: str, seed: int, again: bool) -> None:
    """Make the log of one setting and seed; one that exists only if it is to be made again."""
    log = log_of(setting, seed)
    if log.exists() and not again:
        return
    name = name_of(setting)
    words = [*SHARED, f"name={name}", f"seed={seed}", f"out={RUNS}", *SETTINGS[setting]]
    folder = RUNS / name / f"seed{seed}"
    train_s = train_unless_finished(folder, *words, again=log.exists())
    evaluate_s = run_module(
        "mar.evaluate", str(folder), f"k={ANSWERS}", "num_answers=", "arms=policy"
    )
    evaluation = read_evaluation(folder)
    kept = kept_of_arm(evaluation["arms"]["policy"])
    # The metric tokens_per_set says enough of them.
    del kept["tokens"]
    rows, _ = read_jsonl(folder / "metrics.jsonl")
    terms = [key for key in rows[-1] if key.startswith("reward/")]
    document = {
        "setting": setting,
        "seed": seed,
        "words": words,
        **environment(),
        "num_items": evaluation["num_items"],
        "train_s": train_s,
        "evaluate_s": evaluate_s,
        **kept,
        "bars": evaluation["bars"],
        "scaled": of_scaled_sets(folder),
        # The rewards of the first and the last step, by term.
        "rewards": {term: [rows[0][term], rows[-1][term]] for term in terms},
    }
    write_log(log, document)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", nargs="?", choices=[*SETTINGS])
    parser.add_argument("seed", nargs="?", type=int)
    args = parser.parse_args()
    settings = [args.setting] if args.setting else [*SETTINGS]
    again = bool(args.setting) and args.seed is not None
    for seed in range(SEEDS) if args.seed is None else [args.seed]:
        for setting in settings:
            one(setting, seed, again)


if __name__ == "__main__":
    main()

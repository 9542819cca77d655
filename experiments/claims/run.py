"""One method and seed of the comparison on clinic, from training to a committed log.

    python experiments/claims/run.py multi_rlcr 0

trains and measures that method anew and overwrites its log: `git diff` shows what changed.
Without a seed: every seed; without a method: every method; logs that exist are then kept. A run
that was interrupted goes on. A trained method is `mar.train` with the words below, then
`mar.evaluate`; untrained ones are arms of one evaluation, which makes the logs of all its arms.
Logs: experiments/claims/logs/.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.common.commands import (
    kept_of_arm,
    read_evaluation,
    run_module,
    train_unless_finished,
    write_log,
)
from mar.policy.sources import environment

HERE = Path(__file__).parent
RUNS = Path("runs/claims")
LOGS = HERE / "logs"
# Held-out patients, and answers of each.
ITEMS = 500
ANSWERS = 30
# How many seeds the long runs have.
LONG_SEEDS = {"multi_rlcr_700": 3, "multi_rlcr_700_exact": 1}
# The main job; only the reward differs.
SHARED = ["+experiment=clinic", "model.threads=1"]
TRAINED = {
    "multi_rlcr": ["reward=multi_rlcr"],
    "multi_rlvr": ["reward=multi_rlvr"],
    "rlcr_single": ["reward=rlcr_single"],
    "rlvr_single": ["reward=rlvr_single"],
    "pass_at_k": ["reward=rlvr_single", "algo.credit=set", "algo.pass_k=3"],
    # Which aims are a matter of time, and which of the labels' noise.
    "multi_rlcr_700": ["train.steps=700"],
    "multi_rlcr_700_exact": ["train.steps=700", "data.target=probabilities"],
}
# Ways of asking the untrained model. Of each evaluation: method -> its arm, and its words.
UNTRAINED: tuple[tuple[dict[str, str], list[str]], ...] = (
    (
        {
            "base": "policy",
            "single": "single",
            "prompted_k": "prompted_k",
            "verbalized": "verbalized",
        },
        [],
    ),
    # How much of what training does is only sharper draws?
    ({"base_cold": "policy", "single_cold": "single"}, ["algo.temperature=0.3"]),
)
NAMES_OF_UNTRAINED = [method for arms, _ in UNTRAINED for method in arms]


def log_of(method: str, seed: int) -> Path:
    return LOGS / f"{method}_seed{seed}.json"


def write(method: str, seed: int, evaluation: Mapping[str, Any], arm: str, **more: Any) -> None:
    """Keep one arm of an evaluation as the log of a method and seed."""
    log = {
        "method": method,
        "seed": seed,
        **environment(),
        "num_items": evaluation["num_items"],
        **more,
        **kept_of_arm(evaluation["arms"][arm]),
        "bars": evaluation["bars"],
    }
    write_log(log_of(method, seed), log)


def measure_untrained(
    arms: Mapping[str, str], own_words: Sequence[str], seed: int, again: bool
) -> None:
    """One evaluation of the model before training, a log for each way of asking it."""
    folder = RUNS / f"{next(iter(arms))}_seed{seed}"
    if again:
        # mar.evaluate would keep the answers that are there.
        shutil.rmtree(folder, ignore_errors=True)
    words = [
        *SHARED,
        f"seed={seed}",
        f"eval.num_items={ITEMS}",
        f"k={ANSWERS}",
        "num_answers=",
        f"arms={','.join(arms.values())}",
        *own_words,
    ]
    seconds = run_module("mar.evaluate", "base", *words, f"out={folder}")
    evaluation = read_evaluation(folder)
    for method, arm in arms.items():
        write(method, seed, evaluation, arm, words=words, train_s=0.0, evaluate_s=seconds)


def train_and_measure(method: str, seed: int, again: bool) -> None:
    words = [
        *SHARED,
        f"name={method}",
        f"seed={seed}",
        f"out={RUNS}",
        f"eval.num_items={ITEMS}",
        *TRAINED[method],
    ]
    folder = RUNS / method / f"seed{seed}"
    train_s = train_unless_finished(folder, *words, again=again)
    evaluate_s = run_module(
        "mar.evaluate",
        str(folder),
        f"eval.num_items={ITEMS}",
        f"k={ANSWERS}",
        "num_answers=",
        "arms=policy",
    )
    evaluation = read_evaluation(folder)
    write(method, seed, evaluation, "policy", words=words, train_s=train_s, evaluate_s=evaluate_s)


def one(method: str, seed: int, again: bool) -> None:
    """Make the log of one method and seed; one that exists only if it is to be made again."""
    exists = log_of(method, seed).exists()
    if exists and not again:
        return
    for arms, words in UNTRAINED:
        if method in arms:
            measure_untrained(arms, words, seed, again=exists)
            return
    train_and_measure(method, seed, again=exists)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", nargs="?", choices=[*TRAINED, *NAMES_OF_UNTRAINED])
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument(
        "--seeds", type=int, default=5, help="how many, without a method and a seed"
    )
    args = parser.parse_args()
    methods = [args.method] if args.method else [*TRAINED, *NAMES_OF_UNTRAINED]
    if args.seed is not None:
        for method in methods:
            one(method, args.seed, again=bool(args.method))
        return
    for seed in range(args.seeds):
        for method in methods:
            if seed < LONG_SEEDS.get(method, args.seeds):
                one(method, seed, again=False)


if __name__ == "__main__":
    main()

"""Which metrics a person is shown, and where. Files hold all of them (README.md lists them).

K is the number of answers in a set; coverage comes first in every table.
"""

import math
from collections.abc import Iterable

# Table at the end of a run, the JSON line after it, floor and ceiling, a report's headline.
HEADLINE = (
    "top1",
    "brier",
    "ece",
    "q_mse",
    "format_rate",
    "repeats_per_set",
    "tokens_per_set",
    "prompt_tokens",
)

# Table that `mar.evaluate` ends with.
EVALUATION = (
    "top1",
    "brier",
    "ece",
    "auroc",
    "q_mse",
    "tv_distance",
    "regret",
    "format_rate",
    "repeats_per_set",
    "tokens_per_set",
)

# Console line of a training step: label -> metric.
PROGRESS = {
    "reward": "reward/total",
    "coverage": "reward/coverage",
    "ece": "train/ece",
    "format": "train/format_rate",
    "tok/s": "perf/tokens_per_s",
}

# Panels of the learning curves, after the reward and the coverage of a set.
CURVES = ("top1", "brier", "ece", "format_rate")


def headline_metrics(num_answers: int) -> tuple[str, ...]:
    """Coverage of a set of K answers, then HEADLINE."""
    return (f"coverage@{num_answers}", *HEADLINE)


def evaluation_metrics(num_answers: int, most_answers: int) -> tuple[str, ...]:
    """Coverage of one set and of all sets of an item, unique answers of all, then EVALUATION. Each
    once, also where all sets are one."""
    names = (
        f"coverage@{num_answers}",
        f"coverage@{most_answers}",
        f"unique@{most_answers}",
        *EVALUATION,
    )
    return tuple(dict.fromkeys(names))


# The range of values that a metric can take, by the beginning of its name; any other has none.
RANGES = {
    **dict.fromkeys(("coverage@", "top1", "recall@", "precision", "pass@"), (0.0, 1.0)),
    **dict.fromkeys(("brier", "ece", "auroc", "set_ece", "q_mse", "tv_distance"), (0.0, 1.0)),
    **dict.fromkeys(("format_rate", "overlap_"), (0.0, 1.0)),
    **dict.fromkeys(("unique@", "repeats_per_set"), (0.0, math.inf)),
    **dict.fromkeys(("tokens_per_set", "prompt_tokens"), (0.0, math.inf)),
}


def range_of(metric: str, values: Iterable[float] = ()) -> tuple[float, float]:
    """(lowest, highest) value that a metric can take.

    Where several golds of a question are right at once, coverage counts them: with `values` above
    1 there is no highest one.
    """
    for beginning, (lowest, highest) in RANGES.items():
        if metric.startswith(beginning):
            return lowest, math.inf if max(values, default=0.0) > highest else highest
    return -math.inf, math.inf

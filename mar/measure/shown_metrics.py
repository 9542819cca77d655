"""Which metrics a person is shown, and where. Files hold all of them (README.md lists them).

K is the number of answers in a set; coverage comes first in every table.
"""

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

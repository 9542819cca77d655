"""What `evaluation.json` says: every arm by itself, at equal tokens, and item by item."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mar.measure.answer_sets import Item
from mar.measure.baselines import Arm
from mar.measure.bootstrap import (
    Statistic,
    mean_of,
    paired_difference,
    ratio_of_sums,
    resample_weights,
    with_interval,
)
from mar.measure.bounds import coverage_bounds
from mar.measure.metrics import AnswerArrays, calibration_bins, compute_metrics
from mar.records import Example

MAX_TOKEN_COUNTS = 5000  # completions whose lengths are written for the figure of tokens


def compare_arms(
    arms: Sequence[Arm], items: Mapping[str, Sequence[Item]], examples: Sequence[Example], k: int
) -> dict[str, Any]:
    """The comparison of all arms (the first is the policy), of `items` by the arm's name."""
    policy = arms[0]
    measured = {item.id for item in items["policy"]}
    summaries = {arm.name: summarise_arm(arm, items[arm.name]) for arm in arms}

    tokens = summaries["policy"]["curve"]["tokens"]
    budgets = sorted({tokens[0], tokens[len(tokens) // 2], tokens[-1]})
    equal_tokens = [{"tokens": budget} | _coverage_of_arms(summaries, budget) for budget in budgets]
    pairs = {
        f"policy - {arm.name}": paired_differences(
            items["policy"], items[arm.name], arm.grammar.confident
        )
        for arm in arms[1:]
        if _comparable(policy, arm)
    }
    return {
        "num_items": len(measured),
        "k": k,
        "bars": coverage_bounds([e for e in examples if e.id in measured], k),
        "arms": summaries,
        "equal_tokens": equal_tokens,
        "paired": pairs,
    }


def _comparable(policy: Arm, arm: Arm) -> bool:
    """The arm writes as many answers as the policy, in a set or in all."""
    K = policy.grammar.num_answers
    most = K * policy.num_sets
    return arm.grammar.num_answers == K or arm.grammar.num_answers * arm.num_sets == most


def summarise_arm(arm: Arm, items: Sequence[Item]) -> dict[str, Any]:
    """Everything that is said of one arm; a metric is [value, low, high]."""
    arrays = AnswerArrays(items, arm.grammar.confident)
    weights = resample_weights(len(items))
    sets = [s for item in items for s in item.sets]
    statistics = compute_metrics(arrays)
    return {
        "says": arm.description,
        "num_answers": arm.grammar.num_answers,
        "num_sets": arrays.num_sets,
        "metrics": {name: with_interval(s, weights) for name, s in statistics.items()},
        "curve": _curves(arrays, weights),
        "reliability": _reliability(arrays, weights) if arm.grammar.confident else [],
        "unique_histogram": _unique_histogram(items),
        "tokens": [s.tokens for s in sets][:MAX_TOKEN_COUNTS],
        "format_failures": dict(Counter(s.reason for s in sets if s.reason)),
    }


def _curves(arrays: AnswerArrays, weights: np.ndarray) -> dict[str, Any]:
    """Against the number of answers k: mean tokens, and metrics as [value, low, high]."""
    numbers = range(1, arrays.num_sets + 1)
    tokens_per_set = np.mean(arrays.tokens)

    def points(curve: np.ndarray) -> list[list[float | None]]:
        return [with_interval(mean_of(column), weights) for column in curve.T]

    return {
        "k": [arrays.num_answers * m for m in numbers],
        "tokens": [float(tokens_per_set * m) for m in numbers],
        "coverage": points(arrays.coverage_curve),
        "unique": points(arrays.unique_curve),
        "pass": points(arrays.pass_curve),
    }


def _reliability(arrays: AnswerArrays, weights: np.ndarray) -> list[dict[str, Any]]:
    """Of each confidence bin that is not empty: how many answers, mean confidence, share right."""
    out = []
    bins = calibration_bins(arrays.mass, arrays.confidence)  # [P, 3, NUM_BINS]
    for count, q, y in bins.transpose(2, 1, 0):
        total = count.sum()
        if not total:
            continue
        share_right = Statistic(np.stack([y, count], 1), ratio_of_sums)
        out.append(
            {
                "count": int(total),
                "said": q.sum() / total,
                "right": with_interval(share_right, weights),
            }
        )
    return out


def _unique_histogram(items: Sequence[Item]) -> dict[int, int]:
    """Number of different answers -> number of items that got so many."""
    counts: Counter[int] = Counter()
    for item in items:
        different = {key for s in item.sets for key in s.keys if key is not None}
        counts[len(different)] += 1
    return dict(sorted(counts.items()))


def _coverage_of_arms(
    summaries: Mapping[str, Mapping[str, Any]], budget: float
) -> dict[str, float | None]:
    return {name: coverage_at_tokens(arm["curve"], budget) for name, arm in summaries.items()}


def coverage_at_tokens(curve: Mapping[str, Any], budget: float) -> float | None:
    """Coverage that an arm reaches with `budget` tokens an item.

    Between m and m + 1 sets it is interpolated: a share of the items gets one set more. So too from
    no set to the first one, where a set just misses the budget. Beyond the last set that was
    sampled its coverage stands as long as no further set would fit; after that it is not known
    (None).
    """
    tokens = [0.0, *curve["tokens"]]
    covered = [0.0, *(value for value, *_ in curve["coverage"])]
    if budget >= tokens[-1] + tokens[1]:
        return None
    return float(np.interp(budget, tokens, covered))


def write_confidences(items: Sequence[Item]) -> bool:
    """Whether any of the answers has a confidence."""
    sets = (one for item in items for one in item.sets)
    return any(confidence is not None for one in sets for confidence in one.confidences)


def paired_differences(a: Sequence[Item], b: Sequence[Item], confident: bool) -> dict[str, Any]:
    """a - b of every metric that both have, on the items that both answered.

    {metric: [difference, low, high]}, and `num_items`. `confident`: both write confidences.
    """
    common = {item.id for item in a} & {item.id for item in b}
    first = compute_metrics(AnswerArrays(_chosen(a, common), confident))
    second = compute_metrics(AnswerArrays(_chosen(b, common), confident))
    weights = resample_weights(len(common))
    differences = {
        name: paired_difference(first[name], second[name], weights)
        for name in first
        if name in second
    }
    return {"num_items": len(common)} | differences


def _chosen(items: Sequence[Item], ids: set[str]) -> list[Item]:
    """The items with these ids, in the order of the ids."""
    return [item for item in sorted(items, key=lambda item: item.id) if item.id in ids]

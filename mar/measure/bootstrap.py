"""Intervals of metrics: a bootstrap over items, and Student's t over seeds.

A metric is a `Statistic`: some columns for each item, and a function of their sums over the items.
On a bootstrap sample it is the same function of weighted sums, so that all samples of a metric are
one matrix product. Every metric and policy is resampled with the same weights: a difference of two
policies on the same items is paired.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Statistic:
    """A metric that depends on its items through sums alone.

    columns [P, c]: what each item adds to the sums. value: [..., c] sums -> [...] the metric, nan
    where it is undefined.
    """

    columns: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]


def divide_or_nan(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """total / count, nan where the count is 0."""
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """[..., 2] -> [...]: the first sum over the second."""
    return divide_or_nan(sums[..., 0], sums[..., 1])


def mean_of(values: np.ndarray) -> Statistic:
    """The mean of an array whose first axis is the item; nan entries do not count."""
    flat = np.asarray(values, dtype=float).reshape(len(values), -1)
    totals = np.nansum(flat, 1)
    counts = (~np.isnan(flat)).sum(1)
    return Statistic(np.stack([totals, counts], 1), ratio_of_sums)


def resample_weights(num_items: int, seed: int = 0) -> np.ndarray:
    """[NUM_RESAMPLES, P] how often each item occurs in each bootstrap sample."""
    rng = np.random.default_rng(seed)
    chances = [1 / num_items] * num_items
    return rng.multinomial(num_items, chances, size=NUM_RESAMPLES).astype(float)


def point_estimate(statistic: Statistic) -> float | None:
    """The metric on all items, None where it is undefined."""
    return _none_if_nan(statistic.value(statistic.columns.sum(0)).item())


def with_interval(statistic: Statistic, weights: np.ndarray) -> list[float | None]:
    """[value, low, high]: a metric with its 95 % percentile bootstrap interval over items.

    weights: `resample_weights`. An undefined entry is None.
    """
    resampled = statistic.value(weights @ statistic.columns)
    return [point_estimate(statistic), *_percentile_interval(resampled)]


def paired_difference(a: Statistic, b: Statistic, weights: np.ndarray) -> list[float | None]:
    """[a - b, low, high] of two policies on the same items, both resampled together."""
    value = (a.value(a.columns.sum(0)) - b.value(b.columns.sum(0))).item()
    resampled = a.value(weights @ a.columns) - b.value(weights @ b.columns)
    return [_none_if_nan(value), *_percentile_interval(resampled)]


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else value


def _percentile_interval(values: np.ndarray) -> list[float | None]:
    """[low, high] that hold LEVEL of the defined values."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return [None, None]
    return np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def student_t_95(degrees_of_freedom: int) -> float:
    """Half width, in standard errors, of Student's 95 % interval; right to 0.02."""
    first = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
    if degrees_of_freedom <= len(first):
        return first[degrees_of_freedom - 1]
    return 1.96 + 2.5 / degrees_of_freedom

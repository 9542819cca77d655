"""measure.bootstrap."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES, LEVEL = 1000, 0.95


@dataclass(frozen=True)
class Statistic:
    """`value` of the column sums of `columns` [n, c]: [..., c] -> [...], nan where it is undefined."""

    columns: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]


def divided(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """total / count, nan where the count is 0."""
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def ratio(sums: np.ndarray) -> np.ndarray:
    return divided(sums[..., 0], sums[..., 1])


def mean_of(values: np.ndarray) -> Statistic:
    """The mean of an array whose first axis is the item; nan entries do not count."""
    flat = np.asarray(values, dtype=float).reshape(len(values), -1)
    return Statistic(np.stack([np.nansum(flat, 1), (~np.isnan(flat)).sum(1)], 1), ratio)


def resamples(num_items: int, seed: int = 0) -> np.ndarray:
    """[B, n] how often each item occurs in each bootstrap sample; the same for every metric and policy, so differences are paired."""
    return (
        np.random.default_rng(seed)
        .multinomial(num_items, [1 / num_items] * num_items, size=NUM_RESAMPLES)
        .astype(float)
    )


def _value(statistic: Statistic) -> float | None:
    value = statistic.value(statistic.columns.sum(0)).item()
    return None if np.isnan(value) else value


def _bounds(values: np.ndarray) -> list[float | None]:
    kept = values[~np.isnan(values)]
    return (
        np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        if len(kept)
        else [None, None]
    )


def estimate(statistic: Statistic, weights: np.ndarray) -> list[float | None]:
    """[value, low, high]: the metric and its 95 % percentile bootstrap interval over items. weights: `resamples`."""
    return [_value(statistic), *_bounds(statistic.value(weights @ statistic.columns))]


def difference(a: Statistic, b: Statistic, weights: np.ndarray) -> list[float | None]:
    """[a - b, low, high] of two policies measured on the same items, both resampled alike."""
    value = (a.value(a.columns.sum(0)) - b.value(b.columns.sum(0))).item()
    values = a.value(weights @ a.columns) - b.value(weights @ b.columns)
    return [None if np.isnan(value) else value, *_bounds(values)]


def student(freedom: int) -> float:
    """97.5 % point of Student's t, to .02."""
    first = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
    return first[freedom - 1] if freedom <= len(first) else 1.96 + 2.5 / freedom

"""Floor and ceiling of a task whose posterior is known exactly.

Floor: K distinct answers drawn from the posterior. Ceiling: its K most probable answers, with
honest confidences. `p` [P, golds] holds the probability that each gold is the label of each item.
"""

from collections.abc import Sequence

import numpy as np

from mar.measure.shown_metrics import HEADLINE
from mar.records import Example

# Orders of drawing per item that `coverage_bounds` averages over.
NUM_ORDERS = 64

# Integration over log time: first node, distance of nodes, and the least probability of a gold.
LOG_START = -26.0
STEP = 0.3
TINY = 1e-18

# Rows that are integrated together: [golds, BLOCK, nodes] in float64 stays at a few MB.
BLOCK = 32


def posteriors(examples: Sequence[Example], k: int) -> np.ndarray | None:
    """`p` [P, golds], at least k columns wide; None unless every posterior is known."""
    if any(e.truth != "exact" for e in examples):
        return None
    width = max(k, *(len(e.golds) for e in examples))
    p = np.zeros((len(examples), width))
    for row, example in zip(p, examples, strict=True):
        row[: len(example.golds)] = [gold.probability or 0.0 for gold in example.golds]
    return p


def _check(p: np.ndarray, k: int) -> None:
    if not 1 <= k <= p.shape[-1]:
        raise ValueError(f"k={k} distinct draws from {p.shape[-1]} items")


def _arrived_before(late: np.ndarray, k: int) -> np.ndarray:
    """[golds, k, ...]: P(exactly j of the golds before this one have arrived), for j < k.

    late [golds, ...]: P(this gold has not arrived yet).
    """
    counts = np.zeros((len(late), k, *late.shape[1:]))
    counts[0, 0] = 1.0
    for n in range(len(late) - 1):
        counts[n + 1] = counts[n] * late[n]
        counts[n + 1, 1:] += counts[n, :-1] * (1.0 - late[n])
    return counts


def inclusion_probabilities(p: np.ndarray, k: int) -> np.ndarray:
    """P(a gold is among the first k draws without replacement), in proportion to `p`.

    p [golds] or [P, golds]; the result has the same shape and its rows sum to k. These are
    Plackett-Luce draws. Let gold i arrive after an exponential time of rate p_i: golds arrive in
    the order of the draws, so
        P(i) = integral of p_i exp(-p_i t) P(fewer than k others arrived by t) dt.
    With t = exp(x) the integrand is analytic and the trapezoidal rule converges exponentially: the
    error is below 1e-9. Golds of probability 0 come after all others, at equal chance. Raises
    ValueError unless 1 <= k <= golds.
    """
    _check(p, k)
    rows = p.reshape(-1, p.shape[-1])
    rows = np.maximum(rows / rows.sum(axis=1, keepdims=True), TINY)
    out = np.empty_like(rows)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].T[:, :, None]  # [golds, rows, 1]
        # By 40 / slowest the k most probable golds of every row have arrived.
        slowest = np.partition(block, -k, axis=0)[-k].min()
        t = np.exp(np.arange(LOG_START, np.log(40.0 / slowest) + STEP, STEP))  # [nodes]
        rate = block * t  # [golds, rows, nodes]
        late = np.exp(-rate)
        before = _arrived_before(late, k)
        after = _arrived_before(late[::-1], k)[::-1]
        # P(fewer than k others): j of those before, and at most k - 1 - j of those after.
        few = sum(before[:, j] * after[:, : k - j].sum(axis=1) for j in range(k))
        out[start : start + BLOCK] = STEP * (rate * late * few).sum(axis=-1).T
    return out.reshape(p.shape)


def floor_coverage(p: np.ndarray, k: int) -> np.ndarray:
    """[P] expected posterior mass of k distinct draws from the posterior."""
    return (p * inclusion_probabilities(p, k)).sum(axis=-1)


def best_masses(p: np.ndarray, k: int) -> np.ndarray:
    """[P, k] posterior masses of the k most probable golds, the largest first."""
    _check(p, k)
    return -np.sort(-p, axis=-1)[..., :k]


def ceiling_coverage(p: np.ndarray, k: int) -> np.ndarray:
    """[P] posterior mass of the k most probable golds: no k answers cover more."""
    return best_masses(p, k).sum(axis=-1)


def ceiling_value(p: np.ndarray, k: int) -> np.ndarray:
    """[P] Bayes-optimal value E[sum y - mean (q - y)^2] of k answers.

    It is reached by the k most probable golds, each with q = p.
    """
    best = best_masses(p, k)
    return (best - best * (1.0 - best) / k).sum(axis=-1)


def coverage_bounds(examples: Sequence[Example], k: int) -> dict[str, list[float]] | None:
    """Floor and ceiling of coverage against 1..k answers; None unless the posterior is known.

    The floor is the mean over NUM_ORDERS random orders of drawing each item's golds: right to about
    0.001 over a few thousand items.
    """
    p = posteriors(examples, k)
    if p is None:
        return None
    rng = np.random.default_rng(0)
    floor = np.zeros(k)
    with np.errstate(divide="ignore"):
        logs = np.log(p)
    # Draws without replacement come in the order of log p + Gumbel noise.
    for _ in range(NUM_ORDERS):
        order = np.argsort(-(logs + rng.gumbel(size=p.shape)), axis=1)[:, :k]
        floor += np.take_along_axis(p, order, 1).cumsum(1).mean(0) / NUM_ORDERS
    return {
        "k": list(range(1, k + 1)),
        "floor": floor.tolist(),
        "ceiling": best_masses(p, k).cumsum(1).mean(0).tolist(),
    }


def known_bounds(
    examples: Sequence[Example], num_answers: int
) -> dict[str, dict[str, float | None]] | None:
    """Floor and ceiling of the headline metrics; None unless the posterior is known.

    A metric that has no meaningful bound is None in both. The ceiling also has `value`.
    """
    K = num_answers
    p = posteriors(examples, K)
    if p is None:
        return None
    best = best_masses(p, K)
    coverage = f"coverage@{K}"
    both: dict[str, float | None] = dict.fromkeys((coverage, *HEADLINE))
    both |= {"format_rate": 1.0, "repeats_per_set": 0.0}
    floor = {
        coverage: float(floor_coverage(p, K).mean()),
        "top1": float((p**2).sum(1).mean()),
    }
    ceiling = {
        coverage: float(ceiling_coverage(p, K).mean()),
        "top1": float(best[:, 0].mean()),
        "brier": float((best * (1 - best)).mean()),
        "ece": 0.0,
        "q_mse": 0.0,
        "value": float(ceiling_value(p, K).mean()),
    }
    return {"floor": both | floor, "ceiling": both | ceiling}


def gap_closed(after: float, floor: float, ceiling: float) -> float | None:
    """(after - floor) / (ceiling - floor) of `coverage@K`: 0 for K draws from the posterior, 1 for
    its K most probable answers.

    None where any K answers cover all there is.
    """
    if ceiling - floor <= 1e-6:
        return None
    return (after - floor) / (ceiling - floor)

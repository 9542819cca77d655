"""measure.bounds."""

from collections.abc import Sequence

import numpy as np

from mar.measure.metrics import SHOWN_METRICS
from mar.records import Example

NUM_BINS, NUM_ORDERS = 10, 64

LOG_START, STEP, TINY = (
    -26.0,
    0.3,
    1e-18,
)  # integration over log time; an item of p < TINY counts as TINY

BLOCK = 32  # rows at once: [32, 64, 250] float64 is 4 MB


def posteriors(examples: Sequence[Example], k: int) -> np.ndarray | None:
    """`p` [n, N], N >= k, of examples whose posterior is known, else None."""
    if any(e.truth != "exact" for e in examples):
        return None
    p = np.zeros((len(examples), max(k, *(len(e.golds) for e in examples))))
    for row, example in zip(p, examples, strict=True):
        row[: len(example.golds)] = [gold.probability or 0.0 for gold in example.golds]
    return p


def _check(p: np.ndarray, k: int) -> None:
    if not 1 <= k <= p.shape[-1]:
        raise ValueError(f"k={k} distinct draws from {p.shape[-1]} items")


def _arrivals(late: np.ndarray, k: int) -> np.ndarray:
    """[N, k, B, Q]: P(exactly j of the items before n have arrived), j < k. `late` [N, B, Q]: P(not yet arrived)."""
    counts = np.zeros((len(late), k, *late.shape[1:]))
    counts[0, 0] = 1.0
    for n in range(len(late) - 1):
        counts[n + 1] = counts[n] * late[n]
        counts[n + 1, 1:] += counts[n, :-1] * (1.0 - late[n])
    return counts


def inclusion_probabilities(p: np.ndarray, k: int) -> np.ndarray:
    """Probability [N] or [B, N] that each item is among the first k draws without replacement in proportion to `p`.

    These are Plackett-Luce draws. Let item i arrive after an exponential time of rate p_i: items arrive in the order of
    the draws, so
        P(i) = integral of p_i exp(-p_i t) P(fewer than k others arrived by t) dt.
    With t = exp(x) the integrand is analytic and the trapezoidal rule converges exponentially: error below 1e-9. Rows
    sum to k; items of probability 0 come after all others, at equal chance. Raises ValueError unless 1 <= k <= N.
    """
    _check(p, k)
    rows = p.reshape(-1, p.shape[-1])
    rows = np.maximum(rows / rows.sum(axis=1, keepdims=True), TINY)
    out = np.empty_like(rows)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].T[:, :, None]  # [N, B, 1]
        slowest = np.partition(block, -k, axis=0)[
            -k
        ].min()  # the k most probable have all arrived by 40 / slowest
        t = np.exp(np.arange(LOG_START, np.log(40.0 / slowest) + STEP, STEP))  # [Q]
        rate = block * t  # [N, B, Q]
        late = np.exp(-rate)
        before, after = _arrivals(late, k), _arrivals(late[::-1], k)[::-1]
        few = sum(
            before[:, j] * after[:, : k - j].sum(axis=1) for j in range(k)
        )  # fewer than k others, [N, B, Q]
        out[start : start + BLOCK] = STEP * (rate * late * few).sum(axis=-1).T
    return out.reshape(p.shape)


def floor_coverage(p: np.ndarray, k: int) -> np.ndarray:
    """Expected posterior mass [B] of k distinct draws from the posterior."""
    return (p * inclusion_probabilities(p, k)).sum(axis=-1)


def best_masses(p: np.ndarray, k: int) -> np.ndarray:
    """[B, k] posterior masses of the k most probable items, the largest first."""
    _check(p, k)
    return -np.sort(-p, axis=-1)[..., :k]


def ceiling_coverage(p: np.ndarray, k: int) -> np.ndarray:
    """Posterior mass [B] of the k most probable items: no k answers cover more."""
    return best_masses(p, k).sum(axis=-1)


def ceiling_value(p: np.ndarray, k: int) -> np.ndarray:
    """Bayes-optimal value [B] = E[sum y - mean (q - y)^2] of k answers: the k most probable, each with q = p."""
    best = best_masses(p, k)
    return (best - best * (1.0 - best) / k).sum(axis=-1)


def bars(examples: Sequence[Example], k: int) -> dict[str, list[float]] | None:
    """Floor and ceiling of coverage against 1..k answers where the posterior is known: k distinct draws from it (the mean of NUM_ORDERS orders of
    drawing an item, so to about .001), and its k most probable answers."""
    p = posteriors(examples, k)
    if p is None:
        return None
    rng, floor = np.random.default_rng(0), np.zeros(k)
    with np.errstate(divide="ignore"):
        logs = np.log(p)
    for _ in range(
        NUM_ORDERS
    ):  # draws without replacement come in the order of log p + Gumbel noise
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
    """Floor and ceiling of the same metrics where the posterior is known, else None.

    Floor: K distinct draws from the posterior. Ceiling: its K most probable answers with honest confidences, and their value E[sum y - mean Brier].
    """
    p, K = posteriors(examples, num_answers), num_answers
    if p is None:
        return None
    key, best = f"coverage@{K}", best_masses(p, K)
    both: dict[str, float | None] = dict.fromkeys((key, *SHOWN_METRICS)) | {
        "format_rate": 1.0,
        "repeats_per_set": 0.0,
    }
    floor = {key: float(floor_coverage(p, K).mean()), "top1": float((p**2).sum(1).mean())}
    ceiling = {
        key: float(ceiling_coverage(p, K).mean()),
        "top1": float(best[:, 0].mean()),
        "brier": float((best * (1 - best)).mean()),
    }
    honest = {"ece": 0.0, "q_mse": 0.0, "value": float(ceiling_value(p, K).mean())}
    return {"floor": both | floor, "ceiling": both | ceiling | honest}


def gap_closed(after: float, floor: float, ceiling: float) -> float | None:
    """How far coverage has come from K draws (0) to the K most probable (1); None where K answers cover all there is anyway."""
    return (after - floor) / (ceiling - floor) if ceiling - floor > 1e-6 else None

"""Exact bars from a known posterior: what k answers reach by drawing from it (floor) and by choosing best (ceiling).

Rows `p` [B, N] hold the probability that each of N candidates is the label; k answers are distinct candidates.
"""

import numpy as np

LOG_START, STEP, TINY = -26.0, 0.3, 1e-18  # integration over log time; an item of p < TINY counts as TINY
BLOCK = 32  # rows at once: [32, 64, 250] float64 is 4 MB


def _check(p: np.ndarray, k: int) -> np.ndarray:
    p = np.asarray(p, dtype=np.float64)
    if not 1 <= k <= p.shape[-1]:
        raise ValueError(f"k={k} distinct draws from {p.shape[-1]} items")
    return p


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
    p = _check(p, k)
    rows = p.reshape(-1, p.shape[-1])
    rows = np.maximum(rows / rows.sum(axis=1, keepdims=True), TINY)
    out = np.empty_like(rows)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].T[:, :, None]  # [N, B, 1]
        slowest = np.partition(block, -k, axis=0)[-k].min()  # the k most probable have all arrived by 40 / slowest
        t = np.exp(np.arange(LOG_START, np.log(40.0 / slowest) + STEP, STEP))  # [Q]
        rate = block * t  # [N, B, Q]
        late = np.exp(-rate)
        before, after = _arrivals(late, k), _arrivals(late[::-1], k)[::-1]
        few = sum(before[:, j] * after[:, : k - j].sum(axis=1) for j in range(k))  # fewer than k others, [N, B, Q]
        out[start : start + BLOCK] = STEP * (rate * late * few).sum(axis=-1).T
    return out.reshape(p.shape)


def floor_coverage(p: np.ndarray, k: int) -> np.ndarray:
    """Expected posterior mass [B] of k distinct draws from the posterior."""
    p = _check(p, k)
    return (p * inclusion_probabilities(p, k)).sum(axis=-1)


def _best(p: np.ndarray, k: int) -> np.ndarray:
    p = _check(p, k)
    return np.partition(p, p.shape[-1] - k, axis=-1)[..., -k:]


def ceiling_coverage(p: np.ndarray, k: int) -> np.ndarray:
    """Posterior mass [B] of the k most probable items: no k answers cover more."""
    return _best(p, k).sum(axis=-1)


def ceiling_value(p: np.ndarray, k: int) -> np.ndarray:
    """Bayes-optimal value [B] = E[sum y - mean (q - y)^2] of k answers: the k most probable, each with q = p."""
    best = _best(p, k)
    return (best - best * (1.0 - best) / k).sum(axis=-1)

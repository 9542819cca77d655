"""What metrics of answer sets are made of: pure functions of arrays. `mar.itemstats` puts them together (names: README, glossary)."""

from collections.abc import Sequence

import numpy as np

from mar.posterior import ceiling_coverage, floor_coverage
from mar.records import Example

NUM_BINS = 10
SHOWN_METRICS = ("top1", "brier", "ece", "q_mse", "format_rate", "repeats_per_set", "tokens_per_set", "prompt_tokens")


def auroc_of_counts(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """P(a right answer has the higher confidence than a wrong one), ties one half, from how many right and wrong answers [..., L] each confidence
    has, in rising order -> [...], nan where all are right or all wrong."""
    below = wrong.cumsum(-1) - wrong / 2
    pairs = right.sum(-1) * wrong.sum(-1)
    return np.divide((right * below).sum(-1), pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def set_value(mass: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """[n] value E[sum y - mean Brier] of each set under exact masses [n, K]; a slot without a confidence is charged 1."""
    loss = mass * (confidence - 1) ** 2 + (1 - mass) * confidence**2
    return mass.sum(-1) - np.where(np.isnan(confidence), 1.0, loss).mean(-1)


def tv_distance(mass: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """[n] (sum |q - p| + |sum q - sum p|) / 2: total variation between what a set says and the posterior, the rest being one outcome; nan where
    a slot has no confidence. masses and confidences [n, K]."""
    return (np.abs(confidence - mass).sum(-1) + np.abs((confidence - mass).sum(-1))) / 2


def union_curve(seen: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """[S] expected worth of what m = 1..S of the S sets show together, over all choices of m (for one outcome the unbiased pass@k estimator,
    Chen et al. 2021). seen [S, U]: does set s show outcome u; worth [U]."""
    num_sets, counts = len(seen), seen.sum(0)
    out = np.empty(num_sets)
    missed = np.ones(len(worth))  # C(S - c, m) / C(S, m)
    for m in range(num_sets):
        missed = missed * np.maximum(num_sets - counts - m, 0) / (num_sets - m)
        out[m] = worth @ (1 - missed)
    return out


def known_bounds(examples: Sequence[Example], num_answers: int) -> dict[str, dict[str, float | None]] | None:
    """Floor and ceiling of the same metrics where the posterior is known, else None.

    Floor: K distinct draws from the posterior. Ceiling: its K most probable answers with honest confidences, and their value E[sum y - mean Brier].
    """
    if any(e.truth != "exact" for e in examples):
        return None
    p = np.zeros((len(examples), max(num_answers, *(len(e.golds) for e in examples))))
    for row, example in zip(p, examples, strict=True):
        row[: len(example.golds)] = [gold.probability for gold in example.golds]
    best = -np.sort(-p, axis=1)[:, :num_answers]
    honest_brier = float((best * (1 - best)).mean())
    undefined = {"tokens_per_set": None, "prompt_tokens": None}
    common = {"format_rate": 1.0, "repeats_per_set": 0.0, **undefined}
    key = f"coverage@{num_answers}"
    floor = {
        key: float(floor_coverage(p, num_answers).mean()),
        "top1": float((p**2).sum(1).mean()),
        "brier": None,
        "ece": None,
        "q_mse": None,
    }
    ceiling = {
        key: float(ceiling_coverage(p, num_answers).mean()),
        "top1": float(best[:, 0].mean()),
        "brier": honest_brier,
        "ece": 0.0,
        "q_mse": 0.0,
    }
    return {"floor": floor | common, "ceiling": ceiling | common | {"value": float(best.sum(1).mean() - honest_brier)}}


def gap_closed(after: float, floor: float, ceiling: float) -> float | None:
    """How far coverage has come from K draws (0) to the K most probable (1); None where K answers cover all there is anyway."""
    return (after - floor) / (ceiling - floor) if ceiling - floor > 1e-6 else None

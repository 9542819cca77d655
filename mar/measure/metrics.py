"""What metrics of answer sets are made of: pure functions of arrays. `mar.measure.answer_sets` puts them together (names: README, glossary).

Where the posterior is known there are exact bars: what k answers reach by drawing from it (floor) and by choosing best (ceiling). Rows `p` [B, N]
hold the probability that each of N candidates is the label; k answers are distinct candidates.
"""

import numpy as np

SHOWN_METRICS = (
    "top1",
    "brier",
    "ece",
    "q_mse",
    "format_rate",
    "repeats_per_set",
    "tokens_per_set",
    "prompt_tokens",
)


def brier_loss(mass: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """E(q - y)^2 of each slot under its exact mass; without a confidence (nan) it is charged 1."""
    return np.where(
        np.isnan(confidence), 1.0, mass * (confidence - 1) ** 2 + (1 - mass) * confidence**2
    )


def set_value(mass: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """[n] value E[sum y - mean Brier] of each set under exact masses [n, K]."""
    return mass.sum(-1) - brier_loss(mass, confidence).mean(-1)


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

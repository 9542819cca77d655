"""Metrics of answer sets: pure functions of arrays, each defined once (names: README, glossary).

Where the task knows the probability of each gold, a slot is worth that exact mass instead of a drawn 0 or 1: same expectation, no label noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mar.posterior import ceiling_coverage, floor_coverage
from mar.records import Example, Rollout
from mar.verify import VERIFIERS, matching_increments

NUM_BINS = 10
SHOWN_METRICS = ("top1", "brier", "ece", "q_mse", "format_rate", "repeats_per_set", "tokens_per_set", "prompt_tokens")


@dataclass(frozen=True)
class SlotTable:
    """All slots of n completions: `mass` [n, K] the expected hit (exact probability, or the drawn 0/1), `confidence` [n, K] (nan: none),
    `well_formed` [n]."""

    mass: np.ndarray
    confidence: np.ndarray
    well_formed: np.ndarray


def slot_table(rollouts: Sequence[Rollout], verifier: str, exact: bool) -> SlotTable:
    """Read the slots of rollouts. A format failure counts as wrong: its slots have mass 0 and no confidence."""
    num_slots = len(rollouts[0].answers)
    mass, confidence = np.zeros((len(rollouts), num_slots)), np.full((len(rollouts), num_slots), np.nan)
    well_formed = np.array([r.reason is None for r in rollouts])
    for i, r in enumerate(rollouts):
        if not well_formed[i]:
            continue
        confidence[i] = [np.nan if q is None else q for q in r.confidences]
        if exact:
            golds = r.prompt.example.golds
            _, taken = matching_increments(r.answers, golds, VERIFIERS[verifier])
            mass[i] = [0.0 if g is None else golds[g].probability for g in taken]
        else:
            mass[i] = r.hits
    return SlotTable(mass, confidence, well_formed)


def brier(mass: np.ndarray, confidence: np.ndarray) -> float:
    """Mean of E(q - y)^2 over slots with y ~ Bernoulli(mass); a slot without a readable confidence is charged 1."""
    loss = mass * (confidence - 1) ** 2 + (1 - mass) * confidence**2
    return float(np.where(np.isnan(confidence), 1.0, loss).mean())


def ece(mass: np.ndarray, confidence: np.ndarray) -> float | None:
    """Expected calibration error over slots with a confidence: 10 equal bins, sum of |mean q - mean y| weighted by count (Naeini et al. 2015)."""
    seen = ~np.isnan(confidence)
    if not seen.any():
        return None
    q, y = confidence[seen], mass[seen]
    bins = np.minimum((q * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, q - y, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(q))


def q_mse(mass: np.ndarray, confidence: np.ndarray) -> float | None:
    """Mean (q - p)^2 against exact masses p over slots with a confidence."""
    seen = ~np.isnan(confidence)
    return float(((confidence - mass)[seen] ** 2).mean()) if seen.any() else None


def auroc(mass: np.ndarray, confidence: np.ndarray) -> float | None:
    """P(a right answer has the higher confidence than a wrong one), ties one half, over slots with a confidence; an exact mass counts as that
    share of a right answer. None where all are right or all wrong."""
    seen = ~np.isnan(confidence)
    levels, at = np.unique(confidence[seen], return_inverse=True)
    right, wrong = (np.bincount(at, w, minlength=len(levels)) for w in (mass[seen], 1 - mass[seen]))
    return auroc_of_counts(right, wrong).item() if right.sum() * wrong.sum() > 0 else None


def auroc_of_counts(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """The same from how many right and wrong answers [..., L] each confidence has, in rising order -> [...], nan where undefined."""
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


def set_metrics(rollouts: Sequence[Rollout], verifier: str = "text", confident: bool = True) -> dict[str, float | None]:
    """The headline metrics of one completion per item (or several: they are averaged).

    `coverage@K, top1, brier, ece, q_mse` use exact masses where the task's truth is `exact`, with `coverage@K_drawn, top1_drawn` beside
    them; elsewhere the matched golds, and q_mse is None. `confident`: the grammar asks for confidences; else brier is None.
    """
    exact = all(r.prompt.example.truth == "exact" for r in rollouts)
    table, num_slots = slot_table(rollouts, verifier, exact), len(rollouts[0].answers)
    metrics: dict[str, float | None] = {
        f"coverage@{num_slots}": float(table.mass.sum(1).mean()),
        "top1": float(table.mass[:, 0].mean()),
        "brier": brier(table.mass, table.confidence) if confident else None,
        "ece": ece(table.mass, table.confidence),
        "q_mse": q_mse(table.mass, table.confidence) if exact else None,
        "format_rate": float(table.well_formed.mean()),
        "repeats_per_set": float(np.mean([sum(r.repeated) for r in rollouts])),
        "tokens_per_set": float(np.mean([len(r.completion.ids) for r in rollouts])),
        "prompt_tokens": float(np.mean([len(r.prompt.ids) for r in rollouts])),
    }
    if exact:
        drawn = slot_table(rollouts, verifier, exact=False).mass
        metrics |= {f"coverage@{num_slots}_drawn": float(drawn.sum(1).mean()), "top1_drawn": float(drawn[:, 0].mean())}
    return metrics


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

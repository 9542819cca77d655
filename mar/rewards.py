"""What one completion earns, split into components in the order in which the text decides them. Pure functions.

Component k of the coverage is decided when answer k is closed, component k of the Brier term when confidence k is;
its value never changes with what follows. Whatever looks at the whole text (format, gates, sum rule, what is missing)
enters once, in the last component: total(final text) - sum of the others. That makes credit per answer unbiased.

With hits y_k, confidences q_k and K slots (what the Brier term misses is charged 1: unreadable text never gains):

    paper     total = format + coverage_weight * coverage - brier_weight * (1/K) sum_k (q_k - y_k)^2
    released  total = format + coverage_weight * coverage + brier_weight * [1 - (1/K) sum_k (q_k - y_k)^2]
              the bracket being 0 on a format failure
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mar.grammar import Grammar, Parsed
from mar.records import UserError

COVERAGES = ("sum", "any", "fraction_golds", "fraction_answers")
BRIERS = ("none", "paper", "released")
DUPLICATES = ("per_slot", "gate")
SUM_TOLERANCE = 1e-6  # 0.33 + 0.33 + 0.34 passes


@dataclass(frozen=True)
class RewardSpec:
    """Which reward, all of it as values.

    coverage: `sum` of hits, `any` hit, hits as a `fraction_golds` or `fraction_answers`. sum_rule: confidences (with
    `<other>`) that add up to more than 1 count as a format failure at the gate; for tasks with one gold. duplicates: a
    repeat earns nothing (`per_slot`), or any repeat zeroes the coverage (`gate`; the Brier term stays, so repeating is
    no way out of it). gate: a format failure cancels the coverage and is charged the whole Brier term. rank_weights:
    w_1 >= w_2 >= ... on the coverage of each slot, never on the Brier term; empty means all 1.
    """

    coverage: str = "sum"
    brier: str = "paper"
    sum_rule: bool = False
    duplicates: str = "per_slot"
    gate: bool = True
    rank_weights: tuple[float, ...] = ()
    format_weight: float = 0.5
    coverage_weight: float = 1.0
    brier_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("coverage", COVERAGES), ("brier", BRIERS), ("duplicates", DUPLICATES)):
            if getattr(self, name) not in known:
                raise UserError(f"reward.{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        weights = (self.format_weight, self.coverage_weight, self.brier_weight, *self.rank_weights)
        if not all(math.isfinite(w) and w >= 0 for w in weights):
            raise UserError("the reward weights must be finite and not negative")
        if list(self.rank_weights) != sorted(self.rank_weights, reverse=True):
            raise UserError(f"reward.rank_weights={self.rank_weights} must not increase")
        if self.sum_rule and not self.gate:
            raise UserError("reward.sum_rule=true needs reward.gate=true: without the gate a breach would cost nothing")


@dataclass(frozen=True)
class Reward:
    """components [C] float64 sum to total. parts: the weighted terms `format`, `coverage` and `brier` (these sum to
    total), then `sum_rule_breach` (0 or 1) and `repeats` (a count)."""

    components: np.ndarray
    total: float
    parts: dict[str, float]


OBJECTIVES: dict[str, tuple[str, RewardSpec]] = {  # METHOD: name -> (form of the grammar, reward)
    "rlvr_single": ("rlvr_single", RewardSpec(brier="none")),
    "rlcr_single": ("rlcr_single", RewardSpec(brier="paper")),
    "multi_rlvr": ("rlvr_multi", RewardSpec(brier="none")),
    "multi_rlcr": ("rlcr_multi", RewardSpec(brier="paper")),
}


@lru_cache(maxsize=256)
def component_layout(grammar: Grammar, spec: RewardSpec) -> tuple[tuple[str, int], ...]:
    """(name, index of the grammar element that decides it) per component in order, then ("end", number of elements).

    Raises UserError where the reward asks for what the grammar does not write.
    """
    if not grammar.confident and (spec.brier != "none" or spec.sum_rule):
        raise UserError(f"the form {grammar.form} has no confidences: set reward.brier=none and reward.sum_rule=false")
    if spec.rank_weights and len(spec.rank_weights) != grammar.num_answers:
        raise UserError(f"reward.rank_weights has {len(spec.rank_weights)} numbers for {grammar.num_answers} answers")
    layout = []
    for index, element in enumerate(grammar.elements):
        if element.kind == "answer":
            layout.append((f"coverage{element.slot + 1}", index))
        elif element.kind == "confidence" and spec.brier != "none":
            layout.append((f"brier{element.slot + 1}", index))
        elif element.kind == "other" and spec.brier != "none":
            layout.append(("other", index))
    return (*layout, ("end", len(grammar.elements)))


def first_open(grammar: Grammar, spec: RewardSpec) -> np.ndarray:
    """[S] int64, S = elements + 1: the first component that is not yet decided when segment s begins."""
    decided_by = [index for _, index in component_layout(grammar, spec)]
    return np.searchsorted(decided_by, np.arange(len(grammar.elements) + 1), side="left").astype(np.int64)


def _coverage_terms(hits: Sequence[float], num_golds: int, spec: RewardSpec) -> list[float]:
    """[K] marginal coverage of each slot, weighted."""
    marginals = np.diff(np.maximum.accumulate(hits), prepend=0.0).tolist() if spec.coverage == "any" else hits
    share = {"fraction_golds": max(num_golds, 1), "fraction_answers": len(hits)}.get(spec.coverage, 1)
    ranks = spec.rank_weights or (1.0,) * len(hits)
    return [spec.coverage_weight * w * m / share for w, m in zip(ranks, marginals, strict=True)]


def _brier_terms(parsed: Parsed, hits: Sequence[float], grammar: Grammar) -> list[float | None]:
    """[K] (or [K+1] with `<other>`) squared error of each confidence, None where it or its answer is missing."""
    errors = [
        None if answer is None or confidence is None else (confidence - hit) ** 2
        for answer, confidence, hit in zip(parsed.answers, parsed.confidences, hits, strict=True)
    ]
    if grammar.other:
        errors.append(None if parsed.other is None else (parsed.other - (0.0 if any(hits) else 1.0)) ** 2)
    return errors


def reward(parsed: Parsed, hits: Sequence[float], repeats: Sequence[bool], num_golds: int, grammar: Grammar, spec: RewardSpec) -> Reward:
    """Grade one completion. hits [K] are the matching increments of its answers and repeats [K] its repeated ones
    (verify.py), both 0 where nothing was written."""
    layout = component_layout(grammar, spec)
    coverage = _coverage_terms(hits, num_golds, spec)
    errors = _brier_terms(parsed, hits, grammar) if spec.brier != "none" else []
    unit = spec.brier_weight / grammar.num_answers

    written = [q for q in (*parsed.confidences, parsed.other) if q is not None]
    breach = spec.sum_rule and math.fsum(written) > 1.0 + SUM_TOLERANCE
    failed = parsed.reason is not None or breach
    cancelled = spec.gate and failed
    parts = {"format": spec.format_weight * (parsed.reason is None), "coverage": math.fsum(coverage), "brier": 0.0}
    if cancelled or (spec.duplicates == "gate" and any(repeats)):
        parts["coverage"] = 0.0
    if spec.brier == "paper":
        parts["brier"] = -unit * math.fsum(1.0 if cancelled or e is None else e for e in errors)
    elif spec.brier == "released" and not failed:
        parts["brier"] = spec.brier_weight - unit * math.fsum(e for e in errors if e is not None)
    total = math.fsum(parts.values())

    by_slot = {f"coverage{k + 1}": c for k, c in enumerate(coverage)}
    names = [f"brier{k + 1}" for k in range(grammar.num_answers)] + ["other"] * grammar.other
    by_slot.update({name: 0.0 if e is None else -unit * e for name, e in zip(names, errors, strict=False)})
    components = np.array([by_slot.get(name, 0.0) for name, _ in layout], dtype=np.float64)
    components[-1] = total - math.fsum(components[:-1])
    parts.update(sum_rule_breach=float(breach), repeats=float(sum(repeats)))
    return Reward(components, total, parts)

"""What one completion earns, split into components in the order in which the text decides them. Pure functions.

Component k of the coverage is decided when answer k is closed, component k of the Brier term when confidence k is; its value never changes with
what follows. Whatever looks at the whole text (format, gates, sum rule) enters once, in the last component: total - sum of the others.

With hits y_k, confidences q_k and K slots (what the Brier term misses is charged 1: unreadable text never gains):

    paper     total = format + coverage_weight * coverage - brier_weight * (1/K) sum_k (q_k - y_k)^2
    released  total = format + coverage_weight * coverage + brier_weight * [1 - (1/K) sum_k (q_k - y_k)^2]
              the bracket being 0 on a format failure
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mar.answers.grammar import Grammar, Parsed
from mar.errors import UserError

# name -> what each answer adds [K], of its hits [K] and the number of golds; an answer's value may look at hits up to its own only
COVERAGES: dict[str, Callable[[Sequence[float], int], Sequence[float]]] = {
    "sum": lambda hits, _: hits,
    "any": lambda hits, _: np.diff(np.minimum(np.cumsum(hits), 1.0), prepend=0.0).tolist(),
    "fraction_golds": lambda hits, num_golds: [hit / max(num_golds, 1) for hit in hits],
    "fraction_answers": lambda hits, _: [hit / len(hits) for hit in hits],
}

BRIERS = ("none", "paper", "released")

DUPLICATES = ("per_slot", "gate")

SUM_TOLERANCE = 1e-6  # 0.33 + 0.33 + 0.34 passes


@dataclass(frozen=True)
class RewardSpec:
    """Which reward, all of it as values.

    coverage: `sum` of hits, `any` hit, hits as a `fraction_golds` or `fraction_answers`. sum_rule: confidences (with `<other>`) that add up to more
    than 1 are a format failure; for tasks with one gold. duplicates: a repeat earns nothing (`per_slot`), or any repeat zeroes the coverage (`gate`;
    the Brier term stays, so repeating is no way out of it). gate: a format failure cancels the coverage and is charged the whole Brier term.
    rank_weights: w_1 >= w_2 >= ... on the coverage of each slot, never on the Brier term; empty means all 1.
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
        if (
            self.coverage not in COVERAGES
            or self.brier not in BRIERS
            or self.duplicates not in DUPLICATES
        ):
            raise UserError(
                f"{self}: coverage is one of {', '.join(COVERAGES)}, brier of {BRIERS}, duplicates of {DUPLICATES}"
            )


@dataclass(frozen=True)
class Reward:
    """components [C] float64 sum to total. parts: the weighted terms `format`, `coverage` and `brier`, which do too, `sum_rule_breach`, `repeats`."""

    components: np.ndarray
    total: float
    parts: dict[str, float]


@lru_cache(maxsize=256)
def component_layout(grammar: Grammar, spec: RewardSpec) -> tuple[tuple[str, int], ...]:
    """(name, index of the grammar element that decides it) per component in order, then ("end", number of elements).

    Raises UserError where the reward asks for what the grammar does not write.
    """
    if not grammar.confident and (spec.brier != "none" or spec.sum_rule):
        raise UserError(
            f"the form {grammar.form} has no confidences: set reward.brier=none and reward.sum_rule=false"
        )
    if spec.rank_weights and len(spec.rank_weights) != grammar.num_answers:
        raise UserError(
            f"reward.rank_weights has {len(spec.rank_weights)} numbers for {grammar.num_answers} answers"
        )
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
    return np.searchsorted(decided_by, np.arange(len(grammar.elements) + 1), side="left").astype(
        np.int64
    )


def _coverage_terms(hits: Sequence[float], num_golds: int, spec: RewardSpec) -> list[float]:
    """[K] marginal coverage of each slot, weighted."""
    ranks = spec.rank_weights or (1.0,) * len(hits)
    return [
        spec.coverage_weight * w * m
        for w, m in zip(ranks, COVERAGES[spec.coverage](hits, num_golds), strict=True)
    ]


def _brier_terms(parsed: Parsed, hits: Sequence[float], grammar: Grammar) -> list[float | None]:
    """[K] (or [K+1] with `<other>`) E(q - y)^2 = (q - h)^2 + h(1 - h) of each confidence, None where it or its answer is
    missing. A hit h of 0 or 1 is a verdict; one between is a probability (verify.probabilities)."""
    errors = [
        None
        if answer is None or confidence is None
        else (confidence - hit) ** 2 + hit * (1.0 - hit)
        for answer, confidence, hit in zip(parsed.answers, parsed.confidences, hits, strict=True)
    ]
    if grammar.other:
        none = 1.0 - min(1.0, math.fsum(hits))
        errors.append(
            None if parsed.other is None else (parsed.other - none) ** 2 + none * (1.0 - none)
        )
    return errors


def reward(
    parsed: Parsed,
    hits: Sequence[float],
    repeats: Sequence[bool],
    num_golds: int,
    grammar: Grammar,
    spec: RewardSpec,
) -> Reward:
    """Grade one completion: matching increments [K] of its answers and its repeated ones [K] (verify.py), both 0 where nothing was written."""
    layout = component_layout(grammar, spec)
    coverage = _coverage_terms(hits, num_golds, spec)
    errors = _brier_terms(parsed, hits, grammar) if spec.brier != "none" else []
    unit = spec.brier_weight / grammar.num_answers

    written = [q for q in (*parsed.confidences, parsed.other) if q is not None]
    breach = spec.sum_rule and math.fsum(written) > 1.0 + SUM_TOLERANCE
    failed = parsed.reason is not None or breach
    cancelled = spec.gate and failed
    parts = {
        "format": spec.format_weight * (not failed),
        "coverage": math.fsum(coverage),
        "brier": 0.0,
    }
    if cancelled or (spec.duplicates == "gate" and any(repeats)):
        parts["coverage"] = 0.0
    if spec.brier == "paper":
        parts["brier"] = -unit * math.fsum(1.0 if cancelled or e is None else e for e in errors)
    elif spec.brier == "released" and not failed:
        parts["brier"] = spec.brier_weight - unit * math.fsum(e for e in errors if e is not None)
    total = math.fsum(parts.values())

    by_slot = {f"coverage{k + 1}": c for k, c in enumerate(coverage)}
    names = [f"brier{k + 1}" for k in range(grammar.num_answers)] + ["other"] * grammar.other
    by_slot.update(
        {name: 0.0 if e is None else -unit * e for name, e in zip(names, errors, strict=False)}
    )
    components = np.array([by_slot.get(name, 0.0) for name, _ in layout], dtype=np.float64)
    components[-1] = total - math.fsum(components[:-1])
    parts.update(sum_rule_breach=float(breach), repeats=float(sum(repeats)))
    return Reward(components, total, parts)

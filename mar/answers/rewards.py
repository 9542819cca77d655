"""What one completion earns, split into the components that credit needs. Pure functions.

The objectives are those of "Reaching Beyond the Mode" (arXiv 2603.24844). A completion has K
answers, with hits y_k (1 where answer k takes a gold that no earlier answer took) and confidences
q_k. Its reward is

    RLVR-Single, Multi-RLVR     format + coverage
    RLCR-Single, Multi-RLCR     format + coverage - Brier

    format    format_weight if the text follows the grammar and the sum rule, else 0
    coverage  coverage_weight * sum_k y_k    (`sum`; COVERAGES has others)
    Brier     brier_weight * (1/K) sum_k (q_k - y_k)^2

This is `brier=paper`. What the authors released pays the complement instead, `brier=released`:

    format + coverage + brier_weight * [1 - (1/K) sum_k (q_k - y_k)^2]

where the bracket is 0 on a format failure. It is 0, too, where the sum rule is broken, which costs
neither format nor coverage then, and where `duplicates=gate` cancels the coverage.

Why Multi-RLCR is honest: with p_k the probability of y_k = 1 the Brier term is best at q_k = p_k.
The slot is then worth p_k - p_k (1 - p_k) / K, which grows with p_k: the best set is the K most
probable different answers, each with its probability.

Unreadable text never gains: a confidence that is missing, or whose answer is, is charged an error
of 1. With `gate`, a format failure cancels the coverage and is charged the whole Brier term.

**Components.** The total is split in the order in which the text decides its terms, as in

    Multi-RLCR, K = 2    coverage1  brier1  coverage2  brier2  end

`coverage{k}` is decided where answer k closes and `brier{k}` where confidence k does. These places
are stopping times: they, and the values, are functions of the text up to there (`grammar.parse`)
and stay as they are whatever follows. All that looks at the whole text (format, gates, sum rule)
enters once, in the last component:

    end = total - sum of the components before it

So the components always add up to the total, and a token can be paid for what is decided after it
alone (`mar.learn.advantages`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mar.answers.grammar import Grammar, Parsed
from mar.errors import UserError


def any_hit(hits: Sequence[float], num_golds: int) -> list[float]:
    """The first hit is worth 1, further ones nothing."""
    covered = np.minimum(np.cumsum(hits), 1.0)
    return np.diff(covered, prepend=0.0).tolist()


# name -> what each answer adds to the coverage [K], given all hits [K] and the number of golds.
# The value of answer k may look at the hits up to k only: it is decided when answer k is
COVERAGES: dict[str, Callable[[Sequence[float], int], Sequence[float]]] = {
    "sum": lambda hits, num_golds: hits,
    "any": any_hit,
    "fraction_golds": lambda hits, num_golds: [hit / max(num_golds, 1) for hit in hits],
    "fraction_answers": lambda hits, num_golds: [hit / len(hits) for hit in hits],
}

BRIERS = ("none", "paper", "released")

DUPLICATES = ("per_slot", "gate")

# of the sum rule: 0.33 + 0.33 + 0.34 must pass
SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RewardSpec:
    """Which reward. Hashable; raises UserError for names that do not exist."""

    # a key of COVERAGES
    coverage: str = "sum"

    # one of BRIERS
    brier: str = "paper"

    # confidences, `<other>` included, that sum to more than 1 are a format failure; with
    # `brier=released` they cost the bracket alone. Right where one gold is, wrong where several
    # may be
    sum_rule: bool = False

    # `per_slot`: a repeated answer earns nothing. `gate`: any repeat cancels the coverage of the
    # completion; its Brier term stays, so that repeating is no way out of it. The bracket of
    # `brier=released` is a gain, and goes with the coverage
    duplicates: str = "per_slot"

    # a format failure cancels the coverage and is charged the whole Brier term
    gate: bool = True

    # w_1 >= w_2 >= ... on the coverage of each answer, never on its Brier term; empty: all 1
    rank_weights: tuple[float, ...] = ()

    format_weight: float = 0.5
    coverage_weight: float = 1.0
    brier_weight: float = 1.0

    def __post_init__(self) -> None:
        known = (
            self.coverage in COVERAGES and self.brier in BRIERS and self.duplicates in DUPLICATES
        )
        if not known:
            raise UserError(
                f"{self}: coverage is one of {', '.join(COVERAGES)}, brier of {BRIERS}, "
                f"duplicates of {DUPLICATES}"
            )


@dataclass(frozen=True)
class Reward:
    """What a completion earned."""

    # [C] float64, weights included; they sum to `total`
    components: np.ndarray
    total: float
    # the terms `format`, `coverage` and `brier`, weights included, which sum to `total` too; and
    # for the log `sum_rule_breach` (0 or 1) and `repeats` (how many)
    parts: dict[str, float]


@lru_cache(maxsize=256)
def component_layout(grammar: Grammar, spec: RewardSpec) -> tuple[tuple[str, int], ...]:
    """The C components in order: (name, index of the grammar element that decides it).

    The last is ("end", number of elements): the whole text decides it. Raises UserError where the
    reward needs what the grammar does not write.
    """
    if not grammar.confident and (spec.brier != "none" or spec.sum_rule):
        raise UserError(
            f"the form {grammar.form} has no confidences: "
            "set reward.brier=none and reward.sum_rule=false"
        )
    if spec.rank_weights and len(spec.rank_weights) != grammar.num_answers:
        raise UserError(
            f"reward.rank_weights has {len(spec.rank_weights)} numbers "
            f"for {grammar.num_answers} answers"
        )
    layout = []
    for index, element in enumerate(grammar.elements):
        if element.kind == "answer":
            layout.append((f"coverage{element.slot + 1}", index))
        elif element.kind == "confidence" and spec.brier != "none":
            layout.append((f"brier{element.slot + 1}", index))
        elif element.kind == "other" and spec.brier != "none":
            layout.append(("other", index))
    layout.append(("end", len(grammar.elements)))
    return tuple(layout)


def first_open(grammar: Grammar, spec: RewardSpec) -> np.ndarray:
    """[S] int64: the first component that is still open when segment s begins.

    A token of segment s can change the components from there on, and none before. S is the number
    of elements + 1: segment s writes element s, the last one all that follows.
    """
    decided_by = [index for _, index in component_layout(grammar, spec)]
    segments = np.arange(len(grammar.elements) + 1)
    return np.searchsorted(decided_by, segments, side="left").astype(np.int64)


def _coverage_terms(hits: Sequence[float], num_golds: int, spec: RewardSpec) -> list[float]:
    """[K] what each answer adds to the coverage, weights included."""
    rank_weights = spec.rank_weights or (1.0,) * len(hits)
    marginals = COVERAGES[spec.coverage](hits, num_golds)
    return [
        spec.coverage_weight * weight * marginal
        for weight, marginal in zip(rank_weights, marginals, strict=True)
    ]


def _squared_error(q: float | None, hit: float) -> float | None:
    """E (q - y)^2 of a y that is 1 with probability h = `hit`: (q - h)^2 + h (1 - h).

    With a verdict, h = 0 or 1, this is the plain square. Where answers are paid by the
    probabilities of the golds (`mar.verify.matching.expected_hits`), h lies between.
    """
    if q is None:
        return None
    return (q - hit) ** 2 + hit * (1.0 - hit)


def _squared_errors(
    parsed: Parsed, hits: Sequence[float], grammar: Grammar
) -> dict[str, float | None]:
    """By component: the squared error of each confidence; None where it or its answer is missing.

    `<other>` is the probability that no answer hits, and is judged against that.
    """
    errors = {}
    slots = zip(parsed.answers, parsed.confidences, hits, strict=True)
    for k, (answer, confidence, hit) in enumerate(slots):
        q = None if answer is None else confidence
        errors[f"brier{k + 1}"] = _squared_error(q, hit)
    if grammar.other:
        nothing_hits = 1.0 - min(1.0, math.fsum(hits))
        errors["other"] = _squared_error(parsed.other, nothing_hits)
    return errors


def reward(
    parsed: Parsed,
    hits: Sequence[float],
    repeated: Sequence[bool],
    num_golds: int,
    grammar: Grammar,
    spec: RewardSpec,
) -> Reward:
    """The reward of one completion; the formulas stand at the top of this file.

    `hits` [K] and `repeated` [K] are what `mar.verify.matching` says of its answers: y_k, and
    whether an answer repeats an earlier one. Both are 0 where nothing was written.
    """
    layout = component_layout(grammar, spec)
    coverages = _coverage_terms(hits, num_golds, spec)
    errors: dict[str, float | None] = {}
    if spec.brier != "none":
        errors = _squared_errors(parsed, hits, grammar)
    unit = spec.brier_weight / grammar.num_answers

    # what looks at the whole text
    said = [q for q in (*parsed.confidences, parsed.other) if q is not None]
    breach = spec.sum_rule and math.fsum(said) > 1.0 + SUM_TOLERANCE
    failed = parsed.reason is not None or (breach and spec.brier != "released")
    gated = spec.gate and failed
    repeats_cancel = spec.duplicates == "gate" and any(repeated)
    cancelled = gated or repeats_cancel

    # the total
    format_term = 0.0 if failed else spec.format_weight
    coverage_term = 0.0 if cancelled else math.fsum(coverages)
    brier_term = 0.0
    if spec.brier == "paper":
        charged = [1.0 if gated or error is None else error for error in errors.values()]
        brier_term = -unit * math.fsum(charged)
    elif spec.brier == "released" and not (failed or breach or repeats_cancel):
        charged = [error for error in errors.values() if error is not None]
        brier_term = spec.brier_weight - unit * math.fsum(charged)
    total = math.fsum([format_term, coverage_term, brier_term])

    # the components: what the prefixes decided, and the rest of the total
    decided = {f"coverage{k + 1}": coverage for k, coverage in enumerate(coverages)}
    for name, error in errors.items():
        decided[name] = 0.0 if error is None else -unit * error
    components = np.array([decided.get(name, 0.0) for name, _ in layout], dtype=np.float64)
    components[-1] = total - math.fsum(components[:-1])

    parts = {
        "format": format_term,
        "coverage": coverage_term,
        "brier": brier_term,
        "sum_rule_breach": float(breach),
        "repeats": float(sum(repeated)),
    }
    return Reward(components, total, parts)

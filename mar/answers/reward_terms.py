"""The terms that a reward can be made of. Pure functions, one dictionary: REWARD_TERMS.

A term looks at one completion, as it was read and judged, and says what it pays:

    def shouting(judged: Judged, weight: float) -> TermValue:
        capitals = sum(char.isupper() for char in judged.text)
        return TermValue(whole=-weight * capitals / max(len(judged.text), 1))

    REWARD_TERMS["shouting"] = Term(shouting)             # and: reward.terms.shouting=0.2

`Term` also says which closing tags decide a part of it (`decides`), and what the form must have
for it (`needs`). The weight is the one number that a term has; others are constants of this file.

What a term pays has two sides. `whole` is its value for the whole text. `answers`, `confidences`
and `other` are what is decided before the end: the value of slot k is due where the closing tag of
answer k (or confidence k) ends, and may look at the text up to there only. It is 0 before, and
stays as it is whatever follows. The difference is paid at the very end (`rewards.py`). A value that
is not known at a slot belongs to `whole` alone. `mar.answers.term_check` tries all of this on
random texts before a run starts, and names a term that changes its mind.

A term multiplies its values with its weight itself, so that all of its arithmetic stands in one
place; twice the weight must pay twice as much.

**Exact or not.** A term of one completion alone keeps credit per answer unbiased, also on malformed
text (`algo.credit=to_go` or `set` with the others' mean; tests/answers/test_reward_terms.py
compares it with the exact gradient of an enumerated policy). A term that needs the group is not
exact: what one completion writes then changes the reward of the others, and so their mean, its
baseline.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mar.answers.grammar import Element, Grammar, Parsed
from mar.answers.reward_spec import COVERAGES, RewardSpec

# of the sum rule: 0.33 + 0.33 + 0.34 must pass
SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Judged:
    """One completion as it was read and judged: what a term may look at."""

    parsed: Parsed
    # [K] what the verifier says of the answers: y_k, and whether one repeats an earlier one. Both
    # are 0 where nothing was written
    hits: Sequence[float]
    repeated: Sequence[bool]
    num_golds: int
    grammar: Grammar
    spec: RewardSpec

    # without the stop token
    text: str = ""
    # with it
    num_tokens: int = 0

    # [K] equal for answers that mean the same, None where none is
    meanings: tuple[Hashable, ...] = ()
    # the other completions of the prompt, for terms that need the group
    others: tuple["Judged", ...] = ()

    @cached_property
    def breaks_sum_rule(self) -> bool:
        said = [q for q in (*self.parsed.confidences, self.parsed.other) if q is not None]
        return self.spec.sum_rule and math.fsum(said) > 1.0 + SUM_TOLERANCE

    @cached_property
    def failed(self) -> bool:
        """The whole text is not of the form asked for. With `brier=released` a breach of the sum
        rule is no failure: it costs the bracket alone."""
        breach_fails = self.breaks_sum_rule and self.spec.brier != "released"
        return self.parsed.reason is not None or breach_fails

    @property
    def gated(self) -> bool:
        """It failed, and the reward is one that then cancels what answers earned."""
        return self.spec.gate and self.failed

    @property
    def repeats_cancel(self) -> bool:
        """An answer is repeated, and the reward is one that then cancels what answers earned."""
        return self.spec.duplicates == "gate" and any(self.repeated)


@dataclass(frozen=True)
class TermValue:
    """What a term pays for one completion, weight included."""

    # [K] decided where answer k closes, and where confidence k does; empty: nothing is
    answers: Sequence[float] = ()
    confidences: Sequence[float] = ()
    # decided where <other> closes
    other: float = 0.0
    # for the whole text. None: the sum of what was decided
    whole: float | None = None

    def at(self, element: Element) -> float:
        """What is decided where this element closes."""
        slots: dict[str, Sequence[float]] = {
            "answer": self.answers,
            "confidence": self.confidences,
            "other": (self.other,),
        }
        values = slots.get(element.kind, ())
        if not values:
            return 0.0
        # the slot of <other> is -1, the only one there is
        return values[element.slot]

    @property
    def total(self) -> float:
        if self.whole is not None:
            return self.whole
        return math.fsum([*self.answers, *self.confidences, self.other])


@dataclass(frozen=True)
class Term:
    """An entry of REWARD_TERMS."""

    pay: Callable[[Judged, float], TermValue]
    # the kinds of elements whose closing tag decides a part of it: answer, confidence, other
    decides: tuple[str, ...] = ()
    # what it cannot do without: confidences, other, group
    needs: tuple[str, ...] = ()


# --- the terms of the paper (arXiv 2603.24844) ---------------------------------------------------


def format_term(judged: Judged, weight: float) -> TermValue:
    """`weight` if the text follows the grammar and the sum rule, else 0. Exact."""
    if judged.failed:
        return TermValue(whole=0.0)
    return TermValue(whole=weight)


def coverage_term(judged: Judged, weight: float) -> TermValue:
    """weight x sum_k w_k m_k: m_k is what answer k adds to the coverage, w_k its rank weight.

    An answer that was not written adds 0. 0 for the whole text where a gate cancels it. Exact.
    """
    spec = judged.spec
    rank_weights = spec.rank_weights or (1.0,) * len(judged.hits)
    marginals = COVERAGES[spec.coverage](judged.hits, judged.num_golds)
    values = []
    slots = zip(judged.parsed.answers, rank_weights, marginals, strict=True)
    for answer, rank_weight, marginal in slots:
        value = 0.0
        if answer is not None:
            value = weight * rank_weight * marginal
        values.append(value)
    if judged.gated or judged.repeats_cancel:
        return TermValue(answers=values, whole=0.0)
    return TermValue(answers=values)


def squared_error(q: float | None, hit: float) -> float | None:
    """E (q - y)^2 of a y that is 1 with probability h = `hit`: (q - h)^2 + h (1 - h).

    With a verdict, h = 0 or 1, this is the plain square. Where answers are paid by the
    probabilities of the golds (`mar.verify.matching.expected_hits`), h lies between.
    """
    if q is None:
        return None
    return (q - hit) ** 2 + hit * (1.0 - hit)


def nothing_hits(judged: Judged) -> float:
    """y of `<other>`: 1 where no answer hits, or the probability of that."""
    return 1.0 - min(1.0, math.fsum(judged.hits))


def brier_term(judged: Judged, weight: float) -> TermValue:
    """-weight x (1/K) sum_k (q_k - y_k)^2, with `brier=released` weight x [1 - that]. Exact.

    `<other>` is the probability that no answer hits, and its error against that counts too. A
    confidence that is missing, or whose answer is, has no value at its slot. In the whole text it
    is charged an error of 1, and with a gate so is every confidence of a text that failed.
    `released` pays 0 then, and where the sum rule or the duplicate gate is broken, and nothing for
    or against a missing confidence.
    """
    parsed = judged.parsed
    unit = weight / judged.grammar.num_answers
    said = list(zip(parsed.answers, parsed.confidences, strict=True))
    truths = list(judged.hits)
    if judged.grammar.other:
        said.append(("other", parsed.other))
        truths.append(nothing_hits(judged))

    errors = []
    for (answer, confidence), truth in zip(said, truths, strict=True):
        q = None if answer is None else confidence
        errors.append(squared_error(q, truth))
    readable = [error for error in errors if error is not None]
    released = judged.spec.brier == "released"
    if released and (judged.failed or judged.breaks_sum_rule or judged.repeats_cancel):
        whole = 0.0
    elif released:
        whole = weight - unit * math.fsum(readable)
    elif judged.gated:
        whole = -unit * float(len(errors))
    else:
        whole = -unit * math.fsum([*readable, len(errors) - len(readable)])

    decided = [0.0 if error is None else -unit * error for error in errors]
    # an error of <other>, where there is one, stands last
    other = 0.0
    if judged.grammar.other:
        other = decided.pop()
    return TermValue(confidences=decided, other=other, whole=whole)


# --- further terms -------------------------------------------------------------------------------


def length_term(judged: Judged, weight: float) -> TermValue:
    """-weight for every 100 tokens, the stop token included. Exact.

    L1 (arXiv 2503.04697, eq. 1) charges alpha |n_wanted - n|; here nothing is wanted, n_wanted = 0.
    """
    return TermValue(whole=-weight * judged.num_tokens / 100.0)


def repetition_term(judged: Judged, weight: float) -> TermValue:
    """-weight for each answer that repeats an earlier one, decided where it closes. Exact.

    Without it a repeat earns nothing and costs nothing. A slot without an answer, and with a gate
    every slot of a text that failed, is charged like a repeat: not to answer is no way out.
    """
    charged = [-weight if again else 0.0 for again in judged.repeated]
    missing = sum(meaning is None for meaning in judged.meanings)
    whole = sum(charged) - weight * missing
    if judged.gated:
        whole = -weight * judged.grammar.num_answers
    return TermValue(answers=charged, whole=whole)


def batch_exploration_term(judged: Judged, weight: float) -> TermValue:
    """-weight x (1/K) sum_k (1/G) #{j != i : completion j has an answer that means answer k}.

    Not exact: it needs the group. The others' mean holds their half of each match, so with one
    answer a leave-one-out baseline leaves (G - 2)/(G - 1) of the gradient, and nothing in a group
    of two, where both are charged alike. Batch exploration of arXiv 2509.06941 (outcome-based
    exploration) is -(1/n) sum over j != i of 1[a_i = a_j] for one answer a_i each: this with K = 1.
    A slot without an answer, and with a gate every slot of a text that failed, is charged as if all
    the others had said the same: not to answer is no way out.
    """
    unit = weight / judged.grammar.num_answers / (len(judged.others) + 1)
    said_by = [set(other.meanings) for other in judged.others]
    decided = []
    charged = []
    for meaning in judged.meanings:
        times = sum(meaning in said for said in said_by)
        missing = meaning is None
        decided.append(0.0 if missing else -unit * times)
        charged.append(len(said_by) if missing or judged.gated else times)
    return TermValue(answers=decided, whole=-unit * sum(charged))


def _distribution(judged: Judged) -> tuple[np.ndarray, np.ndarray] | None:
    """p [K + 1], what was said of the answers and of `<other>`, scaled to the sum 1 (all 0: as if
    all were equal), and the truth y [K + 1]. None where not everything was said."""
    said = [*judged.parsed.confidences, judged.parsed.other]
    if any(q is None for q in said):
        return None
    q = np.array(said, dtype=np.float64)
    if q.sum() == 0.0:
        q = np.ones_like(q)
    return q / q.sum(), np.array([*judged.hits, nothing_hits(judged)])


def simplex_brier_term(judged: Judged, weight: float) -> TermValue:
    """-weight x sum_j (p_j - y_j)^2 over the K answers and `<other>`, p scaled to the sum 1. Exact.

    Brier (1950), eq. 2, of one forecast over K + 1 classes: from 0 to 2, strictly proper in p where
    one gold is right. It is decided where `<other>` closes. With y the probabilities of the golds
    it is the expectation, 1 + sum p^2 - 2 sum p y. Text that does not say everything, and with a
    gate text that failed, is charged 2. It sees the scaled p alone: pay it beside the Brier term,
    or with the sum rule, where the scale of the confidences is to mean something.
    """
    found = _distribution(judged)
    if found is None:
        return TermValue(whole=-2.0 * weight)
    p, y = found
    value = -weight * float(1.0 + (p * p).sum() - 2.0 * (p * y).sum())
    if judged.gated:
        return TermValue(other=value, whole=-2.0 * weight)
    return TermValue(other=value)


def spherical_term(judged: Judged, weight: float) -> TermValue:
    """weight x p_y / |p|, p over the K answers and `<other>`, y the right one of them. Exact.

    The spherical score (Gneiting and Raftery 2007, section 3): from 0 to 1, strictly proper in p
    where one gold is right. Decided where `<other>` closes. Text that does not say everything, and
    with a gate text that failed, gets 0. The scale of the confidences does not count, as above.
    """
    found = _distribution(judged)
    if found is None:
        return TermValue(whole=0.0)
    p, y = found
    value = weight * float((p * y).sum() / np.sqrt((p * p).sum()))
    if judged.gated:
        return TermValue(other=value, whole=0.0)
    return TermValue(other=value)


# --- all of them ---------------------------------------------------------------------------------

# name -> the term. The weights of the first three are reward.format_weight, coverage_weight and
# brier_weight; those of all others stand in reward.terms
REWARD_TERMS: dict[str, Term] = {
    "format": Term(format_term),
    "coverage": Term(coverage_term, decides=("answer",)),
    "brier": Term(brier_term, decides=("confidence", "other"), needs=("confidences",)),
    "length": Term(length_term),
    "repetition": Term(repetition_term, decides=("answer",)),
    "batch_exploration": Term(batch_exploration_term, decides=("answer",), needs=("group",)),
    "simplex_brier": Term(simplex_brier_term, decides=("other",), needs=("other",)),
    "spherical": Term(spherical_term, decides=("other",), needs=("other",)),
}

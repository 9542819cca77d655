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

Each of these is a term (`mar.answers.reward_terms`), and `reward.terms` adds others to the sum.

**Components.** The total is split in the order in which the text decides its terms, as in

    Multi-RLCR, K = 2    coverage1  brier1  coverage2  brier2  end

`coverage{k}` is decided where answer k closes and `brier{k}` where confidence k does; what several
terms decide at one place is one component. These places are stopping times: they, and the values,
are functions of the text up to there (`grammar.parse`) and stay as they are whatever follows. All
that looks at the whole text (format, gates, sum rule) enters once, in the last component:

    end = total - sum of the components before it

So the components always add up to the total, and a token can be paid for what is decided after it
alone (`mar.learn.advantages`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from mar.answers.grammar import Element, Grammar, Parsed
from mar.answers.reward_spec import RewardSpec
from mar.answers.reward_terms import REWARD_TERMS, Judged, Term, TermValue
from mar.config import RewardOptions
from mar.errors import UserError

# the terms whose weights are settings of their own
PAPER_TERMS = ("format", "coverage", "brier")

# what is logged beside the terms and the total -> its line in the glossary, mar/measure/README.md
LOGGED = {
    "sum_rule_breach": "share of completions whose confidences add up to more than 1 (with the "
    "rule on)",
    "repeats": "repeated answers in a completion",
}


def reward_of(options: RewardOptions) -> RewardSpec:
    """The reward that the config names."""
    values = {item.name: getattr(options, item.name) for item in fields(RewardSpec)}
    if not options.confident:
        values["brier"] = "none"
    values["rank_weights"] = tuple(options.rank_weights or ())
    values["terms"] = tuple(options.terms.items())
    return RewardSpec(**values)


def needs_group(spec: RewardSpec) -> bool:
    """A term of it looks at the other completions of the prompt."""
    return any("group" in REWARD_TERMS[name].needs for name in spec.weights)


def term_faults(terms: Mapping[str, float], confident: bool, other: bool) -> Iterator[str]:
    """What is wrong with `reward.terms` for a form that has confidences, or `<other>`, or not."""
    for name, weight in terms.items():
        key = f"reward.terms.{name}={weight}"
        if name in PAPER_TERMS:
            yield f"{key}: the weight of this term is reward.{name}_weight, set that"
        elif name not in REWARD_TERMS:
            known = [term for term in REWARD_TERMS if term not in PAPER_TERMS]
            yield f"{key} is unknown: choose one of {', '.join(known)}"
        elif name in LOGGED or name == "total":
            yield f"{key}: reward/{name} is logged for something else, give the term another name"
        elif not isinstance(REWARD_TERMS[name], Term):
            yield f"{key}: its entry in REWARD_TERMS is no Term, write Term(<the function>) there"
        elif not 0 <= weight < math.inf:
            yield f"{key} is out of range: a weight is at least 0"
        else:
            needs = REWARD_TERMS[name].needs
            if "confidences" in needs and not confident:
                yield f"{key} needs confidences: leave it out, or take an rlcr objective"
            if "other" in needs and not other:
                yield f"{key} needs the probability that no answer is right: set reward.other=true"


def confidence_components(grammar: Grammar, spec: RewardSpec) -> np.ndarray:
    """[C] bool: the component is decided where a confidence, or `<other>`, closes."""
    found = np.zeros(len(component_layout(grammar, spec)), dtype=np.bool_)
    for c, (_, element, _) in enumerate(_paid_at(grammar, spec)):
        found[c] = element.kind in ("confidence", "other")
    return found


def confidence_segments(grammar: Grammar) -> np.ndarray:
    """[S] bool: the segment writes a confidence or `<other>`, or thinks about them."""
    kinds = [element.kind for element in grammar.elements]
    found = [kind in ("confidence", "other", "analysis") for kind in kinds]
    return np.array([*found, False], dtype=np.bool_)


@dataclass(frozen=True)
class Reward:
    """What a completion earned."""

    # [C] float64, weights included; they sum to `total`
    components: np.ndarray
    total: float
    # the terms `format`, `coverage` and `brier`, weights included, which sum to `total` too; and
    # for the log `sum_rule_breach` (0 or 1) and `repeats` (how many)
    parts: dict[str, float]
    # [terms, C] float64: the components of each term by itself, per unit of its weight, and [terms]
    # the weights; both in the order of `RewardSpec.weights`
    terms: np.ndarray
    term_weights: np.ndarray


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
    for fault in term_faults(dict(spec.terms), grammar.confident, grammar.other):
        raise UserError(fault)
    layout = [
        (_component_name(element, names), index)
        for index, element, names in _paid_at(grammar, spec)
    ]
    layout.append(("end", len(grammar.elements)))
    return tuple(layout)


@lru_cache(maxsize=256)
def _paid_at(
    grammar: Grammar, spec: RewardSpec
) -> tuple[tuple[int, Element, tuple[str, ...]], ...]:
    """(index, element, names of the terms) of each element that decides a part of some term."""
    found = []
    for index, element in enumerate(grammar.elements):
        names = [name for name in spec.weights if element.kind in REWARD_TERMS[name].decides]
        if names:
            found.append((index, element, tuple(names)))
    return tuple(found)


def _component_name(element: Element, terms: Sequence[str]) -> str:
    """`brier2`; where several terms are decided together `coverage1+batch_exploration1`."""
    if element.kind == "other":
        return "other"
    return "+".join(f"{term}{element.slot + 1}" for term in terms)


def first_open(grammar: Grammar, spec: RewardSpec) -> np.ndarray:
    """[S] int64: the first component that is still open when segment s begins.

    A token of segment s can change the components from there on, and none before. S is the number
    of elements + 1: segment s writes element s, the last one all that follows.
    """
    decided_by = [index for _, index in component_layout(grammar, spec)]
    segments = np.arange(len(grammar.elements) + 1)
    return np.searchsorted(decided_by, segments, side="left").astype(np.int64)


def reward(
    parsed: Parsed,
    hits: Sequence[float],
    repeated: Sequence[bool],
    num_golds: int,
    grammar: Grammar,
    spec: RewardSpec,
) -> Reward:
    """The reward of one completion by itself; the formulas stand at the top of this file.

    `hits` [K] and `repeated` [K] are what `mar.verify.matching` says of its answers: y_k, and
    whether an answer repeats an earlier one. Both are 0 where nothing was written.
    """
    return pay_terms(Judged(parsed, hits, repeated, num_golds, grammar, spec))


def pay_terms(judged: Judged) -> Reward:
    """The sum of the terms, and its components: what prefixes decided, then the rest."""
    grammar = judged.grammar
    spec = judged.spec
    layout = component_layout(grammar, spec)
    values = {name: REWARD_TERMS[name].pay(judged, weight) for name, weight in spec.weights.items()}
    parts = dict.fromkeys(PAPER_TERMS, 0.0)
    for name, value in values.items():
        parts[name] = value.total
    total = math.fsum(parts.values())

    components = np.zeros(len(layout), dtype=np.float64)
    for c, (_, element, names) in enumerate(_paid_at(grammar, spec)):
        first, *more = [values[name].at(element) for name in names]
        components[c] = sum(more, start=first)
    components[-1] = total - math.fsum(components[:-1])

    parts["sum_rule_breach"] = float(judged.breaks_sum_rule)
    parts["repeats"] = float(sum(judged.repeated))
    weights = np.array(list(spec.weights.values()), dtype=np.float64)
    terms = np.stack([_term_components(value, judged) for value in values.values()])
    used = weights[:, None] > 0.0
    terms = np.divide(terms, weights[:, None], out=np.zeros_like(terms), where=used)
    return Reward(components, total, parts, terms, weights)


def _term_components(value: TermValue, judged: Judged) -> np.ndarray:
    """[C] what prefixes decided of one term, then the rest of it."""
    decided = [value.at(element) for _, element, _ in _paid_at(judged.grammar, judged.spec)]
    return np.array([*decided, value.total - math.fsum(decided)], dtype=np.float64)

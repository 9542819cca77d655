"""Tries the terms of a reward on random texts before a run starts.

Credit for single answers is right only where what a prefix decided stays as it is
(`mar.answers.reward_terms`). Nothing in a term's code keeps it to that, so it is tried: each text
is judged as a whole and after some of its prefixes, against two other completions of the same
prompt.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import replace

from mar.answers.grammar import Grammar, parse, render
from mar.answers.reward_spec import RewardSpec
from mar.answers.reward_terms import REWARD_TERMS, Judged, TermValue
from mar.errors import UserError

NUM_TEXTS = 40
ANSWERS = ("flu", "a cold", "gout", "mumps", "Lyme disease")
GOLDS = ("flu", "gout")
SLOTS = ("answer", "confidence", "other")


def check_terms(grammar: Grammar, spec: RewardSpec) -> None:
    """Raises UserError with the name of a term that breaks a rule of `reward_terms`, and how:

    what it decided on a prefix changes afterwards, it pays for a slot that is still open or where
    it says that it decides nothing, its values are not finite, do not grow with its weight, or
    cannot be computed.
    """
    draw = random.Random(0)
    for _ in range(NUM_TEXTS):
        text = _random_text(grammar, draw)
        others = tuple(judge_plainly(_random_text(grammar, draw), grammar, spec) for _ in range(2))
        for name in spec.weights:
            fault = _fault(name, text, others, grammar, spec, draw)
            if fault is not None:
                raise UserError(f"reward term {_described(name, spec)} {fault}")


def judge_plainly(text: str, grammar: Grammar, spec: RewardSpec) -> Judged:
    """A text against GOLDS, word for word: enough to see what a term does."""
    parsed = parse(text, grammar)
    hits = []
    repeated = []
    for k, answer in enumerate(parsed.answers):
        seen = answer is not None and answer in parsed.answers[:k]
        repeated.append(seen)
        hits.append(float(answer in GOLDS and not seen))
    return Judged(
        parsed=parsed,
        hits=hits,
        repeated=repeated,
        num_golds=len(GOLDS),
        grammar=grammar,
        spec=spec,
        text=text,
        num_tokens=len(text) // 3 + 1,
        meanings=parsed.answers,
    )


def prefix_fault(name: str, full: Judged, prefix: Judged) -> str | None:
    """What is wrong with what a term pays for a prefix of a text, given the whole of it."""
    grammar = full.grammar
    term = REWARD_TERMS[name]
    early = term.pay(prefix, 1.0)
    late = term.pay(full, 1.0)
    num_decided = len(prefix.parsed.ends)
    for index, element in enumerate(grammar.elements):
        if element.kind not in SLOTS:
            continue
        before = early.at(element)
        after = late.at(element)
        if index < num_decided and before != after:
            return (
                f"changes its mind: it pays {before:g} for <{element.tag}> after {prefix.text!r} "
                f"and {after:g} after {full.text!r}; what is not known where the tag closes "
                "belongs to `whole`"
            )
        if index >= num_decided and before != 0.0:
            return (
                f"pays {before:g} for <{element.tag}> after {prefix.text!r}, where it is not "
                "closed yet: a slot is worth 0 until then"
            )
    return None


def _fault(
    name: str,
    text: str,
    others: tuple[Judged, ...],
    grammar: Grammar,
    spec: RewardSpec,
    draw: random.Random,
) -> str | None:
    full = replace(judge_plainly(text, grammar, spec), others=others)
    try:
        once = REWARD_TERMS[name].pay(full, 1.0)
        twice = REWARD_TERMS[name].pay(full, 2.0)
        fault = _value_fault(name, once, twice, grammar)
        for length in _prefix_lengths(full, draw):
            prefix = replace(judge_plainly(text[:length], grammar, spec), others=others)
            fault = fault or prefix_fault(name, full, prefix)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        fault = f"fails on {text!r} or a prefix of it: {type(error).__name__}: {error}"
    return fault


def _value_fault(name: str, once: TermValue, twice: TermValue, grammar: Grammar) -> str | None:
    pairs = [(once.total, twice.total)]
    pairs += [(once.at(element), twice.at(element)) for element in grammar.elements]
    for value, doubled in pairs:
        if not math.isfinite(value):
            return f"pays {value}: values must be finite"
        if not math.isclose(2 * value, doubled, rel_tol=1e-9, abs_tol=1e-12):
            return f"pays {value:g} with weight 1 and {doubled:g} with weight 2: multiply by it"
    for element in grammar.elements:
        if once.at(element) != 0.0 and element.kind not in REWARD_TERMS[name].decides:
            return (
                f"pays at <{element.tag}> and its entry of REWARD_TERMS does not say so: "
                f"add decides=({element.kind!r},)"
            )
    return None


def _prefix_lengths(full: Judged, draw: random.Random) -> Iterator[int]:
    """Around every closing tag, and at some places between."""
    yield 0
    for end in full.parsed.ends:
        yield from (end - 1, end)
    for _ in range(4):
        yield draw.randint(0, len(full.text))


def _random_text(grammar: Grammar, draw: random.Random) -> str:
    """Every second text is right; the others break off, or have a piece replaced."""
    count = grammar.num_answers
    text = render(
        grammar,
        answers=[draw.choice(ANSWERS) for _ in range(count)],
        confidences=[draw.choice((0.0, 0.25, 0.6, 1.0)) for _ in range(count)],
        thinking="hm",
        analysis="so",
        other=draw.choice((0.0, 0.25, 0.6)),
    )
    if draw.random() < 0.5:
        start = draw.randint(0, len(text))
        scrap = draw.choice(("", "x", "</think>", "<answer1>gout</answer1>"))
        text = text[:start] + scrap + text[start + draw.choice((0, 3, 20, len(text))) :]
    return text


def _described(name: str, spec: RewardSpec) -> str:
    if name == "coverage":
        return f"coverage (reward.coverage={spec.coverage})"
    return name

"""Answer sets: what each completion of an item says, read and judged against the item's own golds.

Where the task knows the probability of each gold, an answer is worth that exact mass instead of a
drawn 0 or 1: the same expectation, without the noise of the labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mar.answers.grammar import Grammar, Parsed, parse
from mar.errors import UserError
from mar.measure.bounds import ceiling_value, posteriors
from mar.records import Example, Gold, Prompt, Rollout
from mar.verify.judge import Judge
from mar.verify.matching import (
    candidates,
    exact_masses,
    matching_increments,
    meanings,
    remembering,
    repeats,
)
from mar.verify.verifiers import WordChecker, verifier_for

Keys = tuple[str | None, ...]


@dataclass(frozen=True)
class AnswerSet:
    """One completion, read and judged.

    A completion that breaks the format has a `reason`; all its hits and masses are 0 and it has no
    keys.
    """

    text: str
    answers: tuple[str | None, ...]  # [K] None: not written
    confidences: tuple[float | None, ...]  # [K] None: not written, or the form has none
    hits: tuple[float, ...]  # [K] y_k against the targets, which the reward pays for
    mass: tuple[float, ...]  # [K] exact probability where it is known, else the hit
    keys: Keys  # [K] equal for answers that mean the same
    repeated: tuple[bool, ...]  # [K] says again what an earlier slot said
    reason: str | None
    tokens: int
    fits: tuple[tuple[int, ...], ...] = ()  # [K] golds each answer can be; see Item.gold_worth


@dataclass(frozen=True)
class Item:
    """One question and the sets that a policy wrote for it.

    `best_value`: the Bayes-optimal value of K answers where the posterior is known, else None.
    """

    id: str
    num_golds: int  # what recall divides by
    multi_label: bool
    best_value: float | None
    prompt_tokens: int
    sets: tuple[AnswerSet, ...]

    # What each gold is worth; only where some answer can be more than one gold. Then the union of
    # several sets covers what a matching of its answers with the golds covers, and no more.
    gold_worth: tuple[float, ...] = ()

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "Item":
        """The item that `asdict` made a row of; JSON has turned its tuples into lists."""
        sets = tuple(AnswerSet(**_tuples(fields)) for fields in row["sets"])
        gold_worth = tuple(row.get("gold_worth", ()))
        return Item(**{**row, "sets": sets, "gold_worth": gold_worth})


def _tuples(value: Any) -> Any:
    """The value with tuples for lists, at any depth."""
    if isinstance(value, Mapping):
        return {key: _tuples(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(inner) for inner in value)
    return value


def item_of_rollouts(prompt: Prompt, rollouts: Sequence[Rollout]) -> Item:
    """An item from rollouts of its prompt. They carry what the verifier found."""
    sets = [
        _answer_set(
            said=rollout,
            hits=rollout.hits,
            mass=rollout.mass,
            keys=rollout.keys,
            fits=rollout.fits,
            repeated=rollout.repeated,
            text=rollout.text,
            num_tokens=len(rollout.completion.ids),
        )
        for rollout in rollouts
    ]
    return _item(prompt, sets)


def item_of_texts(
    prompt: Prompt, texts: Sequence[tuple[str, int]], grammar: Grammar, verifier: WordChecker
) -> Item:
    """An item from texts that nobody has read yet, (text, number of tokens) each.

    Raises UserError where a judge gives no verdict.
    """
    example = prompt.example
    readings = [parse(text, grammar, prompt.think_open) for text, _ in texts]
    if isinstance(verifier, Judge):
        _ask_judge(verifier, example, readings)
    verify = remembering(verifier_for(verifier, example))
    sets = []
    for parsed, (text, num_tokens) in zip(readings, texts, strict=True):
        hits, _ = matching_increments(parsed.answers, example.targets(), verify)
        exact = example.truth == "exact"
        one = _answer_set(
            said=parsed,
            hits=hits,
            mass=exact_masses(parsed.answers, example.golds, verify) if exact else hits,
            keys=meanings(parsed.answers, example.golds, verify),
            fits=candidates(parsed.answers, _worth_golds(example), verify),
            repeated=repeats(parsed.answers, example.golds, verify),
            text=text,
            num_tokens=num_tokens,
        )
        sets.append(one)
    return _item(prompt, sets)


def _ask_judge(judge: Judge, example: Example, readings: Sequence[Parsed]) -> None:
    """Get the judge's verdict on every answer."""
    written = [
        (example, answer) for parsed in readings for answer in parsed.answers if answer is not None
    ]
    judge.submit(written)
    if not all(judge.has_verdict(*pair) for pair in written):
        raise UserError(
            f"{example.id}: the judge gives no verdict on all of its answers; "
            "the same command goes on"
        )


def _answer_set(
    said: Parsed | Rollout,
    hits: tuple[float, ...],
    mass: tuple[float, ...],
    keys: Keys,
    fits: tuple[tuple[int, ...], ...],
    repeated: tuple[bool, ...],
    text: str,
    num_tokens: int,
) -> AnswerSet:
    """The set of one completion; one that breaks the format hits nothing and means nothing."""
    K = len(said.answers)
    if said.reason is not None:
        hits = (0.0,) * K
        mass = (0.0,) * K
        keys = (None,) * K
        fits = ((),) * K
    return AnswerSet(
        text=text,
        answers=said.answers,
        confidences=said.confidences,
        hits=hits,
        mass=mass,
        keys=keys,
        repeated=repeated,
        reason=said.reason,
        tokens=num_tokens,
        fits=fits,
    )


def _item(prompt: Prompt, sets: Sequence[AnswerSet]) -> Item:
    example = prompt.example
    K = len(sets[0].answers)
    p = posteriors([example], K)
    ambiguous = any(len(golds) > 1 for one in sets for golds in one.fits)
    gold_worth: tuple[float, ...] = ()
    if ambiguous:
        gold_worth = _gold_worth(example)
    else:  # then a key names one gold, and nothing needs to be matched
        sets = [replace(one, fits=()) for one in sets]
    return Item(
        id=example.id,
        num_golds=_num_golds(example, K),
        multi_label=example.multi_label,
        best_value=None if p is None else ceiling_value(p, K).item(),
        prompt_tokens=len(prompt.ids),
        sets=tuple(sets),
        gold_worth=gold_worth,
    )


def _worth_golds(example: Example) -> Sequence[Gold]:
    """The golds that `mass` counts: all where their probabilities are exact, else the targets."""
    return example.golds if example.truth == "exact" else example.targets()


def _gold_worth(example: Example) -> tuple[float, ...]:
    if example.truth == "exact":
        return tuple(gold.probability or 0.0 for gold in example.golds)
    return (1.0,) * len(example.targets())


def _num_golds(example: Example, K: int) -> int:
    """How many golds K answers can hit."""
    if example.tests:  # each distinct program that passes is one
        return K
    if example.truth in ("exact", "survey"):  # one label is drawn
        return 1
    return len(example.targets())

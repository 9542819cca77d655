"""Answer sets: what each completion of an item says, read and judged against the item's own golds.

Where the task knows the probability of each gold, an answer is worth that exact mass instead of a
drawn 0 or 1: the same expectation, without the noise of the labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mar.answers.grammar import Grammar, Parsed, parse
from mar.errors import UserError
from mar.measure.bounds import ceiling_value, posteriors
from mar.records import Example, Gold, Prompt, Rollout
from mar.verify.judge import Judge
from mar.verify.matching import Verifier, matching_increments, repeats
from mar.verify.normaliser import normalise
from mar.verify.verifiers import AnswerChecker, verifier_for

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

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "Item":
        """The item that `asdict` made a row of; JSON has turned its tuples into lists."""
        sets = tuple(AnswerSet(**_tuples(fields)) for fields in row["sets"])
        return Item(**{**row, "sets": sets})


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def item_of_rollouts(prompt: Prompt, rollouts: Sequence[Rollout], verifier: AnswerChecker) -> Item:
    """An item from rollouts of its prompt; the rollout has matched their answers already."""
    verify = _remembering(verifier_for(verifier, prompt.example))
    sets = [
        _answer_set(
            said=rollout,
            hits=rollout.hits,
            repeated=rollout.repeated,
            program_keys=rollout.keys,
            example=prompt.example,
            verify=verify,
            text=rollout.text,
            num_tokens=len(rollout.completion.ids),
        )
        for rollout in rollouts
    ]
    return _item(prompt, sets)


def item_of_texts(
    prompt: Prompt, texts: Sequence[tuple[str, int]], grammar: Grammar, verifier: AnswerChecker
) -> Item:
    """An item from texts that nobody has read yet, (text, number of tokens) each.

    Raises UserError where a judge gives no verdict.
    """
    example = prompt.example
    readings = [parse(text, grammar, prompt.think_open) for text, _ in texts]
    if isinstance(verifier, Judge):
        _ask_judge(verifier, example, readings)
    verify = _remembering(verifier_for(verifier, example))
    sets = []
    for parsed, (text, num_tokens) in zip(readings, texts, strict=True):
        hits, _ = matching_increments(parsed.answers, example.targets(), verify)
        one = _answer_set(
            said=parsed,
            hits=hits,
            repeated=repeats(parsed.answers, example.golds, verify),
            program_keys=(),
            example=example,
            verify=verify,
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


def _remembering(verifier: Verifier) -> Verifier:
    """The same verifier, asked once: the same few answers come again and again.

    Of one example it compares with all golds or with the targets: their number tells them apart.
    """
    known: dict[tuple[str, int], tuple[int, ...]] = {}

    def verify(answer: str, golds: Sequence[Gold]) -> tuple[int, ...]:
        question = (answer, len(golds))
        if question not in known:
            known[question] = verifier(answer, golds)
        return known[question]

    return verify


def _answer_set(
    said: Parsed | Rollout,
    hits: tuple[float, ...],
    repeated: tuple[bool, ...],
    program_keys: Keys,
    example: Example,
    verify: Verifier,
    text: str,
    num_tokens: int,
) -> AnswerSet:
    """The set of one completion. `program_keys`: () unless the answers are programs."""
    K = len(said.answers)
    mass: tuple[float, ...]
    keys: Keys
    if said.reason is not None:
        hits = mass = (0.0,) * K
        keys = (None,) * K
    else:
        exact = example.truth == "exact"
        mass = _exact_masses(said.answers, example.golds, verify) if exact else hits
        keys = program_keys or _meanings(said.answers, example.golds, verify)
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
    )


def _exact_masses(
    answers: Sequence[str | None], golds: Sequence[Gold], verify: Verifier
) -> tuple[float, ...]:
    """[K] posterior mass of the gold that each answer takes in the maximum matching."""
    _, taken = matching_increments(answers, golds, verify)
    return tuple(0.0 if g is None else golds[g].probability or 0.0 for g in taken)


def _meanings(answers: Sequence[str | None], golds: Sequence[Gold], verify: Verifier) -> Keys:
    """[K] normalised name of the gold that each answer means, or the answer itself."""
    keys = []
    for answer in map(str, answers):
        candidates = verify(answer, golds)
        name = golds[candidates[0]].name if len(candidates) == 1 else answer
        keys.append(normalise(name))
    return tuple(keys)


def _item(prompt: Prompt, sets: Sequence[AnswerSet]) -> Item:
    example = prompt.example
    K = len(sets[0].answers)
    p = posteriors([example], K)
    return Item(
        id=example.id,
        num_golds=_num_golds(example, K),
        multi_label=example.multi_label,
        best_value=None if p is None else ceiling_value(p, K).item(),
        prompt_tokens=len(prompt.ids),
        sets=tuple(sets),
    )


def _num_golds(example: Example, K: int) -> int:
    """How many golds K answers can hit."""
    if example.tests:  # each distinct program that passes is one
        return K
    if example.truth in ("exact", "survey"):  # one label is drawn
        return 1
    return len(example.targets())

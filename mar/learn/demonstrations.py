"""What `mar.sft` teaches: demonstrations of the grammar, and the exact distribution of each of their tokens.

Answers are distinct draws from the known posterior (where there is none: the gold among other items' golds), confidences are uniform noise, or
a share of their mass lies near the truth; thoughts quote the question. A demonstration is a draw, its targets are not: wherever the text has a
known distribution, the target is the distribution of the next token given what was written before, so the loss has no sampling noise beyond the
choice of patients and forms.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import mar_kernels
from mar.answers.grammar import FORMS, Element, Grammar
from mar.answers.prompts import STYLES, build_prompt
from mar.errors import UserError
from mar.policy.attention import PackedGroups, group_attention, pack_groups
from mar.policy.model import Decoder
from mar.records import Example

ANALYSES = (
    "The first answer fits best.",
    "Several answers stay possible.",
    "The findings leave room for doubt.",
    "No answer is certain here.",
)

PLAIN = Grammar("rlvr_single", 1, thinking=False)

SHORT = tuple(Grammar(form, 3 if form.endswith("multi") else 1, thinking=False) for form in FORMS)

CONFIDENCES = tuple(f"{percent / 100:.2f}" for percent in range(101))

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Hint:
    """A `share` of a confidence's mass lies within about `spread` of the truth (.1 teaches .02 as .10 and .10 as .14: too alike to be told apart);
    its tokens count `counts` in the loss, for a small share moves little mass."""

    share: float = 0.0
    counts: float = 1.0
    spread: float = 0.02


NO_HINT = Hint()


@dataclass(frozen=True)
class Field:
    """A place of a demonstration whose text has a known distribution: what may stand there, how probable it is, and which one does. Each of its
    tokens counts `weight` in the loss, literal text 1."""

    candidates: Sequence[str]
    probabilities: Sequence[float]
    chosen: int
    weight: float = 1.0

    @property
    def text(self) -> str:
        return self.candidates[self.chosen]


def text_of(pieces: Sequence[str | Field]) -> str:
    """The demonstration as it was drawn."""
    return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)


def make_encode(tokenizer: Any) -> Encode:
    """Token ids of a piece of text, remembered. Raises UserError for a tokenizer whose pieces do not join."""
    joined = (
        tokenizer("</answer1>", add_special_tokens=False)["input_ids"]
        + tokenizer("word", add_special_tokens=False)["input_ids"]
    )
    if tokenizer.decode(joined, skip_special_tokens=False) != "</answer1>word":
        raise UserError(
            "mar.sft joins pieces of text token by token; this tokenizer adds something to the start of each piece"
        )

    @cache
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return encode


def draw_grammar(rng: np.random.Generator) -> tuple[Grammar, str]:
    """One grammar and prompt style of the mixture: every form, layout, K and switch occurs, K=3 interleaved most often."""
    form = str(
        rng.choice(
            ["rlcr_multi", "rlvr_multi", "rlcr_single", "rlvr_single"], p=[0.55, 0.15, 0.15, 0.15]
        )
    )
    multi, confident = form.endswith("multi"), form.startswith("rlcr")
    layout = "split" if multi and confident and rng.random() < 0.25 else "interleaved"
    num_answers = 1 if not multi else 3 if rng.random() < 0.5 else int(rng.integers(1, 11))
    analysis = bool(confident and (layout == "split" or not multi) and rng.random() < 0.5)
    other = bool(confident and rng.random() < 0.1)
    style = str(rng.choice(list(STYLES), p=[0.8, 0.1, 0.1])) if multi else "ranked"
    return Grammar(form, num_answers, layout, bool(rng.random() < 0.3), analysis, other), style


MIXTURES: dict[str, Callable[[np.random.Generator], tuple[Grammar, str]]] = {
    "all": draw_grammar,
    "short": lambda rng: (
        SHORT[rng.integers(len(SHORT))],
        "ranked",
    ),  # the four forms, three answers where there are several
    "plain": lambda rng: (PLAIN, "ranked"),
}


def draw(
    candidates: Sequence[str],
    weights: Sequence[float],
    rng: np.random.Generator,
    count: float = 1.0,
) -> Field:
    """One of the candidates, in proportion to its weight."""
    probabilities = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    return Field(
        candidates, probabilities.tolist(), int(rng.choice(len(candidates), p=probabilities)), count
    )


def draw_answers(
    example: Example, num_answers: int, others: Sequence[str], rng: np.random.Generator
) -> list[Field]:
    """Distinct answers: draws from the golds' probabilities without those already said, then `others`; where golds have none, golds in a random
    order, with as many `others` between them as are missing."""
    left = {gold.name: gold.probability for gold in example.golds if gold.probability}
    fields: list[Field] = []
    while left and len(fields) < num_answers:
        fields.append(draw(list(left), list(left.values()), rng))
        del left[fields[-1].text]
    if (missing := num_answers - len(fields)) == 0:
        return fields
    golds = [] if fields else [gold.name for gold in example.golds]
    pool = [
        name for name in dict.fromkeys(others) if name not in {gold.name for gold in example.golds}
    ]
    right = [golds[i] for i in rng.permutation(len(golds))[:missing]]
    names = right + [pool[i] for i in rng.permutation(len(pool))[: missing - len(right)]]
    names = [names[i] for i in rng.permutation(len(names))]
    return fields + [Field([name], [1.0], 0) for name in names]


def draw_thoughts(question: str, rng: np.random.Generator) -> list[str | Field]:
    """Two clauses of the question."""
    clauses = dict.fromkeys(
        c.strip()
        for c in re.split(r"[.:,;?](?:\s|$)", question)
        if 2 < len(c.strip()) < 40 and "<" not in c
    )
    left = (
        [f" {clause}" for clause in clauses]
        + [" the question"] * (len(clauses) < 2)
        + [" its answer"] * (not clauses)
    )
    first = draw(left, [1.0] * len(left), rng)
    left = [clause for clause in left if clause != first.text]
    return ["Notable:", first, ",", draw(left, [1.0] * len(left), rng), "."]


def confidence_weights(truth: float | None, hint: Hint) -> list[float]:
    """How probable each of CONFIDENCES is: uniform, but for the hint where the truth is known."""
    near = np.exp(-np.abs(np.arange(101) / 100 - (truth or 0.0)) / hint.spread)
    share = hint.share if truth is not None else 0.0
    return ((1 - share) / 101 + share * near / near.sum()).tolist()


def demonstration(
    example: Example,
    grammar: Grammar,
    others: Sequence[str],
    rng: np.random.Generator,
    think_open: bool = False,
    hint: Hint = NO_HINT,
) -> list[str | Field]:
    """A right-formed completion in pieces: literal text and fields."""
    probability = {gold.name: gold.probability for gold in example.golds}
    answers = draw_answers(example, grammar.num_answers, others, rng)
    if len(answers) < grammar.num_answers:
        raise UserError(
            f"{example.id} has too few different answers for {grammar.num_answers} slots"
        )

    def content(element: Element) -> list[str | Field]:
        if element.kind == "answer":
            return [answers[element.slot]]
        if element.kind == "think":
            return draw_thoughts(example.question, rng)
        if element.kind == "analysis":
            return [draw(ANALYSES, [1.0] * len(ANALYSES), rng)]
        truth = (
            probability.get(answers[element.slot].text) if element.kind == "confidence" else None
        )
        return [draw(CONFIDENCES, confidence_weights(truth, hint), rng, hint.counts)]

    pieces: list[str | Field] = [""]
    for element in grammar.elements:
        opening = "" if think_open and element.kind == "think" else element.opening
        for piece in (opening, *content(element), element.closing):
            if isinstance(piece, str) and isinstance(
                pieces[-1], str
            ):  # tags that meet share tokens
                pieces[-1] += piece
            else:
                pieces.append(piece)
    return [piece for piece in pieces if piece]


def soft_targets(
    pieces: Sequence[str | Field], encode: Encode, stop_id: int
) -> tuple[list[int], list[dict[int, float]]]:
    """The token ids of a demonstration, stop token included, and for each the exact distribution of that token given those before it, times
    what the token counts.

    A field's distribution over texts becomes one over next tokens: of the candidates that begin as the chosen one did, what comes next.
    """
    ids: list[int] = []
    targets: list[dict[int, float]] = []
    following = [
        encode(piece)[0] for piece in pieces[1:] if isinstance(piece, str)
    ]  # what ends each field
    for piece in pieces:
        if isinstance(piece, str):
            literal = encode(piece)
            targets += [
                {token: 1.0} for token in literal[len(targets) - len(ids) :]
            ]  # a field foresees the first
            ids += literal
            continue
        rows = [(*encode(text), following[0]) for text in piece.candidates]
        if any(
            after[: len(row)] == row for row, after in pairwise(sorted(set(rows)))
        ):  # prefixes are neighbours
            raise ValueError(
                f"a candidate of {list(piece.candidates)[:3]}... begins with another and what follows it"
            )
        chosen, alive = rows[piece.chosen], list(zip(rows, piece.probabilities, strict=True))
        for position, token in enumerate(chosen):
            total, target = sum(p for _, p in alive), dict[int, float]()
            for row, p in alive:
                target[row[position]] = target.get(row[position], 0.0) + piece.weight * p / total
            targets.append(target)
            alive = [(row, p) for row, p in alive if row[position] == token]
        ids += chosen[:-1]
        following = following[1:]
    return [*ids, stop_id], [*targets, {stop_id: 1.0}]


@dataclass(frozen=True)
class Lesson:
    """Demonstrations for each prompt, and the distribution of each of its M tokens as a bag: `weights` [W] of token ids `alternatives` [W], those
    of token m from `starts[m]` on; they add up to what the token counts, `counts` [M]. `entropy` (nats) is the least that the loss can become."""

    packed: PackedGroups
    alternatives: torch.Tensor
    weights: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    entropy: float


def make_lesson(
    examples: Sequence[Example],
    noun: str,
    tokenizer: Any,
    encode: Encode,
    rng: np.random.Generator,
    others: Sequence[str],
    mixture: str = "all",
    hint: Hint = NO_HINT,
    rows: int = 1,
) -> Lesson:
    """`rows` demonstrations for each example, in a form that it draws from one of MIXTURES; `others`: answers to other questions."""
    prompts: list[list[int]] = []
    completions: list[list[list[int]]] = []
    bags: list[dict[int, float]] = []
    for example in examples:
        grammar, style = MIXTURES[mixture](rng)
        prompt = build_prompt(example, grammar, tokenizer, noun, style)
        prompts.append(list(prompt.ids))
        completions.append([])
        for _ in range(rows):
            pieces = demonstration(example, grammar, others, rng, prompt.think_open, hint)
            ids, targets = soft_targets(pieces, encode, tokenizer.eos_token_id)
            completions[-1].append(ids)
            bags += targets
    weights = torch.tensor([p for bag in bags for p in bag.values()], dtype=torch.float64)
    counts = torch.tensor([sum(bag.values()) for bag in bags], dtype=torch.float64)
    return Lesson(
        packed=pack_groups(prompts, completions),
        alternatives=torch.tensor([token for bag in bags for token in bag]),
        weights=weights,
        starts=torch.tensor([0, *np.cumsum([len(bag) for bag in bags[:-1]])]),
        counts=counts,
        entropy=(
            (torch.special.entr(weights).sum() + (counts * counts.log()).sum()) / counts.sum()
        ).item(),
    )


def lesson_loss(model: Decoder, lesson: Lesson) -> torch.Tensor:
    """Mean cross-entropy (nats a counted token) to the exact distributions: -sum_v q(v) log p(v) = log sum exp - h . sum_v q(v) w_v."""
    packed, head = lesson.packed, model.head_weight
    hidden = model.hidden(packed.ids, packed.positions, group_attention(packed))[
        packed.predict_from
    ]
    _, _, lse = mar_kernels.linear_logprobs(hidden, head, packed.targets)
    rows = F.embedding_bag(
        lesson.alternatives,
        head,
        lesson.starts,
        mode="sum",
        per_sample_weights=lesson.weights.to(head.dtype),
    )
    counts = lesson.counts.to(lse.dtype)
    return (counts * lse - (hidden * rows).sum(-1)).sum() / counts.sum()

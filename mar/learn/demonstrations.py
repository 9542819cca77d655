"""Supervised fine-tuning on demonstrations with soft targets: the data and the loss of `mar.sft`.

A demonstration is a right-formed completion. Its answers are distinct draws from the known
posterior (without one: the gold among other items' golds); its confidences are uniform noise, or a
share of their mass lies near the truth; its thoughts quote the question.

A demonstration is a draw, its targets are not. Wherever the text has a known distribution, the
target is the distribution of the next token given what was written before, so the loss has no
sampling noise beyond the choice of patients and forms.
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
from torch import Tensor

import mar_kernels
from mar.answers.grammar import FORMS, Element, Grammar
from mar.answers.prompts import STYLES, build_prompt
from mar.answers.tokenizer import encode_chat, encode_text
from mar.errors import UserError
from mar.policy.attention import group_attention
from mar.policy.model import Decoder
from mar.policy.packing import PackedGroups, pack_groups
from mar.records import Example

ANALYSES = (
    "The first answer fits best.",
    "Several answers stay possible.",
    "The findings leave room for doubt.",
    "No answer is certain here.",
)

CONFIDENCES = tuple(f"{percent / 100:.2f}" for percent in range(101))

# The seeds of examples that are drawn for supervision start here; those of training runs are small
# numbers.
SFT_SEED = 1_000_000

# Token ids of a piece of text.
Encode = Callable[[str], list[int]]
# The soft target of one token, {id: weight}. The weights add up to what the token counts; a token
# with an empty bag counts nothing.
Bag = dict[int, float]


@dataclass(frozen=True)
class ConfidenceHint:
    """How much of the truth the taught confidences show."""

    # This share of a confidence's mass lies near the truth.
    share: float = 0.0
    # Each token of a confidence counts so much in the loss: a small share moves little mass.
    token_weight: float = 1.0
    # How near: the distance at which the mass falls by a factor e. At 0.1, confidences of 0.02 and
    # 0.10 are taught as 0.10 and 0.14: too alike to be told apart.
    spread: float = 0.02


NO_HINT = ConfidenceHint()


@dataclass(frozen=True)
class DrawnText:
    """A part of a demonstration that was drawn from a known distribution over texts."""

    candidates: Sequence[str]
    probabilities: Sequence[float]
    # The index of the candidate that was drawn.
    chosen: int
    # What each of its tokens counts in the loss; tokens of literal text count 1.
    token_weight: float = 1.0
    # What it says: an "answer", a "confidence" or some other "text".
    kind: str = "text"

    @property
    def text(self) -> str:
        return self.candidates[self.chosen]


# A demonstration in parts: literal text, and text that was drawn.
Pieces = Sequence[str | DrawnText]


def demonstration_text(pieces: Pieces) -> str:
    """The demonstration as it was drawn."""
    return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)


# ---------------------------------------------------------------------- forms


def draw_grammar(rng: np.random.Generator) -> tuple[Grammar, str]:
    """One grammar and prompt style of the mixture.

    Every form, layout, number of answers and switch occurs, three interleaved answers most often.
    """
    forms = ["rlcr_multi", "rlvr_multi", "rlcr_single", "rlvr_single"]
    form = str(rng.choice(forms, p=[0.55, 0.15, 0.15, 0.15]))
    multi = form.endswith("multi")
    confident = form.startswith("rlcr")

    layout = "interleaved"
    if multi and confident and rng.random() < 0.25:
        layout = "split"
    num_answers = 1
    if multi:
        num_answers = 3 if rng.random() < 0.5 else int(rng.integers(1, 11))
    may_analyse = confident and (layout == "split" or not multi)
    analysis = may_analyse and rng.random() < 0.5
    other = confident and rng.random() < 0.1
    style = str(rng.choice(list(STYLES), p=[0.8, 0.1, 0.1])) if multi else "ranked"
    thinking = bool(rng.random() < 0.3)
    return Grammar(form, num_answers, layout, thinking, analysis, other), style


PLAIN = Grammar("rlvr_single", 1, thinking=False)


def short_forms(num_answers: int) -> tuple[Grammar, ...]:
    """The four of FORMS without thoughts; `num_answers` where there are several."""
    forms = []
    for form in FORMS:
        count = num_answers if form.endswith("multi") else 1
        forms.append(Grammar(form, count, thinking=False))
    return tuple(forms)


SHORT = short_forms(3)


def _draw_short(rng: np.random.Generator) -> tuple[Grammar, str]:
    return SHORT[rng.integers(len(SHORT))], "ranked"


def _draw_plain(rng: np.random.Generator) -> tuple[Grammar, str]:
    return PLAIN, "ranked"


# Draws a grammar and the style of its prompt.
DrawForm = Callable[[np.random.Generator], tuple[Grammar, str]]
MIXTURES: dict[str, DrawForm] = {
    "all": draw_grammar,
    "short": _draw_short,
    "plain": _draw_plain,
}


# ---------------------------------------------------------------------- demonstrations


def draw_text(
    candidates: Sequence[str],
    weights: Sequence[float],
    rng: np.random.Generator,
    token_weight: float = 1.0,
    kind: str = "text",
) -> DrawnText:
    """One of the candidates, in proportion to its weight."""
    probabilities = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    chosen = int(rng.choice(len(candidates), p=probabilities))
    return DrawnText(candidates, probabilities.tolist(), chosen, token_weight, kind)


def _draw_evenly(candidates: Sequence[str], rng: np.random.Generator) -> DrawnText:
    return draw_text(candidates, [1.0] * len(candidates), rng)


def draw_answers(
    example: Example, num_answers: int, others: Sequence[str], rng: np.random.Generator
) -> list[DrawnText]:
    """Distinct answers: draws from the golds' probabilities without what was said, then `others`.

    Where golds have no probability: golds in a random order, and as many `others` between them as
    are missing.
    """
    unsaid = {gold.name: gold.probability for gold in example.golds if gold.probability}
    answers: list[DrawnText] = []
    while unsaid and len(answers) < num_answers:
        answers.append(draw_text(list(unsaid), list(unsaid.values()), rng, kind="answer"))
        del unsaid[answers[-1].text]
    missing = num_answers - len(answers)
    if missing == 0:
        return answers
    gold_names = [gold.name for gold in example.golds]
    # A gold that is impossible is as wrong as the others.
    known = {gold.name for gold in example.golds if gold.probability != 0}
    wrong = [name for name in dict.fromkeys(others) if name not in known]
    right = [] if answers else gold_names
    names = _shuffled(right, rng)[:missing]
    names += _shuffled(wrong, rng)[: missing - len(names)]
    certain = [DrawnText([name], [1.0], 0, kind="answer") for name in _shuffled(names, rng)]
    return answers + certain


def _shuffled(names: list[str], rng: np.random.Generator) -> list[str]:
    return [names[i] for i in rng.permutation(len(names))]


def draw_thoughts(question: str, rng: np.random.Generator) -> list[str | DrawnText]:
    """Two clauses of the question."""
    parts = [part.strip() for part in re.split(r"[.:,;?](?:\s|$)", question)]
    short_parts = [part for part in parts if 2 < len(part) < 40 and "<" not in part]
    clauses = list(dict.fromkeys(short_parts))
    candidates = [f" {clause}" for clause in clauses]
    if len(clauses) < 2:
        candidates.append(" the question")
    if not clauses:
        candidates.append(" its answer")
    first = _draw_evenly(candidates, rng)
    second = _draw_evenly([text for text in candidates if text != first.text], rng)
    return ["Notable:", first, ",", second, "."]


def confidence_weights(truth: float | None, hint: ConfidenceHint) -> list[float]:
    """How probable each of CONFIDENCES is: uniform, but for the hint where the truth is known."""
    near = np.exp(-np.abs(np.arange(101) / 100 - (truth or 0.0)) / hint.spread)
    share = hint.share if truth is not None else 0.0
    return ((1 - share) / 101 + share * near / near.sum()).tolist()


def draw_demonstration(
    example: Example,
    grammar: Grammar,
    others: Sequence[str],
    rng: np.random.Generator,
    think_open: bool = False,
    hint: ConfidenceHint = NO_HINT,
) -> list[str | DrawnText]:
    """A right-formed completion in pieces. `think_open`: the prompt has opened <think> already.

    Raises UserError where there are too few different answers.
    """
    probability = {gold.name: gold.probability for gold in example.golds}
    answers = draw_answers(example, grammar.num_answers, others, rng)
    if len(answers) < grammar.num_answers:
        raise UserError(
            f"{example.id} has too few different answers for {grammar.num_answers} slots: "
            "give more rows, or lower reward.num_answers"
        )

    def content(element: Element) -> list[str | DrawnText]:
        if element.kind == "answer":
            return [answers[element.slot]]
        if element.kind == "think":
            return draw_thoughts(example.question, rng)
        if element.kind == "analysis":
            return [_draw_evenly(ANALYSES, rng)]
        truth = None
        if element.kind == "confidence":
            truth = probability.get(answers[element.slot].text)
        weights = confidence_weights(truth, hint)
        return [draw_text(CONFIDENCES, weights, rng, hint.token_weight, kind="confidence")]

    pieces: list[str | DrawnText] = []
    for element in grammar.elements:
        opened_already = think_open and element.kind == "think"
        pieces += ["" if opened_already else element.opening, *content(element), element.closing]
    return _joined(pieces)


def _joined(pieces: Pieces) -> list[str | DrawnText]:
    """Neighbouring literal texts as one piece, for tags that meet share tokens; no empty text."""
    joined: list[str | DrawnText] = [""]
    for piece in pieces:
        last = joined[-1]
        if isinstance(piece, str) and isinstance(last, str):
            joined[-1] = last + piece
        else:
            joined.append(piece)
    return [piece for piece in joined if piece]


# ---------------------------------------------------------------------- soft targets


def piece_encoder(tokenizer: Any) -> Encode:
    """Token ids of a piece of text, remembered.

    Raises UserError for a tokenizer whose pieces do not join.
    """

    def ids_of(text: str) -> list[int]:
        return list(encode_text(tokenizer, text))

    pieces = ("</answer1>", "word")
    joined = [
        id for piece in pieces for id in tokenizer(piece, add_special_tokens=False)["input_ids"]
    ]
    if tokenizer.decode(joined, skip_special_tokens=False) != "</answer1>word":
        raise UserError(
            "mar.sft joins pieces of text token by token; this tokenizer adds something to the "
            "start of each piece"
        )
    return cache(ids_of)


def soft_targets(pieces: Pieces, encode: Encode, stop_id: int) -> tuple[list[int], list[Bag]]:
    """The R token ids of a demonstration, stop token included, and the target of each.

    A target is the exact distribution of the token given those before it, {id: probability}, times
    what the token counts. A distribution over texts becomes one over next tokens: of the candidates
    that begin as the chosen one did, what comes next. The first token of the literal text after
    them ends each candidate, so it is a target of theirs.
    """
    ids: list[int] = []
    targets: list[Bag] = []
    ends = [encode(piece)[0] for piece in pieces[1:] if isinstance(piece, str)]
    for piece in pieces:
        if isinstance(piece, str):
            literal = encode(piece)
            has_target = len(targets) - len(ids)  # the first token, as the end of a candidate
            targets += [{token: 1.0} for token in literal[has_target:]]
            ids += literal
        else:
            chosen, of_chosen = _targets_of_drawn(piece, encode, end=ends.pop(0))
            targets += of_chosen
            ids += chosen
    return [*ids, stop_id], [*targets, {stop_id: 1.0}]


def _targets_of_drawn(drawn: DrawnText, encode: Encode, end: int) -> tuple[list[int], list[Bag]]:
    """Token ids of a drawn text, and their targets with that of the `end` token after it."""
    rows = [(*encode(text), end) for text in drawn.candidates]
    in_order = sorted(set(rows))  # a row that another begins with stands right before it
    if any(longer[: len(row)] == row for row, longer in pairwise(in_order)):
        raise ValueError(
            f"a candidate of {list(drawn.candidates)[:3]}... begins with another and what follows "
            "it"
        )
    chosen = rows[drawn.chosen]
    targets: list[Bag] = []
    alive = list(zip(rows, drawn.probabilities, strict=True))
    for position, token in enumerate(chosen):
        total = sum(p for _, p in alive)
        target: Bag = {}
        for row, p in alive:
            mass = drawn.token_weight * p / total
            target[row[position]] = target.get(row[position], 0.0) + mass
        targets.append(target)
        alive = [(row, p) for row, p in alive if row[position] == token]
    return list(chosen[:-1]), targets


@dataclass(frozen=True)
class Bags:
    """The soft targets of M tokens, one after another.

    `ids` [W] and `weights` [W] hold all of them, those of token m from `starts[m]` on. `counts` [M]
    is what each token counts.
    """

    ids: Tensor
    weights: Tensor
    starts: Tensor
    counts: Tensor

    @property
    def entropy(self) -> float:
        """Nats in all, the least that `cross_entropy` can become.

        With q = weights / counts it is the sum over tokens of counts * H(q).
        """
        of_counts = torch.special.xlogy(self.counts, self.counts)
        return (torch.special.entr(self.weights).sum() + of_counts.sum()).item()


def join_bags(targets: Sequence[Bag]) -> Bags:
    ids: list[int] = []
    weights: list[float] = []
    starts: list[int] = []
    for bag in targets:
        starts.append(len(ids))
        ids += bag.keys()
        weights += bag.values()
    return Bags(
        ids=torch.tensor(ids, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float64),
        starts=torch.tensor(starts, dtype=torch.int64),
        counts=torch.tensor([sum(bag.values()) for bag in targets], dtype=torch.float64),
    )


@dataclass(frozen=True)
class DemonstrationBatch:
    """Demonstrations for each prompt, packed, and the soft targets of their M tokens."""

    packed: PackedGroups
    bags: Bags

    @property
    def num_counted(self) -> float:
        return self.bags.counts.sum().item()

    @property
    def entropy(self) -> float:
        """Nats a counted token: the least that the loss can become."""
        return self.bags.entropy / self.num_counted


@dataclass(frozen=True)
class Shown:
    """A prompt's token ids, and the demonstrations that follow it, in pieces."""

    prompt: list[int]
    rows: list[Pieces]


def draw_demonstrations(
    examples: Sequence[Example],
    noun: str,
    tokenizer: Any,
    rng: np.random.Generator,
    others: Sequence[str],
    draw_form: DrawForm,
    hint: ConfidenceHint = NO_HINT,
    rows: int = 1,
    bare: bool = False,
    explain_decimals: bool = False,
) -> list[Shown]:
    """`rows` demonstrations for each example, in a form that is drawn for it.

    `others` are answers to other questions. `bare`: a prompt is the question alone, without the
    request for a form.
    """
    drawn = []
    for example in examples:
        grammar, style = draw_form(rng)
        prompt = build_prompt(
            example, grammar, tokenizer, noun, style, explain_decimals=explain_decimals
        )
        prompt_ids: list[int] = prompt.ids.tolist()
        if bare:
            _, ids = encode_chat(tokenizer, example.question, grammar.thinking)
            prompt_ids = list(ids)
        demonstrations: list[Pieces] = [
            draw_demonstration(example, grammar, others, rng, prompt.think_open, hint)
            for _ in range(rows)
        ]
        drawn.append(Shown(prompt_ids, demonstrations))
    return drawn


def make_demonstration_batch(
    examples: Sequence[Example],
    noun: str,
    tokenizer: Any,
    encode: Encode,
    rng: np.random.Generator,
    others: Sequence[str],
    mixture: str = "all",
    hint: ConfidenceHint = NO_HINT,
    rows: int = 1,
    bare: bool = False,
    explain_decimals: bool = False,
) -> DemonstrationBatch:
    """What `draw_demonstrations` draws, packed, in the forms of one of MIXTURES."""
    draw_form = MIXTURES[mixture]
    drawn = draw_demonstrations(
        examples, noun, tokenizer, rng, others, draw_form, hint, rows, bare, explain_decimals
    )
    prompts: list[list[int]] = []
    completions: list[list[list[int]]] = []
    targets: list[Bag] = []
    for shown in drawn:
        group: list[list[int]] = []
        for pieces in shown.rows:
            ids, of_tokens = soft_targets(pieces, encode, tokenizer.eos_token_id)
            group.append(ids)
            targets += of_tokens
        prompts.append(shown.prompt)
        completions.append(group)
    return DemonstrationBatch(pack_groups(prompts, completions), join_bags(targets))


def cross_entropy(hidden: Tensor, head: Tensor, tokens: Tensor, bags: Bags) -> Tensor:
    """Nats in all from M states [M, D] to their soft targets.

        -sum_v q(v) log p(v) = log sum_v exp(h . w_v) - h . sum_v q(v) w_v

    with the hidden state h, the head's rows w_v and targets q. `tokens` [M] are the ones written.
    """
    _, _, log_sum_exp = mar_kernels.linear_logprobs(hidden, head, tokens)  # [M]
    mean_rows = F.embedding_bag(  # [M, D]
        bags.ids, head, bags.starts, mode="sum", per_sample_weights=bags.weights.to(head.dtype)
    )
    counts = bags.counts.to(log_sum_exp.dtype)
    return (counts * log_sum_exp - (hidden * mean_rows).sum(-1)).sum()


def soft_target_loss(model: Decoder, batch: DemonstrationBatch) -> Tensor:
    """Mean cross-entropy to the soft targets, in nats a counted token."""
    packed = batch.packed
    states = model.hidden(packed.ids, packed.positions, group_attention(packed))
    hidden = states[packed.predict_from]  # [M, D]
    nats = cross_entropy(hidden, model.head_weight, packed.targets, batch.bags)
    return nats / batch.bags.counts.to(nats.dtype).sum()

"""The answer grammar: which tags a completion must write, how it is rendered, and a strict parser.

    rlvr_single   <think>T</think><answer>T</answer>
    rlcr_single   <think>T</think><answer>T</answer><analysis>T</analysis><confidence>P</confidence>
    rlvr_multi    <think>T</think> then for k = 1..K: <answer{k}>T</answer{k}>
    rlcr_multi    <think>T</think> then for k = 1..K:
                  <answer{k}>T</answer{k}><confidence{k}>P</confidence{k}>         (interleaved)
                  or all answers, then <analysis>T</analysis>, then all confidences      (split)

T is text. P is a plain decimal in [0, 1] of at most 40 characters: the digits 0 to 9 and at most one
point, as in 0.5, .25, 1, 1.0, 1., 00.5 or 0.3333333333333333, and no sign, exponent, per cent or
comma.
`<think>` and `<analysis>` can be left out, and `<other>P</other>` may close a form that has
confidences. White space between elements is free, and around T and P inside them.

**The parser is incremental.** It reads once, from left to right. An element is decided where its
closing tag ends, and what is decided never changes, whatever follows. Two answers without
thinking, as they are being written:

    text so far                        decided so far             where the next token belongs
    <answer1>flu                       nothing, "flu shot"?       segment 0, answer1
    <answer1>flu</answer1>             answer1 = flu              segment 1, answer2
    <answer1>flu</answer1> <ans        answer1 = flu              segment 1, still a right text
    <answer1>flu</answer1> <answer3    answer1 = flu, violation   segment 2, behind all elements

The violation is certain at the character 3, and what follows it cannot mend it.

So a value that is read from a prefix is a function of the prefix alone (a stopping time). Credit
for single answers is unbiased only because of that (`mar.learn.advantages`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mar.config import Config

FORMS = ("rlvr_single", "rlcr_single", "rlvr_multi", "rlcr_multi")
LAYOUTS = ("interleaved", "split")

RESERVED_TAG = re.compile(r"</?(?:think|analysis|other|answer[0-9]*|confidence[0-9]*)>")
# A plain decimal in [0, 1]. Models write up to 17 digits; there is a bound so that a number is a
# number and not a text
MAX_DECIMAL = 40
PROBABILITY = re.compile(r"0*(?:\.[0-9]+|0\.?|1(?:\.0*)?)")

# what a tokenizer shows for the first bytes of a character
INCOMPLETE = "\ufffd"
# tokens that a character may wait for its last byte: a long run of broken bytes would otherwise
# be decoded again with every token
MAX_PENDING = 16


@dataclass(frozen=True)
class Element:
    """One `<tag>...</tag>`."""

    tag: str
    # think, answer, analysis, confidence or other
    kind: str
    # which answer it belongs to, from 0; -1: to none
    slot: int = -1

    @property
    def opening(self) -> str:
        return f"<{self.tag}>"

    @property
    def closing(self) -> str:
        return f"</{self.tag}>"


@dataclass(frozen=True)
class Grammar:
    """Which elements a completion has, in order. Hashable: a grammar can be a dictionary key.

    Raises ValueError for combinations that make no sense.
    """

    form: str = "rlcr_multi"
    num_answers: int = 3
    layout: str = "interleaved"
    thinking: bool = True
    analysis: bool = False
    other: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"unknown form {self.form!r}; known: {', '.join(FORMS)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r}; known: {', '.join(LAYOUTS)}")
        if self.num_answers < 1 or (self.num_answers > 1 and not self.multi):
            raise ValueError(f"form {self.form} cannot have num_answers={self.num_answers}")
        if self.analysis and (not self.confident or self.interleaved):
            raise ValueError(
                "an analysis stands between answers and confidences: it needs rlcr_single, or "
                "rlcr_multi with layout=split"
            )
        if self.other and not self.confident:
            raise ValueError("the <other> confidence needs a form with confidences")

    @property
    def multi(self) -> bool:
        """Several answers in one completion."""
        return self.form.endswith("multi")

    @property
    def confident(self) -> bool:
        """Each answer comes with a confidence."""
        return self.form.startswith("rlcr")

    @property
    def interleaved(self) -> bool:
        """Each confidence follows its answer at once."""
        return self.multi and self.layout == "interleaved"

    @cached_property
    def elements(self) -> tuple[Element, ...]:
        """In the order in which a completion must write them."""
        answers = []
        confidences = []
        for slot in range(self.num_answers):
            number = str(slot + 1) if self.multi else ""
            answers.append(Element(f"answer{number}", "answer", slot))
            if self.confident:
                confidences.append(Element(f"confidence{number}", "confidence", slot))

        elements = []
        if self.thinking:
            elements.append(Element("think", "think"))
        if self.confident and self.interleaved:
            for answer, confidence in zip(answers, confidences, strict=True):
                elements += [answer, confidence]
        else:
            elements += answers
            if self.analysis:
                elements.append(Element("analysis", "analysis"))
            elements += confidences
        if self.other:
            elements.append(Element("other", "other"))
        return tuple(elements)


def grammar_of(config: Config) -> Grammar:
    """The grammar that a config asks for. A chat template may change it: `prompts.fit_grammar`."""
    reward = config.reward
    return Grammar(
        form=reward.form,
        num_answers=reward.num_answers,
        layout=reward.layout,
        thinking=config.model.thinking,
        analysis=reward.analysis,
        other=reward.other,
    )


@dataclass(frozen=True)
class Parsed:
    """What a text says under a grammar. None: not written, or not readable."""

    # [K]
    answers: tuple[str | None, ...]
    # [K]
    confidences: tuple[float | None, ...]
    other: float | None
    thinking: str | None
    analysis: str | None

    # ends[e]: the number of characters after which element e was decided, its closing tag
    # included. Only the decided elements, always the first few, have an entry
    ends: tuple[int, ...]

    # the first violation, and the number of characters after which it was certain
    violation: str | None
    violation_at: int | None

    # of the grammar
    num_elements: int

    @property
    def reason(self) -> str | None:
        """Why the whole text fails the format; None when it is exactly right."""
        if self.violation is None and len(self.ends) < self.num_elements:
            return "unfinished"
        return self.violation

    def segments(self, positions: np.ndarray) -> np.ndarray:
        """The segment of each token: positions [T], the character where it starts -> [T] int64.

        Segment e holds the tokens that write element e. Segment `num_elements`, the last, holds
        all that follows the last element or a violation. A token across a border starts in the
        earlier segment and belongs to it.
        """
        ends = np.asarray(self.ends, dtype=np.int64)
        segments = np.searchsorted(ends, positions, side="right")
        if self.violation_at is not None:
            segments = np.where(positions >= self.violation_at, self.num_elements, segments)
        return segments


@dataclass(frozen=True)
class _Violation:
    """A breach of the format, and the number of characters after which it was certain."""

    name: str
    at: int


def _find_opening(text: str, position: int, element: Element) -> int | _Violation | None:
    """Where the content of the next element starts. None: the text ends before that is known."""
    while position < len(text) and text[position].isspace():
        position += 1
    for expected in element.opening:
        if position == len(text):
            return None
        if text[position] != expected:
            return _Violation("text_outside_tags", position + 1)
        position += 1
    return position


def _find_closing(text: str, position: int, element: Element) -> int | _Violation | None:
    """Where the closing tag of an element starts. None: it is not written yet."""
    if element.kind == "think":
        # thoughts may quote tags: the first </think> ends them
        found = text.find(element.closing, position)
        return None if found < 0 else found
    tag = RESERVED_TAG.search(text, position)
    if tag is None:
        return None
    if tag.group() != element.closing:
        return _Violation("tag_inside", tag.end())
    return tag.start()


def _content_fault(element: Element, content: str) -> str | None:
    """The name of what is wrong with the content of an element."""
    if element.kind == "answer":
        visible = any(char.isprintable() and not char.isspace() for char in content)
        return None if visible else "empty_answer"
    if element.kind in ("confidence", "other"):
        readable = len(content) <= MAX_DECIMAL and PROBABILITY.fullmatch(content)
        return None if readable else "bad_confidence"
    return None


def _read_element(
    text: str, position: int, element: Element, is_open: bool
) -> tuple[str, int] | _Violation | None:
    """Content and end of the element that comes next. None: it is not finished."""
    start = position if is_open else _find_opening(text, position, element)
    if not isinstance(start, int):
        return start
    closing = _find_closing(text, start, element)
    if not isinstance(closing, int):
        return closing
    content = text[start:closing].strip()
    end = closing + len(element.closing)
    fault = _content_fault(element, content)
    if fault is not None:
        return _Violation(fault, end)
    return content, end


def parse(text: str, grammar: Grammar, think_open: bool = False) -> Parsed:
    """Read a completion strictly. Never raises; linear in the length of the text.

    `think_open`: the prompt already ends in `<think>`, so that the text begins inside it.

    Reading stops at the first violation. They are called `text_outside_tags` (any text, a tag out
    of order, a second `</think>`), `tag_inside` (another tag before the closing one),
    `empty_answer`, `bad_confidence` and `trailing_text`. A text that merely ends too early is
    `unfinished`, in `Parsed.reason` alone: it could still become right.
    """
    contents: list[str] = []
    ends: list[int] = []
    violation: _Violation | None = None
    position = 0
    for element in grammar.elements:
        is_open = think_open and element.kind == "think"
        found = _read_element(text, position, element, is_open)
        if isinstance(found, _Violation):
            violation = found
        if not isinstance(found, tuple):
            break
        content, position = found
        contents.append(content)
        ends.append(position)
    else:
        trailing = text[position:].lstrip()
        if trailing:
            violation = _Violation("trailing_text", len(text) - len(trailing) + 1)

    answers: list[str | None] = [None] * grammar.num_answers
    confidences: list[float | None] = [None] * grammar.num_answers
    single: dict[str, str] = {}
    for element, content in zip(grammar.elements, contents, strict=False):
        if element.kind == "answer":
            answers[element.slot] = content
        elif element.kind == "confidence":
            confidences[element.slot] = float(content)
        else:
            single[element.kind] = content
    return Parsed(
        answers=tuple(answers),
        confidences=tuple(confidences),
        other=float(single["other"]) if "other" in single else None,
        thinking=single.get("think"),
        analysis=single.get("analysis"),
        ends=tuple(ends),
        violation=violation.name if violation else None,
        violation_at=violation.at if violation else None,
        num_elements=len(grammar.elements),
    )


def render(
    grammar: Grammar,
    answers: Sequence[str],
    confidences: Sequence[float] = (),
    thinking: str = "",
    analysis: str = "",
    other: float = 0.0,
    think_open: bool = False,
) -> str:
    """The text that `parse` reads back as these values, confidences to two decimals."""
    single = {"think": thinking, "analysis": analysis, "other": f"{other:.2f}"}
    text = ""
    for element in grammar.elements:
        if not (think_open and element.kind == "think"):
            text += element.opening
        if element.kind == "answer":
            text += answers[element.slot]
        elif element.kind == "confidence":
            text += f"{confidences[element.slot]:.2f}"
        else:
            text += single[element.kind]
        text += element.closing
    return text


def decode_with_starts(
    ids: Sequence[int], decode: Callable[[tuple[int, ...]], str]
) -> tuple[str, np.ndarray]:
    """The text of T tokens, and the character at which each begins, [T + 1] int64.

    The last entry is where a token after them would begin: it may not depend on which one that
    is, nor on whether there is one.

    A token begins where the text of the tokens before it ends. This decodes a short moving window
    of the generated ids and never tokenises text again: another tokenisation of the same text
    would put the borders elsewhere. A token that ends inside a character adds nothing until the
    character is complete. Bytes that never become one are shown after `MAX_PENDING` tokens, or at
    the end.
    """
    text = ""
    starts = np.zeros(len(ids) + 1, dtype=np.int64)
    # ids[context:shown] are the last ids whose text was added; they give the next ones a context,
    # as a tokenizer decodes a token at the beginning of a text in another way (no leading space)
    context = 0
    shown = 0
    for n in range(1, len(ids) + 1):
        starts[n] = len(text)
        before = decode(tuple(ids[context:shown]))
        now = decode(tuple(ids[context:n]))
        waits = n - shown < MAX_PENDING and now.endswith(INCOMPLETE)
        if waits and n < len(ids):
            continue
        if len(now) < len(before):
            continue
        text += now[len(before) :]
        context, shown = shown, n
        if not waits:
            starts[n] = len(text)
    return text, starts

"""The answer grammar, in one place: which tags a completion must write, how it is rendered, and a strict parser.

    rlvr_single   <think>T</think><answer>T</answer>
    rlcr_single   <think>T</think><answer>T</answer><analysis>T</analysis><confidence>P</confidence>
    rlvr_multi    <think>T</think> ( <answer{k}>T</answer{k}> ) k=1..K
    rlcr_multi    <think>T</think> ( <answer{k}>T</answer{k}><confidence{k}>P</confidence{k}> ) k=1..K     (interleaved)
                  ... or split: all answers, then <analysis>T</analysis>, then all confidences

`<think>` and `<analysis>` are switches; `<other>P</other>` may close a form with confidences. T is text, P a plain decimal in [0, 1].
The parser reads once, left to right, and what it has decided on a prefix never changes, whatever follows: credit per answer (advantages.py)
is unbiased only because of that.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

FORMS = ("rlvr_single", "rlcr_single", "rlvr_multi", "rlcr_multi")

LAYOUTS = ("interleaved", "split")

RESERVED_TAG = re.compile(r"</?(?:think|analysis|other|answer[0-9]*|confidence[0-9]*)>")

PROBABILITY = re.compile(r"0?\.[0-9]{1,9}|0|1|1\.0{1,9}")

INCOMPLETE = "\ufffd"  # what a tokenizer shows for the first bytes of a character

MAX_PENDING = 16  # tokens; a run of broken bytes would otherwise be decoded again and again


@dataclass(frozen=True)
class Element:
    """One `<tag>...</tag>`. `kind`: think, answer, analysis, confidence or other; `slot` counts answers from 0."""

    tag: str
    kind: str
    slot: int = -1

    @property
    def opening(self) -> str:
        return f"<{self.tag}>"

    @property
    def closing(self) -> str:
        return f"</{self.tag}>"


@dataclass(frozen=True)
class Grammar:
    """Which elements a completion has, in order. Every choice is a value, so a grammar can be a dictionary key."""

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
        if self.num_answers < 1 or (not self.multi and self.num_answers != 1):
            raise ValueError(f"form {self.form} cannot have num_answers={self.num_answers}")
        if self.analysis and not (self.confident and (not self.multi or self.layout == "split")):
            raise ValueError(
                "an analysis stands between answers and confidences: it needs rlcr_single, or rlcr_multi with layout=split"
            )
        if self.other and not self.confident:
            raise ValueError("the <other> confidence needs a form with confidences")

    @property
    def multi(self) -> bool:
        return self.form.endswith("multi")

    @property
    def confident(self) -> bool:
        return self.form.startswith("rlcr")

    @cached_property
    def elements(self) -> tuple[Element, ...]:
        slots = range(self.num_answers)
        number = [str(k + 1) if self.multi else "" for k in slots]
        answers = [Element(f"answer{number[k]}", "answer", k) for k in slots]
        confidences = [
            Element(f"confidence{number[k]}", "confidence", k) for k in slots if self.confident
        ]
        body: list[Element] = []
        if self.confident and self.layout == "interleaved" and self.multi:
            for answer, confidence in zip(answers, confidences, strict=True):
                body += [answer, confidence]
        else:
            body = answers + [Element("analysis", "analysis")] * self.analysis + confidences
        return tuple(
            [Element("think", "think")] * self.thinking
            + body
            + [Element("other", "other")] * self.other
        )


@dataclass(frozen=True)
class Parsed:
    """What a text says under a grammar. `None`: not written, or not readable.

    `ends[e]` is the number of characters after which element e was decided (its closing tag included); only decided elements have one.
    `violation` names the first breach and `violation_at` the character count at which it was certain.
    """

    answers: tuple[str | None, ...]
    confidences: tuple[float | None, ...]
    other: float | None
    thinking: str | None
    analysis: str | None
    ends: tuple[int, ...]
    violation: str | None
    violation_at: int | None
    num_elements: int

    @property
    def reason(self) -> str | None:
        """Why the whole text fails the format; None when it is exactly right."""
        if self.violation is None and len(self.ends) < self.num_elements:
            return "unfinished"
        return self.violation

    def segments(self, positions: np.ndarray) -> np.ndarray:
        """Segment of the token that starts at each character position: e while element e is being written, `num_elements` afterwards and
        after a violation. A token across a border starts in, and belongs to, the earlier segment."""
        segment = np.searchsorted(np.asarray(self.ends, dtype=np.int64), positions, side="right")
        if self.violation_at is not None:
            segment = np.where(positions >= self.violation_at, self.num_elements, segment)
        return segment


def _find_opening(text: str, position: int, element: Element) -> tuple[int | None, int | None]:
    """(start of the content, None), or (None, character count at which the tag can no longer follow), or (None, None): not yet known."""
    while position < len(text) and text[position].isspace():
        position += 1
    if text.startswith(element.opening, position):
        return position + len(element.opening), None
    rest = text[position : position + len(element.opening)]
    same = next(
        (i for i, (a, b) in enumerate(zip(rest, element.opening, strict=False)) if a != b),
        len(rest),
    )
    return None, (None if position + same == len(text) else position + same + 1)


def _find_closing(text: str, position: int, element: Element) -> tuple[int | None, int | None]:
    """(start of the closing tag, None), or (None, character count at which another tag was certain), or (None, None)."""
    if element.kind == "think":  # thoughts may quote tags: the first </think> ends them
        found = text.find(element.closing, position)
        return (None if found < 0 else found), None
    tag = RESERVED_TAG.search(text, position)
    if tag is None:
        return None, None
    return (tag.start(), None) if tag.group() == element.closing else (None, tag.end())


def _content_fault(element: Element, content: str) -> str | None:
    if element.kind == "answer" and not any(c.isprintable() and not c.isspace() for c in content):
        return "empty_answer"
    if element.kind in ("confidence", "other") and not PROBABILITY.fullmatch(content):
        return "bad_confidence"
    return None


def parse(text: str, grammar: Grammar, think_open: bool = False) -> Parsed:
    """Read `text` strictly under `grammar`; never raises. `think_open`: the prompt already ends in `<think>`.

    Violations: `text_outside_tags` (also a tag out of order, or a second `</think>`), `tag_inside` (another tag before the closing one),
    `empty_answer`, `bad_confidence`, `trailing_text`. A text that merely stops early is `unfinished` (in `Parsed.reason`).
    """
    contents: list[str] = []
    ends: list[int] = []
    violation: tuple[str, int] | None = None
    position = 0
    for index, element in enumerate(grammar.elements):
        start: int | None = 0
        if not (index == 0 and think_open and element.kind == "think"):
            start, breach = _find_opening(text, position, element)
            if breach is not None:
                violation = ("text_outside_tags", breach)
        if start is None:
            break
        close, breach = _find_closing(text, start, element)
        if breach is not None:
            violation = ("tag_inside", breach)
        if close is None:
            break
        content, position = text[start:close].strip(), close + len(element.closing)
        fault = _content_fault(element, content)
        if fault is not None:
            violation = (fault, position)
            break
        contents.append(content)
        ends.append(position)
    else:
        trailing = text[position:].lstrip()
        if trailing:
            violation = ("trailing_text", len(text) - len(trailing) + 1)

    decided = list(zip(grammar.elements, contents, strict=False))
    first = {element.kind: content for element, content in decided}
    answers = {element.slot: content for element, content in decided if element.kind == "answer"}
    confidences = {
        element.slot: float(content) for element, content in decided if element.kind == "confidence"
    }
    return Parsed(
        answers=tuple(answers.get(k) for k in range(grammar.num_answers)),
        confidences=tuple(confidences.get(k) for k in range(grammar.num_answers)),
        other=float(first["other"]) if "other" in first else None,
        thinking=first.get("think"),
        analysis=first.get("analysis"),
        ends=tuple(ends),
        violation=violation[0] if violation else None,
        violation_at=violation[1] if violation else None,
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
    """The text that `parse` reads back as these values (confidences to two decimals)."""
    texts = {"think": thinking, "analysis": analysis, "other": f"{other:.2f}"}
    out = ""
    for element in grammar.elements:
        if element.kind == "answer":
            content = answers[element.slot]
        elif element.kind == "confidence":
            content = f"{confidences[element.slot]:.2f}"
        else:
            content = texts[element.kind]
        opening = "" if think_open and element.kind == "think" else element.opening
        out += opening + content + element.closing
    return out


def decode_with_starts(
    ids: Sequence[int], decode: Callable[[tuple[int, ...]], str]
) -> tuple[str, np.ndarray]:
    """The text of token `ids`, and for each token the number of characters that the tokens before it had already fixed ([R] int64).

    Works from the generated ids by decoding a short moving window, never by tokenising text again. A token that ends inside a character
    adds nothing until the character is whole; bytes that never become one are shown after `MAX_PENDING` tokens or at the end.
    """
    text, starts = "", np.zeros(len(ids), dtype=np.int64)
    context, read = 0, 0  # ids[context:read] is the window already in `text`
    for n in range(1, len(ids) + 1):
        starts[n - 1] = len(text)
        before, now = decode(tuple(ids[context:read])), decode(tuple(ids[context:n]))
        waiting = now.endswith(INCOMPLETE) and n < len(ids) and n - read < MAX_PENDING
        if waiting or len(now) < len(before):
            continue
        text += now[len(before) :]
        context, read = read, n
    return text, starts

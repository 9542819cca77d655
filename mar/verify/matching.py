"""Is this answer that gold, and how many golds does a list of answers hit: one normaliser, and a maximum matching."""

import json
import re
import unicodedata
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from pathlib import Path

from mar.records import Gold

Verifier = Callable[
    [str, Sequence[Gold]], tuple[int, ...]
]  # the golds, by index, that an answer may take

Key = Callable[[str], Hashable]

Answers = Sequence[str | None]  # None: not written

BLANKS = (
    "\u115f\u1160\u2800\u3164\uffa0\u2120\u2122\u00a9\u00ae"  # what shows nothing, and trade marks
)

APOSTROPHES = "'\u2018\u2019\u201b\u2032\u02b9\u02bc"

ACCENT = re.compile("[\u0300-\u036f\ufe00-\ufe0f]")

SPACED = "$<=>|~\u2044"  # symbols that stand for a space, as all punctuation does

KEPT = ".,-+#%^"  # whether these mean something depends on their neighbours

JOINED = re.compile(
    r"'(?![0-9])|(?<=[^\W\d_])\.(?=[^\W\d_])|(?<=[0-9])(?:,(?=[0-9]{3}(?![0-9]))|\s+(?=%))"
)

# above: Crohn's, U.S., 1,000, 5 %; below: .5 is 0.5, then what means nothing (3.5, -5, C++, C#, 5% and 10^5 do)
LEADING_POINT = re.compile(r"(?<![\w.])\.(?=[0-9])")

SIGNS = r"(?<![+#%^])(?!(?<=\w)(?:\+\+?|[#%]|\^(?=\w))(?![+#%^]))[+#%^]+"

STRAY = re.compile(r"(?<![0-9])\.|\.(?![0-9])|[,']|(?<=\S)-|-(?![0-9])|" + SIGNS)

MONTHS = (
    "january|february|march|april|may|june|july|august|september|october|november|december".split(
        "|"
    )
)

DATE = re.compile(
    r"(?:(\d{1,2})(?:st|nd|rd|th)? (?:of )?([a-z]{3,9})|([a-z]{3,9}) (\d{1,2})(?:st|nd|rd|th)?) (\d{4})"
)

# whole answers -> their plain form: numbers below 100, and abbreviations of medicine, none that commonly means two diseases
FORMS: dict[str, str] = json.loads((Path(__file__).parent / "forms.json").read_text())


class _Folding(dict[int, str]):
    """For `str.translate`, filled on demand: by character, as NFKD of a whole text is quadratic in runs of accents."""

    def __missing__(self, code: int) -> str:
        kind = unicodedata.decomposition(chr(code)).split(" ")[0]
        out = {"<super>": "^", "<fraction>": " "}.get(
            kind, ""
        )  # a power is not a digit more: neither 105 nor 11/2
        for c in unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", chr(code)).casefold()):
            category = unicodedata.category(c)
            if c in APOSTROPHES or category == "Pd" or c == "\u2212":
                out += "'" if c in APOSTROPHES else "-"
            elif c.isspace() or (
                c not in KEPT and (category[0] == "P" or category == "Sk" or c in SPACED)
            ):
                out += " "
            elif category[0] != "C" and category != "Me" and not ACCENT.fullmatch(c):
                out += c
        return self.setdefault(code, "" if chr(code) in BLANKS else out)


FOLDING = _Folding()


def _plain_form(words: str) -> str:
    """One way of writing what is a number (a spelt one below 100; 3.50), a day (3rd of May 1999) or a medical abbreviation, as a whole."""
    if date := DATE.fullmatch(words):
        month = next(
            (n for n, name in enumerate(MONTHS, 1) if name.startswith(date[2] or date[3])), 0
        )
        return (
            f"{date[5]} {month:02} {int(date[1] or date[4]):02}" if month else words
        )  # what 1999-05-03 is by now
    if re.fullmatch(r"-?\d+\.\d+%?", words):
        return re.sub(r"\.?0+(?=%|$)", "", words)
    return FORMS.get(words, words)


def _normalise(text: str) -> str:
    words = STRAY.sub(" ", LEADING_POINT.sub("0.", JOINED.sub("", text.translate(FOLDING)))).split()
    kept: list[str] = []
    for word in words[:-1]:
        kept += [word] * (
            word not in ("the", "an") and bool(kept or word != "a")
        )  # "vitamin a deficiency" keeps its a
    signs = (
        c for c in text if unicodedata.category(c)[0] in "PS" and c not in BLANKS
    )  # an answer such as "+"
    return _plain_form(" ".join(kept + words[-1:]) or "".join(signs))


_normalise_short = lru_cache(maxsize=1 << 16)(_normalise)


def normalise(text: str) -> str:
    """The one form for matching, repeats and metrics: no case, accents, width, articles, punctuation, invisible signs; numbers, days and medical
    abbreviations in one form. Numbers keep point, sign, power and per cent. Linear in the length; "" only when nothing visible was written."""
    return _normalise_short(text) if len(text) <= 200 else _normalise(text)


@lru_cache(maxsize=1 << 16)
def _names(gold: Gold) -> frozenset[str]:
    """What an answer may be, normalised, to be this gold; never "" (nothing visible)."""
    return frozenset(map(normalise, (gold.name, *gold.aliases))) - {""}


def text_verifier(answer: str, golds: Sequence[Gold]) -> tuple[int, ...]:
    """The golds whose name or one of whose aliases the answer is."""
    wanted = normalise(answer)
    return tuple(i for i, gold in enumerate(golds) if wanted in _names(gold))


def expected_hits(
    answers: Answers, golds: Sequence[Gold], verifier: Verifier = text_verifier
) -> tuple[float, ...]:
    """[K] expected hit of each answer where one gold is right with its probability: the mass that no earlier answer had.

    The expectation of `matching_increments` against a drawn label, and like it decided by a_1..a_k alone.
    """
    covered: set[int] = set()
    out = []
    for answer in answers:
        new = set(() if answer is None else verifier(answer, golds)) - covered
        covered |= new
        out.append(float(sum(golds[g].probability or 0.0 for g in sorted(new))))
    return tuple(out)


def matching_increments(
    answers: Answers,
    golds: Sequence[Gold],
    verifier: Verifier = text_verifier,
    key: Key = normalise,
) -> tuple[tuple[float, ...], tuple[int | None, ...]]:
    """(hits [K], taken [K]): y_k = M(a_1..a_k) - M(a_1..a_k-1), and the gold of each answer in the final matching.

    M is the maximum matching of the distinct answers (by `key`) with the golds. A path that augments it from slot k
    moves the golds of earlier slots but un-hits none: y_k is 0 or 1 and depends on a_1..a_k alone.
    """
    marks = [None if answer is None else key(answer) for answer in answers]
    new = [mark is not None and mark not in marks[:slot] for slot, mark in enumerate(marks)]
    candidates = [
        verifier(a, golds) if a is not None and fresh else ()
        for a, fresh in zip(answers, new, strict=True)
    ]
    owner: dict[int, int] = {}  # gold -> slot

    def augment(slot: int, visited: set[int]) -> bool:
        for gold in candidates[slot]:
            if gold not in visited:
                visited.add(gold)
                if gold not in owner or augment(owner[gold], visited):
                    owner[gold] = slot
                    return True
        return False

    hits = tuple(float(augment(slot, set())) for slot in range(len(candidates)))
    gold_of = {slot: gold for gold, slot in owner.items()}
    return hits, tuple(map(gold_of.get, range(len(hits))))


def repeats(
    answers: Answers,
    golds: Sequence[Gold] = (),
    verifier: Verifier = text_verifier,
    key: Key = normalise,
) -> tuple[bool, ...]:
    """[K] whether an earlier answer is the same by `key`, or means the same single gold (two aliases of it)."""
    out: list[bool] = []
    seen: set[tuple[str, Hashable]] = set()
    for answer in answers:
        candidates = () if answer is None else verifier(answer, golds)
        marks: set[tuple[str, Hashable]] = {
            ("gold", gold) for gold in candidates if len(candidates) == 1
        }
        marks |= set() if answer is None else {("text", key(answer))}
        out.append(not marks.isdisjoint(seen))
        seen |= marks
    return tuple(out)

"""Does this answer mean that gold, and how many golds does a list of answers hit?

One normaliser, used for matching, repeats and metrics alike, and a maximum matching of answers and
golds.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from pathlib import Path

from mar.records import Gold

# (an answer, golds) -> the indices of the golds that the answer may take
Verifier = Callable[[str, Sequence[Gold]], tuple[int, ...]]

# what makes two answers the same
Key = Callable[[str], Hashable]

# None: not written
Answers = Sequence[str | None]

# --- the normaliser: characters ------------------------------------------------------------------

# what shows nothing, and trade marks
BLANKS = "\u115f\u1160\u2800\u3164\uffa0\u2120\u2122\u00a9\u00ae"

APOSTROPHES = "'\u2018\u2019\u201b\u2032\u02b9\u02bc"
MINUS = "\u2212"

ACCENT = re.compile("[\u0300-\u036f\ufe00-\ufe0f]")

# symbols that stand for a space, as all punctuation does
SPACED = "$<=>|~\u2044"

# signs that mean something or nothing, depending on their neighbours
KEPT = ".,-+#%^"

# --- the normaliser: signs between characters ----------------------------------------------------

# removed without leaving a space: the signs of Crohn's, U.S., 1,000 and 5 %
JOINED = re.compile(
    r"'(?![0-9])"
    r"|(?<=[^\W\d_])\.(?=[^\W\d_])"
    r"|(?<=[0-9])(?:,(?=[0-9]{3}(?![0-9]))|\s+(?=%))"
)

# .5 is 0.5
LEADING_POINT = re.compile(r"(?<![\w.])\.(?=[0-9])")

# signs that mean nothing where they stand; those of 3.5, -5, C++, C#, 5% and 10^5 do
SIGNS = r"(?<![+#%^])(?!(?<=\w)(?:\+\+?|[#%]|\^(?=\w))(?![+#%^]))[+#%^]+"
STRAY = re.compile(r"(?<![0-9])\.|\.(?![0-9])|[,']|(?<=\S)-|-(?![0-9])|" + SIGNS)

# --- the normaliser: whole answers ---------------------------------------------------------------

MONTHS = (
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
)

# 3 may 1999, 3rd of may 1999; may 3 1999, may 3rd 1999
DATE = re.compile(
    r"(?:(\d{1,2})(?:st|nd|rd|th)? (?:of )?([a-z]{3,9})|([a-z]{3,9}) (\d{1,2})(?:st|nd|rd|th)?)"
    r" (\d{4})"
)

DECIMAL = re.compile(r"-?\d+\.\d+%?")

# an answer -> its plain form: numbers below 100, and abbreviations of medicine, none of which
# commonly means two diseases
FORMS: dict[str, str] = json.loads((Path(__file__).parent / "forms.json").read_text())

# texts up to this length come again and are remembered
SHORT = 200


def _fold(char: str) -> str:
    """What one character becomes: lower case, without accents, a space for punctuation."""
    if char in BLANKS:
        return ""
    # a power or a fraction is not one digit more: neither 105 nor 11/2
    kind = unicodedata.decomposition(char).split(" ")[0]
    folded = {"<super>": "^", "<fraction>": " "}.get(kind, "")
    # once before and once after the change of case, which may bring up new compositions
    decomposed = unicodedata.normalize("NFKD", char).casefold()
    for part in unicodedata.normalize("NFKD", decomposed):
        category = unicodedata.category(part)
        is_punctuation = category[0] == "P" or category == "Sk" or part in SPACED
        is_invisible = category[0] == "C" or category == "Me" or ACCENT.fullmatch(part)
        if part in APOSTROPHES:
            folded += "'"
        elif category == "Pd" or part == MINUS:
            folded += "-"
        elif part.isspace() or (is_punctuation and part not in KEPT):
            folded += " "
        elif not is_invisible:
            folded += part
    return folded


class _Folding(dict[int, str]):
    """A table for `str.translate`, filled on demand.

    By character, because NFKD of a whole text is quadratic in the length of runs of accents.
    """

    def __missing__(self, code: int) -> str:
        return self.setdefault(code, _fold(chr(code)))


FOLDING = _Folding()


def _plain_date(words: str) -> str | None:
    """`1999 05 03` of an answer that is a day in words, which is what 1999-05-03 becomes."""
    date = DATE.fullmatch(words)
    if date is None:
        return None
    name = date[2] or date[3]
    day = int(date[1] or date[4])
    for number, month in enumerate(MONTHS, 1):
        if month.startswith(name):
            return f"{date[5]} {number:02} {day:02}"
    return None


def _plain_form(words: str) -> str:
    """One way to write an answer that is, as a whole, a day, a number or an abbreviation."""
    if DATE.fullmatch(words):
        return _plain_date(words) or words
    if DECIMAL.fullmatch(words):
        # 3.50 is 3.5, and 2.00 is 2
        return re.sub(r"\.?0+(?=%|$)", "", words)
    return FORMS.get(words, words)


def _without_articles(words: Sequence[str]) -> list[str]:
    """`a` goes only at the beginning: vitamin a deficiency. The last word always stays."""
    kept: list[str] = []
    for word in words[:-1]:
        is_article = word in ("the", "an") or (word == "a" and not kept)
        if not is_article:
            kept.append(word)
    return [*kept, *words[-1:]]


def _normalise(text: str) -> str:
    folded = text.translate(FOLDING)
    joined = JOINED.sub("", folded)
    pointed = LEADING_POINT.sub("0.", joined)
    words = STRAY.sub(" ", pointed).split()
    plain = " ".join(_without_articles(words))
    if not plain:
        # an answer of signs alone, such as "+"
        signs = (c for c in text if unicodedata.category(c)[0] in "PS" and c not in BLANKS)
        plain = "".join(signs)
    return _plain_form(plain)


_normalise_short = lru_cache(maxsize=1 << 16)(_normalise)


def normalise(text: str) -> str:
    """The one form of a text for matching, repeats and metrics. Linear in its length.

    Gone are case, accents, width, articles, punctuation and invisible signs; numbers, days and
    medical abbreviations have one form. Numbers keep point, sign, power and per cent. The result
    is "" only where nothing visible was written.
    """
    if len(text) <= SHORT:
        return _normalise_short(text)
    return _normalise(text)


@lru_cache(maxsize=1 << 16)
def _accepted(gold: Gold) -> frozenset[str]:
    """The normalised answers that are this gold; never "" (nothing visible)."""
    names = (gold.name, *gold.aliases)
    return frozenset(normalise(name) for name in names) - {""}


def text_verifier(answer: str, golds: Sequence[Gold]) -> tuple[int, ...]:
    """The golds whose name or one of whose aliases the answer is."""
    wanted = normalise(answer)
    return tuple(i for i, gold in enumerate(golds) if wanted in _accepted(gold))


def matching_increments(
    answers: Answers,
    golds: Sequence[Gold],
    verifier: Verifier = text_verifier,
    key: Key = normalise,
) -> tuple[tuple[float, ...], tuple[int | None, ...]]:
    """The hits y_k of K answers [K], and the gold that each has in the final matching [K].

        y_k = M(a_1..a_k) - M(a_1..a_k-1)

    M is the size of the maximum matching of the distinct answers (by `key`) with the golds: an
    answer takes at most one gold, and a gold at most one answer. It grows by augmenting paths
    (Berge 1957): answer k may push an earlier one on to another of its golds, but never out. So
    y_k is 0 or 1 and depends on a_1..a_k alone.
    """
    candidates: list[tuple[int, ...]] = []
    seen: set[Hashable] = set()
    for answer in answers:
        mark = None if answer is None else key(answer)
        if answer is None or mark in seen:
            candidates.append(())
        else:
            seen.add(mark)
            candidates.append(verifier(answer, golds))

    slot_of: dict[int, int] = {}  # gold -> the answer that has it

    def augment(slot: int, visited: set[int]) -> bool:
        """Give the answer a gold, moving others on where needed; False: there is no way."""
        for gold in candidates[slot]:
            if gold in visited:
                continue
            visited.add(gold)
            if gold not in slot_of or augment(slot_of[gold], visited):
                slot_of[gold] = slot
                return True
        return False

    hits = tuple(float(augment(slot, set())) for slot in range(len(candidates)))
    gold_of = {slot: gold for gold, slot in slot_of.items()}
    taken = tuple(gold_of.get(slot) for slot in range(len(candidates)))
    return hits, taken


def expected_hits(
    answers: Answers, golds: Sequence[Gold], verifier: Verifier = text_verifier
) -> tuple[float, ...]:
    """[K] the probability that each answer hits, where one gold is right with its probability.

    That is the mass of the golds that no earlier answer had: the expectation of
    `matching_increments` over drawn labels. Like it, decided by a_1..a_k alone.
    """
    covered: set[int] = set()
    hits = []
    for answer in answers:
        candidates = set() if answer is None else set(verifier(answer, golds))
        new = candidates - covered
        covered |= new
        # sorted: a sum of floats depends on its order
        hits.append(float(sum(golds[gold].probability or 0.0 for gold in sorted(new))))
    return tuple(hits)


def repeats(
    answers: Answers,
    golds: Sequence[Gold] = (),
    verifier: Verifier = text_verifier,
    key: Key = normalise,
) -> tuple[bool, ...]:
    """[K] whether an earlier answer is the same by `key`, or means the same gold.

    The latter are two aliases of one gold. An answer that may be several golds does not count
    there: it is not known which of them is meant.
    """
    repeated = []
    seen_keys: set[Hashable] = set()
    seen_golds: set[int] = set()
    for answer in answers:
        if answer is None:
            repeated.append(False)
            continue
        mark = key(answer)
        candidates = verifier(answer, golds)
        meant = set(candidates) if len(candidates) == 1 else set()
        repeated.append(mark in seen_keys or not meant.isdisjoint(seen_golds))
        seen_keys.add(mark)
        seen_golds |= meant
    return tuple(repeated)


def exact_masses(
    answers: Answers, golds: Sequence[Gold], verifier: Verifier = text_verifier
) -> tuple[float, ...]:
    """[K] the probability of the gold that each answer takes in the maximum matching, else 0."""
    _, taken = matching_increments(answers, golds, verifier)
    return tuple(0.0 if gold is None else golds[gold].probability or 0.0 for gold in taken)


def meanings(
    answers: Answers, golds: Sequence[Gold], verifier: Verifier = text_verifier
) -> tuple[str | None, ...]:
    """[K] equal for answers that mean the same: the name of the one gold that an answer can be, or
    the answer itself, normalised. None where nothing was written."""
    keys: list[str | None] = []
    for answer in answers:
        if answer is None:
            keys.append(None)
            continue
        candidates = verifier(answer, golds)
        name = golds[candidates[0]].name if len(candidates) == 1 else answer
        keys.append(normalise(name))
    return tuple(keys)


def candidates(
    answers: Answers, golds: Sequence[Gold], verifier: Verifier = text_verifier
) -> tuple[tuple[int, ...], ...]:
    """[K] the golds, by index, that each answer can be."""
    return tuple(() if answer is None else verifier(answer, golds) for answer in answers)


def remembering(verifier: Verifier) -> Verifier:
    """The same verifier of one example, asked once about each answer.

    It compares with all golds or with the targets: their number tells the two apart.
    """
    known: dict[tuple[str, int], tuple[int, ...]] = {}

    def verify(answer: str, golds: Sequence[Gold]) -> tuple[int, ...]:
        question = (answer, len(golds))
        if question not in known:
            known[question] = verifier(answer, golds)
        return known[question]

    return verify

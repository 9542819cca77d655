"""The one form of an answer in words: what two spellings of the same thing have in common.

One normaliser serves matching, repeats and metrics alike. Two things may go wrong, and they are
not equally bad. A wrong accept pays for a false answer, and a policy finds it; a wrong reject costs
a right one now and then. So whatever can carry a meaning stays (signs between numbers, relations,
currencies, charges), and a spelling is merged with another only where both always say the same.
"""

import itertools
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

# --- characters ----------------------------------------------------------------------------------

# what shows nothing, and trade marks
BLANKS = "\u115f\u1160\u2800\u3164\uffa0\u2120\u2122\u00a9\u00ae"

# accents and variation selectors, without the strokes that negate a sign (\u0338: not equal)
ACCENT = re.compile("[\u0300-\u0334\u0339-\u036f\ufe00-\ufe0f]")

# signs that are written in several ways: the first is the one that stays
VARIANTS = (
    "'\u2018\u2019\u201b\u2032\u02b9\u02bc",
    '"\u201c\u201d\u201e\u201f\u2033',
    "-\u2212",
    "/\u2044\u2215",
    ":\u2236",
    "*\u2217",
    "|\u2223",
    "~\u223c",
    "\u00b7\u22c5\u2219",
    "%\u066a",
    "\u00b0\u02da",
    "\u2264\u2266\u2a7d",
    "\u2265\u2267\u2a7e",
    "\u2260",
    "\u2248\u2243\u2245",
    "\u2192\u27f6",
    "\u21d2\u27f9",
    "\u2030",
    "\u2031",
)
SIGN_OF = {variant: signs[0] for signs in VARIANTS for variant in signs}

# punctuation that means something or nothing, depending on its neighbours
KEPT = ".,-+#%^!\"'/:*\\&\u230a\u230b\u2308\u2309\u2016\u2020\u2021\u00a7"

# [0, 1) of numbers
INTERVAL = re.compile(
    r"([\[(])\s{0,3}(-?(?:[0-9.]+|\u221e))\s{0,3}[,;]\s{0,3}([-+]?(?:[0-9.]+|\u221e))\s{0,3}([\])])"
)

# HBsAg (-), and (+)-catechin; Rh(D)+
RESULT = re.compile(r"\(\s?([-+\u2212])\s?\)-?|(?<=[\])])([-+\u2212])(?!\S)")

# -x, -\\frac{1}{2} and -(x+1): the minus of a whole formula. (- A is a list's dash.)
MINUS = re.compile(
    r"^(\s*\$*)[-\u2212](?:\s?(?=\\[A-Za-z]|[({])|(?=[^\W\d_](?![^\W_])))(?!\s?\([^\W\d_]{3})"
)

SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+")


def _fold(char: str) -> str:
    """What one character becomes: lower case, without accents, a space for punctuation."""
    if char in BLANKS:
        return ""
    if char in SIGN_OF:
        return SIGN_OF[char]
    # a power or a fraction is not one digit more: neither 105 nor 11/2
    kind = unicodedata.decomposition(char).split(" ")[0]
    folded = {"<super>": "^", "<fraction>": " "}.get(kind, "")
    # once before and once after the change of case, which may bring up new compositions
    decomposed = unicodedata.normalize("NFKD", char).casefold()
    for part in unicodedata.normalize("NFKD", decomposed):
        category = unicodedata.category(part)
        is_punctuation = category[0] == "P" or category == "Sk"
        is_invisible = category[0] == "C" or category == "Me" or ACCENT.fullmatch(part)
        if part in SIGN_OF:
            folded += SIGN_OF[part]
        elif category == "Pd":
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

# --- signs between characters --------------------------------------------------------------------

MONEY = "$\u00a3\u20ac\u00a5"
RELATIONS = "<>=\u2264\u2265\u2260\u2248\u00b1\u2192\u21d2\u2190\u2194\u21d4"
LETTER = r"[^\W\d_]"

# where a number has to follow
NUMBER = rf"(?=-?[{MONEY}]?-?\.?[0-9\u221e])"

# where a number or a variable of one letter stands
ATOM_BEFORE = rf"[0-9]|\b{LETTER}"
ATOM_AFTER = rf"-?\.?[0-9]|{LETTER}\b"

# units that stand behind a number with or without a space (5 k and 3 d may be something else)
CLEAR_UNITS = "kg|mg|mcg|\u03bcg|ml|dl|mol|mmol|cm|mm|km"
TIMES = "hr|hour|day|week|month|year|yr"
UNITS = "kg|g|mg|mcg|\u03bcg|l|dl|ml|mol|mmol|m|cm|mm|km|n|j|w|k|s|min|h|d"
AMOUNT = rf"(?<![\w.\-/:^+*{MONEY}])([0-9][0-9.]*(?: (?:thousand|million|billion|trillion))?)"

# what encloses a word or an answer
ENCLOSURES = (
    # **flu**, of Markdown
    (r"(?<!\w)(\*{1,3})(?=[^\s*])([^*]+)(?<=\S)\1(?!\w)", r"\2"),
    (r"(?<![\w.'])\"([^\"]*)\"", r" \1 "),
    (r"(?<![\w'])'([^']*)'(?![\w'])", r" \1 "),
    # $5$, of LaTeX
    (r"^ ?\$([^$]+)\$ ?$", r"\1"),
    (r"^ ?<([^<>=]*)> ?$", r"\1"),
)

# signs that are written with several characters
LONG_SIGNS = (
    ("=\u0338", "\u2260"),
    (r"\+/?-(?= ?\.?[0-9])", "\u00b1"),
    ("<=+>", "\u21d4"),
    ("<-+>", "\u2194"),
    ("(?<!=)=+>", "\u21d2"),
    ("(?<!-)-+>", "\u2192"),
    (r"<-+(?![-. 0-9])", "\u2190"),
    ("<=", "\u2264"),
    (">=", "\u2265"),
    ("!=+|=/=", "\u2260"),
    ("==+", "="),
    (rf"~ ?(?=[\w.{MONEY}-])", "\u2248"),
    ("~", " "),
    (r"(?<=\w)\*\*(?=[-\w])", "^"),
)

# signs that are written as words
WORDS_OF_SIGNS = (
    (rf"\b(?:less than or equal to|at most|no more than) {NUMBER}", "\u2264"),
    (rf"\b(?:(?:greater|more) than or equal to|at least|no less than) {NUMBER}", "\u2265"),
    (rf"\b(?:less than|under|below) {NUMBER}", "<"),
    (rf"\b(?:(?:greater|more) than|over|above) {NUMBER}", ">"),
    (r"(?<![\w.,/:-])([0-9][0-9.,]*) or (?:more|greater|higher|above)\b", "\u2265\\1"),
    (r"(?<![\w.,/:-])([0-9][0-9.,]*) or (?:less|fewer|lower|below)\b", "\u2264\\1"),
    (rf"\bnot equal to {NUMBER}", "\u2260"),
    (rf"\b(?:approximately|about|around|roughly|circa) {NUMBER}", "\u2248"),
    (rf"^ ?(?:minus|negative) {NUMBER}", "-"),
    (r"(?<=[0-9]) ?per ?cent\b", "%"),
)

# 1,000 and .5 and 5 % and 10^-5
NUMERALS = (
    (r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", ""),
    (r"(?<![\w.])\.(?=[0-9])", "0."),
    (r"(?<=[0-9])(?:\\ ?| )(?=[%\u2030\u2031\u00b0])", ""),
    (r"(?<=\u00b0) (?=[cfk]\b)", ""),
    (rf"(?<=[0-9])(?=(?:{CLEAR_UNITS})\b)", " "),
)

# signs between two numbers or variables: 5-10, 1/2, 3:1, 2*3, 5+10, a/b, 5 mg/l
BETWEEN = (
    # a day is no range
    (r"(?<![0-9])([0-9]{4})[-/]([0-9]{1,2})[-/]([0-9]{1,2})(?![0-9])", r"\1 \2 \3"),
    (r"(?<![0-9])([0-9]{1,2})[-/]([0-9]{1,2})[-/]([0-9]{4})(?![0-9])", r"\1 \2 \3"),
    (r"(?<=[0-9%]) ?(?:- |\.\.\.?)(?=-?\.?[0-9])", "-"),
    # what begins an answer or follows a relation is a sign, no hyphen: - 5
    (rf"(^|[{RELATIONS}]) ?- (?=[{MONEY}]?\.?[0-9\u221e])", r"\1-"),
    (r"(?<=[0-9]) ?([/:*|\\\u00b7\u00d7]) ?(?=[-+]?\.?[0-9])", r"\1"),
    (r"(?<=[0-9]) ?x ?(?=[0-9])", "\u00d7"),
    (r"(?<=[\w%]) ?\+ (?=[\w.])", "+"),
    # also with spaces: 5 mg / dl, 3 / hour, x / y
    (rf"\b({UNITS}) ?/ ?(?=(?:{UNITS}|{TIMES})\b)", "\\1\u2044"),
    (rf"(?<=[0-9]) ?/ ?(?={LETTER})", "/"),
    (rf"(?<={ATOM_BEFORE}) ?([/*|\\\u00b7]) ?(?={ATOM_AFTER})", r"\1"),
    (rf"(?<={ATOM_BEFORE}) ?\^ ?(?=-?\w)", "^"),
    # a charge or a result, or 65 +, with a space before it: Na +, O -, HER2 -
    (r"(?<=\w) \+$", "+"),
    (rf"((?:\b{LETTER}{{1,2}}|{LETTER}[0-9])) -$", r"\1-"),
    # A* is no A, and 5/day no 5 day
    (rf"(?!(?<=\b{LETTER})\*(?!\S))(?!(?<=[0-9])/{LETTER})[/*\\\u00b7](?!{ATOM_AFTER})", " "),
    (rf"(?<!{ATOM_BEFORE})[/*\\\u00b7]", " "),
    (rf"(?<!{ATOM_BEFORE})\|(?!{ATOM_AFTER})", " "),
    ("\u2044", "/"),
    (r"(?<![0-9]):|:(?![0-9])", " "),
)

# relations and currencies
AMOUNTS = (
    (rf" ?([{RELATIONS}]) ?", r"\1"),
    ("^[=\u2192\u21d2]+|=+$", ""),
    (rf"(?<=[{MONEY}]) (?=\.?[0-9])", ""),
    (rf"{AMOUNT} ?([{MONEY}])(?![\w.])", r"\2\1"),
    (rf"{AMOUNT} dollars?\b", r"$\1"),
    (rf"{AMOUNT} euros?\b", "\u20ac\\1"),
    (rf"(?<=[{MONEY}])([0-9]+)\.00(?![\w.])", r"\1"),
    # a sign of money without an amount
    (rf"(?<!\S)[{MONEY}](?!\S)", " "),
)

# the signs of Crohn's, U.S., 5', 6'2", n! and f'
MARKS = (
    (r"(?<=[0-9])''", '"'),
    (rf"(?<=[0-9])'(?={LETTER})", ""),
    (rf"(?<!\b{LETTER})(?<![0-9'])'+(?![0-9])", ""),
    (rf"'+(?={LETTER})", ""),
    (r"(?<=[0-9]') (?=[0-9])", ""),
    (r'(?<![0-9])"', " "),
    (rf"(?<![0-9])(?<!\b[nkmx])!(?!{LETTER}\b)", " "),
    (rf"(?<={LETTER})\.(?={LETTER})", ""),
)

# what means nothing where it stands, unlike the signs of 3.5, -5, C++, C#, 5% and 10^5; the minus
# of O-, Cl- and HER2- is a charge or a result
STRAY = (
    (r"(?<![0-9])\.|\.(?![0-9])|,|(?<!\w)'(?=[0-9])", " "),
    # a-fib is no article and fib
    (rf"^ ?a-(?={LETTER}{LETTER})", "a"),
    (
        rf"(?<={LETTER})-(?=\w)|-(?![\w.{MONEY}\u221e])(?<![0-9]-)(?<!\b{LETTER}-)(?<!\b{LETTER}{LETTER}-)",
        " ",
    ),
    (rf"-(?={LETTER})", " "),
    (r"(?<![+#%^])(?!(?<=\w)(?:\+\+?|[#%]|\^(?=-?\w))(?![+#%^]))[+#%^]+", " "),
)

RULES = [
    (re.compile(pattern), replacement)
    for rules in (
        ENCLOSURES,
        LONG_SIGNS,
        WORDS_OF_SIGNS,
        NUMERALS,
        BETWEEN,
        AMOUNTS,
        MARKS,
        STRAY,
    )
    for pattern, replacement in rules
]

# --- words ---------------------------------------------------------------------------------------

# a hyphen or a space behind them is a matter of taste: co-trimoxazole, non small cell
PREFIXES = frozenset(
    "anti auto co hyper hypo inter intra micro multi neo non peri post pre pseudo semi sub".split()
)
# of what is joined to a prefix: a co-op is no coop
SHORTEST_STEM = 4

E_WORDS = frozenset("mail mails book books commerce cigarette cigarettes".split())

# behind the name of a person, with or without its possessive: Crohn's disease
NAMED_AFTER = frozenset(
    "disease syndrome sign palsy sarcoma lymphoma thyroiditis encephalopathy chorea contracture "
    "esophagus tumor phenomenon ulcer gangrene aneurysm diverticulum granulomatosis".split()
)

# --- whole answers -------------------------------------------------------------------------------

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

IRREGULAR_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}


def _ordinals() -> dict[str, str]:
    """1st -> first, to 99th -> ninety ninth."""
    found = {}
    for words, number in FORMS.items():
        if not number.isdecimal() or number == "0":
            continue
        *tens, last = words.split()
        regular = last[:-1] + "ieth" if last.endswith("y") else last + "th"
        ordinal = IRREGULAR_ORDINALS.get(last, regular)
        ending = ordinal[-2:]
        found[number + ending] = " ".join([*tens, ordinal])
    return found


ORDINALS = _ordinals()

# texts up to this length come again and are remembered; of longer ones the last few, because one
# completion is compared several times
SHORT = 200
# nearly all texts need one that changes something, and one that does not
MAX_PASSES = 8


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
    if re.fullmatch("[0-9]:[0-9]", words):
        # a ratio of small numbers is their quotient; 9:11 is a time, and 9/11 a day
        return words.replace(":", "/")
    percentage = re.fullmatch(r"([a-z ]+) per ?cent", words)
    if percentage and FORMS.get(percentage[1], "").isdecimal():
        # five percent
        return FORMS[percentage[1]] + "%"
    return FORMS.get(words, words)


def _without_articles(words: Sequence[str]) -> list[str]:
    """`a` goes only at the beginning: vitamin a deficiency. The last word always stays.

    It stays before what takes no article: A, B and A and B are no B.
    """
    kept: list[str] = []
    for word, following in itertools.pairwise(words):
        takes_article = len(following) > 1 and following not in ("and", "or")
        opens = word == "a" and not kept and takes_article
        if word not in ("the", "an") and not opens:
            kept.append(word)
    return [*kept, *words[-1:]]


def _joined(words: Sequence[str]) -> list[str]:
    """Prefixes become part of their word, and the names of diseases lose their possessive."""
    joined: list[str] = []
    for word in words:
        before = joined[-1] if joined else ""
        has_prefix = before in PREFIXES and len(word) >= SHORTEST_STEM and word.isalpha()
        if has_prefix or (before == "e" and word in E_WORDS):
            joined[-1] = before + word
            continue
        if word in NAMED_AFTER and len(before) > 4 and before[-1] == "s" and before[-2] != "s":
            joined[-1] = before[:-1]
        joined.append(word)
    return joined


def _interval(found: re.Match[str]) -> str:
    """[0, 1) as \u22650 <1. (0, 1) stays: it may be a point."""
    opening, low, high, closing = found.groups()
    if opening + closing == "()":
        return found[0]
    above = "\u2265" if opening == "[" else ">"
    below = "\u2264" if closing == "]" else "<"
    return f"{above}{low} {below}{high}"


def _result(found: re.Match[str]) -> str:
    """The word for a sign in brackets, or behind them, whose brackets are about to go."""
    is_positive = (found[1] or found[2]) == "+"
    return " positive " if is_positive else " negative "


def _one_pass(text: str) -> str:
    """Every rule once, in order."""
    text = INTERVAL.sub(_interval, text)
    text = RESULT.sub(_result, text)
    text = MINUS.sub(r"\1negative ", text)
    # 10\u207b\u2075 has one exponent
    powers = SUPERSCRIPTS.sub(lambda run: "^" + unicodedata.normalize("NFKD", run[0]), text)
    folded = " ".join(powers.translate(FOLDING).replace("&", " and ").split())
    for pattern, replacement in RULES:
        folded = pattern.sub(replacement, folded)
    plain = " ".join(_joined(_without_articles(folded.split())))
    if not plain:
        # an answer of signs alone, such as "+"
        signs = (c for c in text if unicodedata.category(c)[0] in "PS" and c not in BLANKS)
        plain = "".join(signs)
    plain = _plain_form(plain)
    # 1st is first, unless it is a day's
    return " ".join(ORDINALS.get(word, word) for word in plain.split(" "))


def _normalise(text: str) -> str:
    """What a rule leaves may be the work of an earlier one: until nothing changes."""
    for _ in range(MAX_PASSES):
        plain = _one_pass(text)
        if plain == text:
            break
        text = plain
    return text


_normalise_short = lru_cache(maxsize=1 << 16)(_normalise)
_normalise_long = lru_cache(maxsize=8)(_normalise)


def normalise(text: str) -> str:
    """The one form of a text for matching, repeats and metrics. Linear in its length.

    Gone are case, accents, width, articles, invisible signs, and punctuation that carries no
    meaning; numbers, days, amounts and medical abbreviations have one form. The result is "" only
    where nothing visible was written.
    """
    if len(text) <= SHORT:
        return _normalise_short(text)
    return _normalise_long(text)

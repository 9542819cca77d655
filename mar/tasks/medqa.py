"""MedQA-USMLE (Jin et al. 2021): licensing examination questions with options, one of them right.

Rows are {question, options {A..D} or a list, answer, answer_idx, and realidx if there is one}. By
default the options are hidden: the question is rewritten to an open one, and rows that cannot be
asked so, or whose answer has more than `max_gold_words` words, are dropped and counted.
`show_options` lists the options under the question as it is and drops nothing but duplicates;
guesses then hit by chance (`chance_line`). Rows of mediQ (Li et al. 2024) hold the patient as
sentences in `context`; the first `max_sentences` of them are shown (null: all): the same gold,
rising uncertainty.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from mar.errors import UserError
from mar.records import Example, Gold
from mar.tasks.loading import Candidate, Loaded, Row, Source, example_id, load_rows, required_text

NEEDS_OPTIONS = "question needs its options"
LONG_GOLD = "answer too long for an open question"

# ---------------------------------------------------------------------- words of the questions

# Verbs with which "which <noun>" is a singular.
_SINGULAR = "is|was|has|does|did|had|best|most|would|will|should|could|can|may|might|must"

# What may follow "which of the following" directly, if no noun does.
_VERB = rf"""(?:{_SINGULAR}|are|were|have|do|also|likely|correctly|describes|explains|represents
    |indicates|confirms|correlates|helps|accounts|causes|constitutes)\b"""

_END = r"\s*(?: [?.,:;\"”] | $ | (?:if|in|from|on|at|for|to|during|after)\b )"

_WHICH = r"\bwhich(?:\ one)?\ of\ the\ following(?:\ options|\ choices)?\b"

# A plural noun with up to three words before it.
_NOUN = rf"(?: (?!{_VERB}|of\b)[\w-]+\  ){{0,3}}? (?!{_VERB}) [\w-]+ (?<![usi])s"

# (pattern, what it becomes), tried one after another. "Which of the following" is rewritten by what
# comes next: a verb or the end ("What is ...", "... shows what?"), a plural noun with a singular
# verb ("Which drug is ..."), or anything else ("Which findings are ...").
_OPENINGS = (
    (
        r"\bof\ the\ following(?:\ options|\ choices)?,\ (?:which|what)(?:\ one)?\b",
        "which of the following",
    ),
    (rf"(?: {_WHICH} | \bwhat\ of\ the\ following ),? (?= {_END} | \ {_VERB} )", "what"),
    (rf"{_WHICH}\ ({_NOUN}) (?= {_END} | \ (?:{_SINGULAR}|\w+s)\b )", "which "),
    (_WHICH, "which"),
)

# (ending of a plural, of its singular); the first that fits.
_PLURALS = (
    (r"ies$", "y"),
    (r"(?<=agno)ses$", "sis"),
    (r"(ss|ch|sh|x|us)es$", r"\1"),
    (r"s$", ""),
)

# Questions that only a look at the options can answer: they compare them.
_COMPARES = re.compile(
    r"of the following\b[^?.]{0,60}\b(?:statements?|except|least|closest|(?:sets?|pairs?) of"
    r"|(?:is|are|was|be|best|most|has|have|does|do|would)"
    r" (?:not|true|false|(?:in)?correct|accurate))\b",
    re.I,
)

# Words that still point at the options after rewriting.
_POINTS_AT_OPTIONS = re.compile(
    r"\b(?:except|options|choices)\b|\bof the (?:\w+ below|following)\b|\| A[).]", re.I
)

# Answers that are about the other options.
_ABOUT_OPTIONS = re.compile(
    r"\b(?:all|none|both|neither|any) (?:of )?(?:the )?(?:above|these|options|answers)\b", re.I
)

# An abbreviation in brackets, as in "alpha-fetoprotein (AFP)".
_ABBREVIATION = re.compile(r" \((?=[^()]*[A-Z][^()]*[A-Z])([A-Za-z0-9-]{2,8})\)")


def open_question(question: str) -> str | None:
    """The question without a mention of its options; None where it needs them."""
    if _COMPARES.search(question):
        return None
    for pattern, opening in _OPENINGS:

        def rewrite(match: re.Match[str], opening: str = opening) -> str:
            noun = match[1] if match.re.groups else ""
            text = opening + _singular(noun)
            starts_sentence = match[0][0].isupper()
            return text[0].upper() + text[1:] if starts_sentence else text

        question = re.compile(pattern, re.I | re.X).sub(rewrite, question)
    last_sentence = re.split(r"(?<=[.?!])\s+", question.strip())[-1]
    if _POINTS_AT_OPTIONS.search(last_sentence) or "which of the following" in question.lower():
        return None
    return question


def _singular(noun: str) -> str:
    for plural, singular in _PLURALS:
        if re.search(plural, noun):
            return re.sub(plural, singular, noun)
    return noun


# ---------------------------------------------------------------------- rows


def load(source: Source) -> Loaded:
    """The questions of a split of the hub or of a file. Raises UserError with file, line and key."""
    option_counts: set[int] = set()

    def read(row: Row, where: str) -> Candidate:
        candidate, num_options = _read(row, where, source)
        option_counts.add(num_options)
        return candidate

    loaded = load_rows(source, read)
    if not source.show_options:
        return loaded
    if len(option_counts) > 1:
        raise UserError(
            f"data.show_options=true: rows have {sorted(option_counts)} options, all must have the "
            "same number"
        )
    return replace(loaded, num_options=max(option_counts))


def _read(row: Row, where: str, source: Source) -> tuple[Candidate, int]:
    """One row, and how many options it has."""
    row = _usual_form(row)
    question = required_text(row, "question", where)
    raw_options = _without_labels(_options(row, where))
    letter = _right_letter(row, raw_options, where)
    options = {key: text.strip() for key, text in raw_options.items()}
    answer = options[letter]
    context = _context(row, source, where)
    asked = " ".join([*context[: source.max_sentences], question])
    # What tells rows apart, however much of it is shown.
    whole_question = " ".join([*context, question])

    short_answer = _ABBREVIATION.sub("", answer)
    aliases = {short_answer}
    if answer.endswith(")"):
        aliases |= set(_ABBREVIATION.findall(answer))

    drop_reason = None
    if source.show_options:
        lines = [f"{key}. {text}" for key, text in options.items()]
        asked = "\n".join([asked, *lines])
        aliases.add(f"{letter}. {answer}")
        if letter not in {text.upper() for text in options.values()}:
            aliases.add(letter)
    else:
        opened = None if _ABOUT_OPTIONS.search(answer) else open_question(asked)
        if len(short_answer.split()) > source.max_gold_words:
            drop_reason = LONG_GOLD
        elif not opened:
            drop_reason = NEEDS_OPTIONS
        asked = opened or asked

    gold = Gold(answer, tuple(sorted(aliases - {answer})))
    id = example_id(row, "realidx", "medqa", whole_question)
    example = Example(id, "medqa", asked, (gold,))
    return Candidate(example, whole_question, drop_reason), len(options)


def _usual_form(row: Row) -> Row:
    """The row in this file's form, out of those of the hub's other copies.

    bigbio, source      options [{key, value}, ...], or with other names of the two
    bigbio, qa          choices [text, ...], answer [text]; with answer a number: mmlu
    openlifescienceai   data {Question, Options {letter: text}, Correct Option, Correct Answer}
    medmcqa             opa, opb, opc, opd, and cop, the right one's number from 0
    swag                sent1, ending0 .. ending3, and label, the right one's number from 0
    arc                 choices {label: [letter, ...], text: [text, ...]}, answerKey
    medxpertqa          options {letter: text}, label, the right one's letter

    A text may begin with its letter (`B. warfarin`), and the answer may be a label (`(B)`).
    """
    data = row.get("data")
    if isinstance(data, Mapping) and "Question" in data:
        row = {
            "question": data["Question"],
            "options": data.get("Options"),
            "answer_idx": data.get("Correct Option"),
            "answer": data.get("Correct Answer"),
        }
    usual = dict(row)
    if "sent1" in row and "ending0" in row:
        said = [row["sent1"], row.get("sent2") or ""]
        usual["question"] = " ".join(filter(None, said))
        usual["options"] = [value for key, value in row.items() if _ENDING.fullmatch(key)]
    elif "options" not in row and "choices" in row:
        usual["options"] = row["choices"]
        if row.get("context") == "":
            # bigbio's empty text: there is none
            del usual["context"]
    elif "options" not in row and "opa" in row:
        usual["options"] = {letter.upper(): row.get(f"op{letter}") for letter in "abcd"}

    for key in ("cop", "answerKey", "label"):
        if row.get("answer_idx") is None and row.get(key) is not None:
            usual["answer_idx"] = row[key]
            break
    answer = row.get("answer")
    if isinstance(answer, list) and len(answer) == 1:
        usual["answer"] = answer[0]
    if "options" in usual:
        usual["options"] = _by_letter(usual["options"])
    return usual


# the keys under which one option of a list has its letter, and its text
_LETTER_KEYS = ("key", "label", "letter", "id", "option")
_TEXT_KEYS = ("value", "text")
_ENDING = re.compile("ending[0-9]+")


def _by_letter(options: Any) -> Any:
    """The options as {letter: text} where they are lists of letters and texts; else as they are."""
    pairs = []
    if isinstance(options, Mapping):
        letters, texts = options.get("label"), options.get("text")
        if not (isinstance(letters, list) and isinstance(texts, list)):
            return _without_missing(options)
        pairs = list(zip(letters, texts, strict=False))
    elif isinstance(options, list) and all(isinstance(option, Mapping) for option in options):
        for option in options:
            letter = next((option[key] for key in _LETTER_KEYS if key in option), None)
            text = next((option[key] for key in _TEXT_KEYS if key in option), None)
            pairs.append((letter, text))
    by_letter = {str(letter): text for letter, text in pairs}
    whole = pairs and len(by_letter) == len(pairs) and "None" not in by_letter
    return by_letter if whole else options


def _without_missing(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without the last letters if they have no text: a parquet file has those of every row."""
    kept = dict(options)
    while kept and list(kept.values())[-1] is None:
        kept.popitem()
    return kept


def _context(row: Row, source: Source, where: str) -> list[str]:
    """The sentences of a mediQ row; none for other rows."""
    context = row.get("context") or []
    if not isinstance(context, list) or not all(isinstance(text, str) for text in context):
        raise UserError(f"{where}: 'context' must be a list of sentences, not {context!r}")
    if source.max_sentences is not None and "context" not in row:
        raise UserError(f"{where}: data.max_sentences needs rows with 'context', as mediQ has them")
    return context


def _options(row: Row, where: str) -> dict[str, str]:
    """{letter: text as it is in the file}"""
    options = row.get("options")
    if isinstance(options, list):
        options = dict(zip(ascii_uppercase, options, strict=False))
    if (
        not isinstance(options, dict)
        or len(options) < 2
        or not all(map(_is_text, options.values()))
    ):
        raise UserError(f"{where}: 'options' must hold two or more texts, as a list or by letter")
    return options


# an option with its letter: `B. warfarin`, `(B) warfarin`; or the letter alone, `(B)`
_LABELLED = re.compile(r"\(?([A-Za-z]|[0-9]{1,2})[.):](?:\s+(.+))?", re.S)


def _without_labels(options: dict[str, str]) -> dict[str, str]:
    """The texts without their letters, where each begins with its own: a guess has none."""
    bare: dict[str, str] = {}
    for letter, text in options.items():
        labelled = _LABELLED.fullmatch(text.strip())
        if labelled is None or labelled[1] != letter or not labelled[2]:
            return options
        bare[letter] = labelled[2]
    return bare


def _letter_of_label(told: object, options: dict[str, str]) -> object:
    """The letter in `(B)`, `B.` or `B. warfarin`, if that is what stands behind it; else `told`."""
    labelled = _LABELLED.fullmatch(told.strip()) if isinstance(told, str) else None
    if labelled is None or told in options.values():
        return told
    letter, text = labelled.groups()
    names_it = letter in options and text in (None, options[letter].strip())
    return letter if names_it else told


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _right_letter(row: Row, options: dict[str, str], where: str) -> str:
    """The right option's letter: `answer_idx` (a letter, or a number from 0), else by `answer`."""
    letters = list(options)
    index = _letter_of_label(row.get("answer_idx"), options)
    answer = _letter_of_label(row.get("answer"), options)
    letter = index
    if index is None:
        letter = next((key for key, text in options.items() if text == answer), None)
    if letter is None and (answer in letters or isinstance(answer, int)):
        letter, answer = answer, None
    if isinstance(letter, str):
        letter = letter.strip()
        if letter not in options and letter.isdecimal():
            letter = int(letter)
    if type(letter) is int and str(letter) in options:
        letter = str(letter)
    elif type(letter) is int and 0 <= letter < len(options):
        letter = letters[letter]
    if not isinstance(letter, str) or letter not in options:
        told = index if index is not None else answer
        raise UserError(
            f"{where}: 'answer_idx' ({told!r}) names none of the options {', '.join(options)} "
            f"(numbers are from 0 to {len(options) - 1})"
        )
    if answer is not None and answer not in (letter, options[letter], letters.index(letter)):
        raise UserError(
            f"{where}: 'answer' ({answer!r}) is not option {letter} ({options[letter]!r})"
        )
    return letter

"""MedQA-USMLE (Jin et al. 2021): questions of medical licensing examinations with four options, one of them right.

Rows are {question, options {A..D} or a list, answer, answer_idx, and realidx if there is one}. By default the options
are hidden: the question is rewritten to an open one, and rows that cannot be asked so, or whose answer has more than
`max_gold_words` words, are dropped and counted. `show_options` lists the options under the question as it is and drops
nothing but duplicates; guesses then hit by chance (`chance_line`). Rows of mediQ (Li et al. 2024) hold the patient as
sentences in `context`; the first `max_sentences` of them are shown (null: all): the same gold, rising uncertainty.
"""

import re
from string import ascii_uppercase

from mar.errors import UserError
from mar.records import Example, Gold
from mar.tasks.loading import Candidate, Loaded, Row, Source, example_id, load_rows, required_text

NEEDS_OPTIONS, LONG_GOLD = "question needs its options", "answer too long for an open question"

# "Which of the following" is rewritten by what comes next: a verb or the end ("What is ...", "... shows what?"), a
# plural noun with a singular verb ("Which drug is ..."), or anything else ("Which findings are ...").
_SINGULAR = "is|was|has|does|did|had|best|most|would|will|should|could|can|may|might|must"

_VERB = rf"""(?:{_SINGULAR}|are|were|have|do|also|likely|correctly|describes|explains|represents|indicates|confirms
    |correlates|helps|accounts|causes|constitutes)\b"""

_END = r"\s*(?: [?.,:;\"”] | $ | (?:if|in|from|on|at|for|to|during|after)\b )"

_WHICH = r"\bwhich(?:\ one)?\ of\ the\ following(?:\ options|\ choices)?\b"

_NOUN = rf"(?: (?!{_VERB}|of\b)[\w-]+\  ){{0,3}}? (?!{_VERB}) [\w-]+ (?<![usi])s"

_OPENINGS = (
    (
        r"\bof\ the\ following(?:\ options|\ choices)?,\ (?:which|what)(?:\ one)?\b",
        "which of the following",
    ),
    (rf"(?: {_WHICH} | \bwhat\ of\ the\ following ),? (?= {_END} | \ {_VERB} )", "what"),
    (rf"{_WHICH}\ ({_NOUN}) (?= {_END} | \ (?:{_SINGULAR}|\w+s)\b )", "which "),
    (_WHICH, "which"),
)

_PLURALS = ((r"ies$", "y"), (r"(?<=agno)ses$", "sis"), (r"(ss|ch|sh|x|us)es$", r"\1"), (r"s$", ""))

_COMPARES = re.compile(  # what only a look at the options can answer
    r"of the following\b[^?.]{0,60}\b(?:statements?|except|least|closest|(?:sets?|pairs?) of"
    r"|(?:is|are|was|be|best|most|has|have|does|do|would) (?:not|true|false|(?:in)?correct|accurate))\b",
    re.I,
)

_POINTS = re.compile(
    r"\b(?:except|options|choices)\b|\bof the (?:\w+ below|following)\b|\| A[).]", re.I
)

_ABOVE = re.compile(
    r"\b(?:all|none|both|neither|any) (?:of )?(?:the )?(?:above|these|options|answers)\b", re.I
)

_ABBREVIATION = re.compile(r" \((?=[^()]*[A-Z][^()]*[A-Z])([A-Za-z0-9-]{2,8})\)")  # " (AFP)"


def open_question(question: str) -> str | None:
    """The question without a mention of its options, or None where it cannot be answered without them."""
    if _COMPARES.search(question):
        return None
    for pattern, opening in _OPENINGS:

        def replace(match: re.Match[str], opening: str = opening) -> str:
            noun = match[1] if match.re.groups else ""
            ending, singular = next(((p, s) for p, s in _PLURALS if re.search(p, noun)), ("^", ""))
            text = opening + re.sub(ending, singular, noun)
            return text[0].upper() + text[1:] if match[0][0].isupper() else text

        question = re.compile(pattern, re.I | re.X).sub(replace, question)
    last = re.split(r"(?<=[.?!])\s+", question.strip())[-1]
    return (
        None if _POINTS.search(last) or "which of the following" in question.lower() else question
    )


def _options(row: Row, where: str) -> tuple[dict[str, str], str]:
    """({letter: text}, the right letter)."""
    options, letter, answer = row.get("options"), row.get("answer_idx"), row.get("answer")
    if isinstance(options, list):
        options = dict(zip(ascii_uppercase, options, strict=False))
    texts = options if isinstance(options, dict) else {}
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts.values()):
        raise UserError(f"{where}: 'options' must hold two or more texts, as a list or by letter")
    if isinstance(letter, int) and 0 <= letter < len(texts):
        letter = list(texts)[letter]
    if letter is None:
        letter = next((key for key, text in texts.items() if text == answer), None)
    if not isinstance(letter, str) or letter not in texts:
        raise UserError(
            f"{where}: 'answer_idx' ({letter!r}) names none of the options {', '.join(texts)}"
        )
    if answer is not None and answer not in (letter, texts[letter]):
        raise UserError(
            f"{where}: 'answer' ({answer!r}) is not option {letter} ({texts[letter]!r})"
        )
    return {key: text.strip() for key, text in texts.items()}, letter


def load(source: Source) -> Loaded:
    """The questions of a split of the hub or of a file. Raises UserError naming file, line and key."""
    counts = set()

    def read(row: Row, where: str) -> Candidate:
        question, (options, letter) = required_text(row, "question", where), _options(row, where)
        context = row.get("context") or []
        if not isinstance(context, list) or not all(
            isinstance(sentence, str) for sentence in context
        ):
            raise UserError(f"{where}: 'context' must be a list of sentences, not {context!r}")
        if source.max_sentences is not None and "context" not in row:
            raise UserError(
                f"{where}: data.max_sentences needs rows with 'context', as mediQ has them"
            )
        asked = " ".join([*context[: source.max_sentences], question])
        question = " ".join(
            [*context, question]
        )  # what tells rows apart, however much of it is shown
        answer, shown, reason = options[letter], asked, None
        short = _ABBREVIATION.sub("", answer)
        aliases = {short, *(_ABBREVIATION.findall(answer) if answer.endswith(")") else ())}
        if source.show_options:
            counts.add(len(options))
            shown += "\n" + "\n".join(f"{key}. {text}" for key, text in options.items())
            aliases |= {f"{letter}. {answer}"} | (
                {letter} - {text.upper() for text in options.values()}
            )
        else:
            opened = None if _ABOVE.search(answer) else open_question(asked)
            shown, reason = opened or asked, None if opened else NEEDS_OPTIONS
            reason = LONG_GOLD if len(short.split()) > source.max_gold_words else reason
        gold, id = (
            Gold(answer, tuple(sorted(aliases - {answer}))),
            example_id(row, "realidx", "medqa", question),
        )
        return Candidate(Example(id, "medqa", shown, (gold,)), question, reason)

    loaded = load_rows(source, read)
    if len(counts) > 1:
        raise UserError(
            f"data.show_options=true: rows have {sorted(counts)} options, all must have the same number"
        )
    return Loaded(loaded.examples, loaded.dropped, counts.pop() if counts else None)

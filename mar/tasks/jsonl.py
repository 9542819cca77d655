"""Your own questions, without code: `data=jsonl data.path=my.jsonl`, one JSON object per line
(README.md has tables, two files and what to set).

    {"question": "Name a planet without moons.", "golds": ["Mercury", "Venus"]}
    {"question": "What causes flu?", "golds": [{"name": "influenza virus", "aliases": ["influenza"]}], "id": "flu"}
    {"question": "A coin?", "golds": [{"name": "heads", "probability": 0.5}, {"name": "tails", "probability": 0.5}]}

- One gold: `truth` is single.
- Several: all of them are right at once (multi-label), `truth` is uniform.
- All with a probability, which sum to 1: the golds are a distribution, `truth` is exact. One of
  them is drawn as the label, by the id, once and for all.

A key "truth" says otherwise (`survey` for shares of people). Without "id" the question's words make
one. The id decides the split: of a file 70 % are train, 20 % validation and 10 % test.
"""

from dataclasses import replace
from typing import Any

from mar.errors import UserError
from mar.records import TRUTHS, Example, Gold
from mar.tasks.loading import (
    Candidate,
    Cells,
    Loaded,
    Row,
    Source,
    draw_label,
    example_id,
    load_rows,
    required_text,
)
from mar.verify.normaliser import normalise

ROW_KEYS = {"question", "golds", "id", "truth"}
GOLD_KEYS = {"name", "aliases", "probability"}


def load(source: Source) -> Loaded:
    """The examples of a split, and the names of columns that are not read."""
    loaded = load_rows(source, read)
    assert loaded.reading is not None
    unread = sorted(loaded.reading.columns - ROW_KEYS)
    return replace(loaded, unread=tuple(unread))


def read(row: Row, where: str) -> Candidate:
    """One row. Raises UserError with position and key where it is malformed."""
    question = required_text(row, "question", where)
    raw = row.get("golds")
    if isinstance(row, Cells) and isinstance(raw, str) and raw.strip():
        raw = _gold_of_cell(raw, where)
    if not isinstance(raw, list) or not raw:
        raise UserError(
            f'{where}: \'golds\' must be a list of at least one gold, as in ["Mercury", "Venus"] '
            f"(the row has {', '.join(map(str, row))})"
        )
    golds = tuple(_gold(gold, where) for gold in raw)
    _require_different(golds, where)
    id = example_id(row, "id", "jsonl", question)
    is_distribution = golds[0].probability is not None
    example = Example(
        id=id,
        task="jsonl",
        question=question,
        golds=golds,
        truth=_truth(row, golds, where),
        multi_label=len(golds) > 1 and not is_distribution,
        label=draw_label(id, golds) if is_distribution else None,
    )
    return Candidate(example, question)


def _gold_of_cell(cell: str, where: str) -> list[str]:
    """The cell of a csv file that spells no list is one gold."""
    if cell.lstrip().startswith("["):
        raise UserError(
            f"{where}: 'golds' begins with [ and is no list of texts or objects: write "
            '["Mercury", "Venus"], or one gold as plain text'
        )
    return [cell]


def _gold(raw: Any, where: str) -> Gold:
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, dict) or raw.keys() - GOLD_KEYS:
        raise UserError(
            f"{where}: {raw!r} is no gold: give a text, or an object of "
            f"{', '.join(sorted(GOLD_KEYS))}"
        )
    aliases = raw.get("aliases") or []
    if not isinstance(aliases, list) or not all(_is_text(alias) for alias in aliases):
        raise UserError(f"{where}: 'aliases' must be a list of texts, not {aliases!r}")
    probability = raw.get("probability")
    if probability is not None and not _is_probability(probability):
        raise UserError(f"{where}: 'probability' must be a number from 0 to 1, not {probability!r}")
    name = required_text(raw, "name", f"{where}: 'golds'")
    return Gold(name, tuple(aliases), probability)


def _require_different(golds: tuple[Gold, ...], where: str) -> None:
    """Of two golds that are the same answer one could never be hit."""
    written: dict[str, str] = {}
    for gold in golds:
        answer = normalise(gold.name)
        if not answer:
            raise UserError(
                f"{where}: the gold {gold.name!r} has no visible character: no answer can be it, "
                "so give its text or remove it"
            )
        if answer in written:
            raise UserError(
                f"{where}: the golds {written[answer]!r} and {gold.name!r} are the same answer: "
                "make them one gold, with the sum of their probabilities"
            )
        written[answer] = gold.name


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_probability(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _truth(row: Row, golds: tuple[Gold, ...], where: str) -> str:
    """Where the golds come from, given or guessed, and whether they can."""
    known = [gold.probability for gold in golds if gold.probability is not None]
    if known and len(known) < len(golds):
        raise UserError(f"{where}: 'golds' must have a 'probability' each, or none of them")
    if known and abs(sum(known) - 1) > 1e-3:
        raise UserError(f"{where}: the probabilities of 'golds' sum to {sum(known):g}, not 1")

    truth = row.get("truth")
    if not truth:
        if known:
            truth = "exact"
        elif len(golds) == 1:
            truth = "single"
        else:
            truth = "uniform"
    if truth not in TRUTHS:
        raise UserError(f"{where}: 'truth' is {truth!r}: choose one of {', '.join(TRUTHS)}")
    if truth in ("exact", "survey") and not known:
        raise UserError(f"{where}: 'truth' is {truth!r}, which needs a 'probability' on every gold")
    several_for_one = truth == "single" and len(golds) > 1
    if several_for_one or (truth in ("single", "uniform") and known):
        raise UserError(
            f"{where}: 'truth' is {truth!r}, which the 'golds' contradict: drop the key or mend "
            "them"
        )
    return truth

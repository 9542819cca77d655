"""Your own questions, without code: `data=jsonl data.path=my.jsonl`, one JSON object per line.

    {"question": "Name a planet without moons.", "golds": ["Mercury", "Venus"]}
    {"question": "What causes flu?", "golds": [{"name": "influenza virus", "aliases": ["influenza"]}], "id": "flu"}
    {"question": "A coin?", "golds": [{"name": "heads", "probability": 0.5}, {"name": "tails", "probability": 0.5}]}

One gold: `truth` is single. Several: all of them are right at once (multi-label), `uniform`. With a probability on all, which sum to 1, the golds
are a distribution, `exact`; one of them is drawn as the label, by the id, once and for all. A key "truth" says otherwise (`survey` for shares of
people). Without "id" the question's words make one. The id decides the split: of a file 70 % are train, 20 % validation and 10 % test.
"""

from typing import Any

from mar.errors import UserError
from mar.records import TRUTHS, Example, Gold
from mar.tasks.loading import Candidate, Row, draw_label, example_id, required_text

GOLD_KEYS = {"name", "aliases", "probability"}


def _gold(raw: Any, where: str) -> Gold:
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, dict) or raw.keys() - GOLD_KEYS:
        raise UserError(
            f"{where}: {raw!r} is no gold: give a text, or an object of {', '.join(sorted(GOLD_KEYS))}"
        )
    aliases, probability = raw.get("aliases") or [], raw.get("probability")
    if not isinstance(aliases, list) or not all(
        isinstance(alias, str) and alias.strip() for alias in aliases
    ):
        raise UserError(f"{where}: 'aliases' must be a list of texts, not {aliases!r}")
    if probability is not None and (
        type(probability) not in (int, float) or not 0 <= probability <= 1
    ):
        raise UserError(f"{where}: 'probability' must be a number from 0 to 1, not {probability!r}")
    return Gold(required_text(raw, "name", f"{where}: 'golds'"), tuple(aliases), probability)


def _truth(row: Row, golds: tuple[Gold, ...], where: str) -> str:
    """Where the golds come from, given or guessed, and whether they can."""
    known = [gold.probability for gold in golds if gold.probability is not None]
    if known and len(known) < len(golds):
        raise UserError(f"{where}: 'golds' must have a 'probability' each, or none of them")
    if known and abs(sum(known) - 1) > 1e-3:
        raise UserError(f"{where}: the probabilities of 'golds' sum to {sum(known):g}, not 1")
    truth = row.get("truth") or ("exact" if known else "single" if len(golds) == 1 else "uniform")
    if truth not in TRUTHS:
        raise UserError(f"{where}: 'truth' is {truth!r}: choose one of {', '.join(TRUTHS)}")
    if truth in ("exact", "survey") and not known:
        raise UserError(f"{where}: 'truth' is {truth!r}, which needs a 'probability' on every gold")
    if truth in ("single", "uniform") and (known or (truth == "single" and len(golds) > 1)):
        raise UserError(
            f"{where}: 'truth' is {truth!r}, which the 'golds' contradict: drop the key or mend them"
        )
    return truth


def read(row: Row, where: str) -> Candidate:
    """One row. Raises UserError naming where and key where it is malformed."""
    question, raw = required_text(row, "question", where), row.get("golds")
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: 'golds' must be a list of at least one gold")
    golds = tuple(_gold(gold, where) for gold in raw)
    truth, id, drawn = _truth(row, golds, where), example_id(row, "id", "jsonl", question), None
    if golds[0].probability is not None:
        drawn = draw_label(id, golds)
    return Candidate(
        Example(id, "jsonl", question, golds, truth, drawn is None and len(golds) > 1, drawn),
        question,
    )

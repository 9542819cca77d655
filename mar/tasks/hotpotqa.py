"""HotPotQA-Modified (RLCR, arXiv 2507.16806): two of ten paragraphs are gone.

Rows are those of HotPotQA (Yang et al. 2018, distractor setting): ten paragraphs, two of which hold
the answer (gold). Of each row 0, 1 or 2 gold paragraphs are removed, drawn from the data seed and
the id alone, and fillers up to two in all. The number is the example's `stratum` (removed0 to
removed2).
"""

from typing import Any

import numpy as np

from mar.errors import UserError
from mar.files import stable_hash
from mar.records import Example, Gold
from mar.tasks.loading import Candidate, Loaded, Row, Source, example_id, load_rows, required_text

NUM_PARAGRAPHS = 10
NUM_REMOVED = 2
MAX_CHARACTERS = 6000


def load(source: Source) -> Loaded:
    """The questions of a split. Raises UserError with file, line and key of a malformed row."""

    def read(row: Row, where: str) -> Candidate:
        return _read(row, where, source.data_seed)

    return load_rows(source, read)


def _read(row: Row, where: str, data_seed: int) -> Candidate:
    question = required_text(row, "question", where)
    golds = (Gold(required_text(row, "answer", where)),)
    paragraphs = _pairs(row, "context", ("title", "sentences"), where)
    facts = _pairs(row, "supporting_facts", ("title", "sent_id"), where)
    id = example_id(row, "id", "hotpotqa", question)

    gold_titles = {title for title, _ in facts}
    gold = [n for n, (title, _) in enumerate(paragraphs) if title in gold_titles]
    filler = [n for n in range(len(paragraphs)) if n not in gold]
    if len(paragraphs) != NUM_PARAGRAPHS or len(gold) != NUM_REMOVED:
        example = Example(id, "hotpotqa", question, golds)
        reason = f"not {NUM_PARAGRAPHS} paragraphs with {NUM_REMOVED} that matter"
        return Candidate(example, question, reason)

    rng = np.random.default_rng(stable_hash(f"hotpotqa {data_seed} {id}"))
    num_gold = int(rng.integers(NUM_REMOVED + 1))
    removed_gold = rng.permutation(gold)[:num_gold]
    removed_filler = rng.permutation(filler)[: NUM_REMOVED - num_gold]
    removed = {*removed_gold, *removed_filler}

    kept = [
        f"{title}: {''.join(sentences).strip()}"
        for n, (title, sentences) in enumerate(paragraphs)
        if n not in removed
    ]
    context = "\n".join(kept)
    example = Example(
        id=id,
        task="hotpotqa",
        question=f"{context}\n\nParagraphs may be missing. {question}",
        golds=golds,
        stratum=f"removed{num_gold}",
    )
    too_long = len(context) >= MAX_CHARACTERS
    return Candidate(example, question, drop_reason="paragraphs too long" if too_long else None)


def _pairs(row: Row, key: str, columns: tuple[str, str], where: str) -> list[tuple[str, Any]]:
    """[(title, what belongs to it)] from a list of pairs, or from the columns of the hub."""
    value = row.get(key)
    if isinstance(value, dict) and set(columns) <= value.keys():
        value = list(zip(value[columns[0]], value[columns[1]], strict=True))
    if not isinstance(value, list) or not all(_is_titled_pair(pair) for pair in value):
        raise UserError(f"{where}: {key!r} must be a list of pairs that begin with a title")
    return [(title, content) for title, content in value]


def _is_titled_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)

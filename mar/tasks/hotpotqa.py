"""HotPotQA-Modified (RLCR, arXiv 2507.16806): two of ten paragraphs are gone, among them none, one or both that matter.

Of each row (Yang et al. 2018, distractor setting) 0, 1 or 2 of the two gold paragraphs are removed, drawn from the data
seed and the id alone, and fillers up to two; the number is the example's `stratum` (removed0, removed1, removed2).
"""

from typing import Any

import numpy as np

from mar.errors import UserError
from mar.files import stable_hash
from mar.records import Example, Gold
from mar.tasks.loading import Candidate, Loaded, Row, Source, example_id, load_rows, required_text

NUM_PARAGRAPHS, NUM_REMOVED, MAX_CHARACTERS = 10, 2, 6000


def _pairs(value: Any, key: str, columns: tuple[str, str], where: str) -> list[tuple[str, Any]]:
    """[(title, what belongs to it)] from pairs, or from the columns of the hub."""
    if isinstance(value, dict) and set(columns) <= value.keys():
        value = list(zip(value[columns[0]], value[columns[1]], strict=True))
    if not isinstance(value, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in value
    ):
        raise UserError(f"{where}: {key!r} must be a list of pairs that begin with a title")
    return [(pair[0], pair[1]) for pair in value]


def load(source: Source) -> Loaded:
    """The questions of a split. Raises UserError naming file, line and key of a malformed row."""

    def read(row: Row, where: str) -> Candidate:
        question, answer = required_text(row, "question", where), required_text(row, "answer", where)
        context = _pairs(row.get("context"), "context", ("title", "sentences"), where)
        facts = _pairs(row.get("supporting_facts"), "supporting_facts", ("title", "sent_id"), where)
        id, titles = example_id(row, "id", "hotpotqa", question), {title for title, _ in facts}
        gold = [n for n, (title, _) in enumerate(context) if title in titles]
        filler = [n for n in range(len(context)) if n not in gold]
        if len(context) != NUM_PARAGRAPHS or len(gold) != NUM_REMOVED:
            reason = f"not {NUM_PARAGRAPHS} paragraphs with {NUM_REMOVED} that matter"
            return Candidate(Example(id, "hotpotqa", question, (Gold(answer),)), question, reason)
        rng = np.random.default_rng(stable_hash(f"hotpotqa {source.data_seed} {id}"))
        num_gold = int(rng.integers(NUM_REMOVED + 1))
        removed = {
            *rng.permutation(gold)[:num_gold],
            *rng.permutation(filler)[: NUM_REMOVED - num_gold],
        }
        kept = [
            f"{t}: {''.join(sentences).strip()}"
            for n, (t, sentences) in enumerate(context)
            if n not in removed
        ]
        text = "\n".join(kept)
        shown = f"{text}\n\nParagraphs may be missing. {question}"
        example = Example(id, "hotpotqa", shown, (Gold(answer),), stratum=f"removed{num_gold}")
        return Candidate(
            example, question, "paragraphs too long" if len(text) >= MAX_CHARACTERS else None
        )

    return load_rows(source, read)

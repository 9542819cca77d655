"""AmbigQA (Min et al. 2020): questions with several readings, each with an answer of its own.

A row has `annotations`: `singleAnswer` with the spellings of one answer, or `multipleQAs` with those of each reading.
Golds are the readings of all annotators; what shares a spelling is one gold, so no answer counts twice.
"""

from typing import Any

from mar.errors import UserError
from mar.records import Example, Gold
from mar.tasks.loading import Candidate, Row, id_of, text_of
from mar.verify.normaliser import normalise


def _readings(row: Row, place: str) -> list[list[str]]:
    """The spellings of every reading of every annotator."""
    raw: Any = row.get("annotations")
    if isinstance(raw, dict):  # the hub keeps columns
        raw = [dict(zip(raw, values, strict=True)) for values in zip(*raw.values(), strict=True)]
    found: list[Any] = []
    for note in raw if isinstance(raw, list) else ():
        pairs = note.get("qaPairs") or ()
        if isinstance(pairs, dict):
            pairs = [{"answer": answer} for answer in pairs["answer"]]
        found += (
            [note.get("answer")]
            if note.get("type") == "singleAnswer"
            else [p.get("answer") for p in pairs]
        )
    if not found or not all(
        isinstance(r, list) and r and all(isinstance(text, str) for text in r) for r in found
    ):
        raise UserError(
            f"{place}: 'annotations' must hold the answers of a singleAnswer or of multipleQAs, as lists"
        )
    return found


def merge(readings: list[list[str]]) -> list[list[str]]:
    """Spellings that belong together: readings that share one, directly or through others, are one cluster."""
    clusters: list[tuple[set[str], list[str]]] = []
    for reading in readings:
        texts = [text.strip() for text in reading if normalise(text)]
        marks = {normalise(text) for text in texts}
        same = [cluster for cluster in clusters if cluster[0] & marks]
        clusters = [cluster for cluster in clusters if not cluster[0] & marks]
        if marks:
            spellings = [text for cluster in same for text in cluster[1]] + texts
            clusters.append(
                (
                    set.union(marks, *(cluster[0] for cluster in same)),
                    list(dict.fromkeys(spellings)),
                )
            )
    return [texts for _, texts in clusters]


def read(row: Row, place: str) -> Candidate:
    """One row. Raises UserError naming place and key where it is malformed."""
    question, clusters = text_of(row, "question", place), merge(_readings(row, place))
    golds = tuple(Gold(texts[0], tuple(texts[1:])) for texts in clusters)
    several = len(golds) > 1
    id = id_of(row, "id", "ambigqa", question)
    example = Example(id, "ambigqa", question, golds, "uniform" if several else "single", several)
    return Candidate(example, question, None if golds else "no readable answer")

"""AmbigQA (Min et al. 2020): questions with several readings, each with an answer of its own.

A row has `annotations`: `singleAnswer` with the spellings of one answer, or `multipleQAs` with
those of each reading. Golds are the readings of all annotators; readings that share a spelling are
one gold, so no answer counts twice.
"""

from typing import Any

from mar.errors import UserError
from mar.records import Example, Gold
from mar.tasks.loading import Candidate, Row, example_id, required_text
from mar.verify.normaliser import normalise


def read(row: Row, where: str) -> Candidate:
    """One row. Raises UserError with position and key where it is malformed."""
    question = required_text(row, "question", where)
    clusters = merge(_readings(row, where))
    several = len(clusters) > 1
    example = Example(
        id=example_id(row, "id", "ambigqa", question),
        task="ambigqa",
        question=question,
        golds=tuple(Gold(name, tuple(aliases)) for name, *aliases in clusters),
        truth="uniform" if several else "single",
        multi_label=several,
    )
    return Candidate(example, question, drop_reason=None if clusters else "no readable answer")


def _readings(row: Row, where: str) -> list[list[str]]:
    """The spellings of every reading of every annotator."""
    annotations: Any = row.get("annotations")
    if isinstance(annotations, dict):  # the hub keeps columns
        columns = zip(*annotations.values(), strict=True)
        annotations = [dict(zip(annotations, values, strict=True)) for values in columns]
    if not isinstance(annotations, list):
        annotations = []
    readings: list[Any] = []
    for annotation in annotations:
        pairs = annotation.get("qaPairs") or ()
        if isinstance(pairs, dict):
            pairs = [{"answer": answer} for answer in pairs["answer"]]
        if annotation.get("type") == "singleAnswer":
            readings.append(annotation.get("answer"))
        else:
            readings += [pair.get("answer") for pair in pairs]
    if not readings or not all(_is_list_of_texts(reading) for reading in readings):
        raise UserError(
            f"{where}: 'annotations' must hold the answers of a singleAnswer or of multipleQAs, as "
            "lists"
        )
    return readings


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(t, str) for t in value)


def merge(readings: list[list[str]]) -> list[list[str]]:
    """Clusters of spellings: readings that share one, even through others, are one cluster."""
    clusters: list[list[str]] = []
    for reading in readings:
        spellings = [text.strip() for text in reading if normalise(text)]
        if not spellings:
            continue
        normalised = {normalise(text) for text in spellings}
        joined: list[str] = []
        apart: list[list[str]] = []
        for cluster in clusters:
            if any(normalise(text) in normalised for text in cluster):
                joined += cluster
            else:
                apart.append(cluster)
        joined += spellings
        clusters = [*apart, list(dict.fromkeys(joined))]
    return clusters

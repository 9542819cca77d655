"""ProtoQA (Boratko et al. 2020): what would people answer? Golds are clusters of answers, with the share of about 100 people.

Rows are {question, answers}: {text: count} (`train.simplified`), {clusters: {id: {count, answers}}} (`dev.scraped`), or
on the hub columns in `answer-clusters`. The shares are the truth, `survey`; one answer is drawn as the item's label.
"""

from typing import Any

from mar.errors import UserError
from mar.records import Example, Gold
from mar.tasks.loading import Candidate, Row, draw_label, id_of, text_of


def _clusters(row: Row, place: str) -> list[tuple[int, list[str]]]:
    """(people, spellings) of each cluster, the most frequent first."""
    given = row.get("answers") or row.get("answer-clusters")
    raw: dict[str, Any] = given if isinstance(given, dict) else {}
    if "clusters" in raw:
        found = [(c.get("count"), c.get("answers")) for c in raw["clusters"].values()]
    elif isinstance(raw.get("count"), list):
        found = list(zip(raw["count"], raw["answers"], strict=True))
    else:
        found = [(count, [text]) for text, count in raw.items()]
    found = [
        (n, [text for text in texts if text.strip()])
        for n, texts in found
        if isinstance(texts, list) and type(n) is int and n > 0
    ]
    found = [
        cluster for cluster in found if cluster[1]
    ]  # a few rows have an answer of no text or of nobody
    if not found:
        raise UserError(
            f"{place}: 'answers' must give a number of people to each answer, or clusters of count and answers"
        )
    return sorted(found, key=lambda cluster: -cluster[0])


def read(row: Row, place: str) -> Candidate:
    """One row. Raises UserError naming place and key where it is malformed."""
    clusters, raw = _clusters(row, place), row.get("question")
    question = (
        text_of(raw, "normalized", place)
        if isinstance(raw, dict)
        else text_of(row, "question", place)
    )
    people = sum(count for count, _ in clusters)
    golds = tuple(Gold(texts[0], tuple(texts[1:]), count / people) for count, texts in clusters)
    id = id_of(row.get("metadata") or row, "id", "protoqa", question)
    shown = f"{question[0].upper()}{question[1:]}\n(What would most people answer?)"
    return Candidate(
        Example(id, "protoqa", shown, golds, "survey", label=draw_label(id, golds)), question
    )

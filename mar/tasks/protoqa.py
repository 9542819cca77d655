"""ProtoQA (Boratko et al. 2020): what would people answer?

Golds are clusters of answers, with the share of about 100 people. Rows are {question, answers},
where `answers` is {text: count} (`train.simplified`) or {clusters: {id: {count, answers}}}
(`dev.scraped`), or on the hub columns in `answer-clusters`. The shares are the truth, `survey`; one
answer is drawn as the item's label.

`train.simplified` gives the count of a cluster to each of its spellings and does not say which
belong together: "shed: 23, garden shed: 23" are two golds here. Spellings that the verifier takes
for one answer ("door", "the door") are one gold and count once.
"""

from typing import Any

from mar.errors import UserError
from mar.records import Example, Gold
from mar.tasks.loading import Candidate, Row, draw_label, example_id, required_text
from mar.verify.normaliser import normalise


def read(row: Row, where: str) -> Candidate:
    """One row. Raises UserError with position and key where it is malformed."""
    clusters = _clusters(row, where)
    question = _question(row, where)
    people = sum(count for count, _ in clusters)
    golds = tuple(
        Gold(name, tuple(aliases), probability=count / people)
        for count, (name, *aliases) in clusters
    )
    id = example_id(row.get("metadata") or row, "id", "protoqa", question)
    example = Example(
        id=id,
        task="protoqa",
        question=f"{question[0].upper()}{question[1:]}\n(What would most people answer?)",
        golds=golds,
        truth="survey",
        label=draw_label(id, golds),
    )
    return Candidate(example, question)


def _question(row: Row, where: str) -> str:
    question = row.get("question")
    if isinstance(question, dict):
        return required_text(question, "normalized", where)
    return required_text(row, "question", where)


def _clusters(row: Row, where: str) -> list[tuple[int, list[str]]]:
    """(people, spellings) of each cluster, the most frequent first.

    A few rows have an answer of no text, or of nobody: these are left out.
    """
    clusters = []
    first_words: set[str] = set()
    for people, spellings in _raw_clusters(row):
        if isinstance(spellings, list) and type(people) is int and people > 0:
            texts = [text for text in spellings if normalise(text)]
            if texts and normalise(texts[0]) not in first_words:
                first_words.add(normalise(texts[0]))
                clusters.append((people, texts))
    if not clusters:
        raise UserError(
            f"{where}: 'answers' must give a number of people to each answer, or clusters of count "
            "and answers"
        )
    return sorted(clusters, key=lambda cluster: -cluster[0])


def _raw_clusters(row: Row) -> list[tuple[Any, Any]]:
    """(count, answers) as the row has them, in any of the three forms."""
    answers = row.get("answers") or row.get("answer-clusters")
    if not isinstance(answers, dict):
        return []
    if "clusters" in answers:
        clusters = answers["clusters"].values()
        return [(cluster.get("count"), cluster.get("answers")) for cluster in clusters]
    if isinstance(answers.get("count"), list):
        return list(zip(answers["count"], answers["answers"], strict=True))
    return [(count, [text]) for text, count in answers.items()]

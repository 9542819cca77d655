"""Thirty test questions to read, with the answers of everybody whose runs are there.

    python -m experiments.real_model.questions data.path=<folder of DDXPlus> [out=<folder of the runs>]

Writes questions.md. Of a method of single answers it shows three answers, of sets the first set.
"""

import html
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.common.tables import markdown_table
from experiments.real_model.row import LOGS, METHODS, WARM_UPS, Rows, out_and_words
from mar.errors import UserError, exit_code
from mar.measure.answer_sets import Item
from mar.records import Example
from mar.run.answering import read_other
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import load_data

QUESTIONS = 30
ANSWERS = 3
INTRODUCTION = f"""# {QUESTIONS} test questions

Written by `python -m experiments.real_model.questions`. An answer is followed by the confidence that was written with it, if any,
and in brackets by its true probability; a repeat is struck out, and has none. Seed 0.
"""


def most_probable(example: Example) -> str:
    golds = sorted(example.golds, key=lambda gold: -(gold.probability or 0.0))[:ANSWERS]
    return ", ".join(f"{gold.name} ({gold.probability:.2f})" for gold in golds)


def plain(text: str) -> str:
    """A model's text, so that Markdown and HTML show it as it is, in one line."""
    return re.sub(r"([\\`*_~|\[\]])", r"\\\1", html.escape(" ".join(text.split())))


def answers_of(item: Item) -> str:
    """The first answers of an item, over as many sets as they need."""
    said: list[str] = []
    seen = set()
    for one in item.sets:
        if one.reason is not None:
            said += [f"broken form: {one.reason}"] * len(one.answers)
            continue
        confidences = one.confidences or [None] * len(one.answers)
        for answer, confidence, mass, key in zip(
            one.answers, confidences, one.mass, one.keys, strict=True
        ):
            words = plain(str(answer))
            stated = "" if confidence is None else f" {confidence:g}"
            if key in seen:
                said.append(f"~~{words}~~{stated}")
            else:
                said.append(f"{words}{stated} ({mass:.2f})")
            seen.add(key)
    return ", ".join(said[:ANSWERS])


def page(examples: Sequence[Example], said_by: dict[str, dict[str, Item]]) -> str:
    """`said_by`: name of a row -> question id -> its item."""
    parts = [INTRODUCTION]
    for number, example in enumerate(examples, start=1):
        rows = [["most probable", most_probable(example)]]
        for name, items in said_by.items():
            if example.id in items:
                rows.append([name, answers_of(items[example.id])])
        question = "\n".join(f"> {line}  " for line in example.question.splitlines())
        table = markdown_table(["", "answers"], rows)
        parts.append(f"## {number}\n\n{question}\n\n{table}\n")
    return "\n".join(parts)


def main() -> None:
    rows = Rows(*out_and_words(sys.argv[1:]))
    said_by = {}
    for method in (*WARM_UPS, *METHODS):
        folder = rows.folder(method, 0)
        if (folder / "evaluation.json").is_file():
            said_by[method] = {item.id: item for item in read_other(folder, LOGS)}
    if not said_by:
        raise UserError(
            f"{rows.out} has no evaluated row: run python -m experiments.real_model.row first"
        )
    config = compose(rows.settings("warm_up_multi_rlcr", 0))
    examples = load_data(config, "test", QUESTIONS, 0, Display("plain", 0, 0))
    text = page(examples, said_by)
    (Path(__file__).parent / "questions.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(main))

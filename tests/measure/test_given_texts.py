"""Rows of a file that do not fit are named by their lines."""

import json
from types import SimpleNamespace

import pytest

from mar.errors import UserError
from mar.measure import given_texts


@pytest.fixture
def items(tmp_path, monkeypatch):
    """The texts that are measured of rows in a file, and what is said."""
    monkeypatch.setattr(given_texts, "item_of_texts", lambda prompt, texts, *_: (prompt.id, texts))
    prompts = [SimpleNamespace(id=f"q{number}") for number in range(3)]
    file = tmp_path / "rows.jsonl"

    def read(*rows):
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        said = []
        tokenizer = lambda text, **_: {"input_ids": text.split()}  # noqa: E731
        found = given_texts.items_of_file(file, prompts, None, None, tokenizer, "t", said.append)
        return found, " ".join(said).replace(str(file), "rows.jsonl")

    return read


def test_rows_of_other_questions_are_left_out_and_named(items):
    found, said = items(
        {"id": "q0", "text": "a b"}, {"id": "x", "text": "a"}, {"id": "q1", "text": "c"}
    )
    assert [id for id, _ in found] == ["q0", "q1"]
    assert "rows.jsonl:2 (1 of the rows) with ids that are not asked for: left out" in said


def test_a_row_without_text_is_named(items):
    good = {"id": "q0", "text": "a"}
    for bad in ({"id": "q1"}, {"text": "a"}, {"id": "q1", "text": 3}):
        with pytest.raises(UserError, match=r"rows\.jsonl:3 \(1 of the rows\) without the keys"):
            items(good, good, bad)
    with pytest.raises(UserError, match="holds no rows: it takes one JSON object a line"):
        items()


def test_many_rows_are_not_all_named(items):
    bad = [{"id": f"q{number}"} for number in range(9)]
    with pytest.raises(UserError, match=r"rows\.jsonl:5, \.\.\. \(9 of the rows\)"):
        items(*bad)

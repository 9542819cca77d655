"""A person's own rows: tables, two files instead of one that is cut, and too few of them."""

import json
from pathlib import Path

import pytest

from mar.errors import UserError
from mar.records import Gold
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import load_data, load_training_data, say_few_rows
from mar.tasks.loading import Loaded, Source, split_of
from mar.tasks.registry import get_task
from mar.train import main

ROWS = [{"question": f"Question {n}?", "golds": [f"answer {n}"]} for n in range(40)]
WORDS = ["+experiment=jsonl", "model=smollm2-135m"]


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def load(file: Path, **options: object) -> Loaded:
    return get_task("jsonl").load(
        Source("path", "train", path=str(file), whole_file=True, **options)
    )


def questions_of(config, split: str) -> list[str]:
    display = Display("plain", 0, 0)
    return [example.question for example in load_data(config, split, None, 0, display)]


def test_a_cell_is_one_gold_or_a_list_in_json(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(
        "question,golds,id\n"
        '"One, or two?",007,\n'
        'Planets?,"[""Mercury"", {""name"": ""Venus"", ""aliases"": [""Hesperus""]}]",planets\n'
        '"A coin?","[{""name"": ""heads"", ""probability"": 0.5},'
        ' {""name"": ""tails"", ""probability"": 0.5}]",coin\n'
        '"Which element?",NA,\n'
    )
    first, planets, coin, element = load(file).examples
    # As written: neither a number nor a missing value.
    assert first.golds == (Gold("007"),) and element.golds == (Gold("NA"),)
    assert first.id != element.id
    assert planets.golds == (Gold("Mercury"), Gold("Venus", ("Hesperus",)))
    assert planets.id == "jsonl-planets"
    assert coin.truth == "exact" and [gold.probability for gold in coin.golds] == [0.5, 0.5]


@pytest.mark.parametrize(
    "golds, words",
    [
        (["flu", "cold", "The Flu"], "the golds 'flu' and 'The Flu' are the same answer"),
        (["flu", "\u200b"], r"the gold '\\u200b' has no visible character"),
    ],
)
def test_a_gold_that_could_never_be_hit_is_refused(
    golds: list[str], words: str, tmp_path: Path
) -> None:
    write(tmp_path / "rows.jsonl", [ROWS[0], {"question": "Why?", "golds": golds}])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: " + words):
        load(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("id", [["x"], True, float("nan"), {"a": 1}])
def test_an_id_is_a_text_or_a_number(id: object, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [ROWS[0] | {"id": 7}, ROWS[1] | {"id": 1.5}])
    assert [one.id for one in load(tmp_path / "rows.jsonl").examples] == ["jsonl-7", "jsonl-1.5"]
    write(tmp_path / "rows.jsonl", [ROWS[0] | {"id": id}])
    with pytest.raises(UserError, match="rows.jsonl:1 .* neither a text nor a number"):
        load(tmp_path / "rows.jsonl")


def test_a_question_is_the_same_in_either_encoding_of_its_accents(tmp_path: Path) -> None:
    questions = ("Caf\u00e9 or tea?", "cafe\u0301  or tea?", "Cafe or tea?")
    write(tmp_path / "rows.jsonl", [{"question": q, "golds": ["tea"]} for q in questions])
    loaded = load(tmp_path / "rows.jsonl")
    assert [one.question for one in loaded.examples] == [questions[0], questions[2]]
    assert loaded.dropped == {"duplicate question": 1}


def test_a_question_of_a_table_is_the_text_of_its_cell(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("question,golds\n\"['a', 'b']\",x\n")
    assert [one.question for one in load(file).examples] == ["['a', 'b']"]


@pytest.mark.parametrize("path", ["~nobody-of-that-name/rows.jsonl", "x" * 5000])
def test_a_path_that_cannot_be_is_one_sentence(path: str, capsys: pytest.CaptureFixture[str]):
    words = ["+experiment=jsonl", "model=embedded"]
    assert main([*words, f"data.path={path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and path[:20] in said


@pytest.mark.parametrize(
    "cell, words",
    [
        ('"[""Mercury"", "', r"rows.csv\[0\]: 'golds' begins with \[ and is no list"),
        (r'"[""a\ud83d""]"', r"rows.csv\[0\]: 'golds' begins with \[ and is no list"),
        ("", r"rows.csv\[0\]: 'golds' must be a list .*the row has question, golds"),
        ('"[]"', "is no list of texts or objects"),
    ],
)
def test_a_malformed_cell_is_named(cell: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"question,golds\nPlanets?,{cell}\n")
    with pytest.raises(UserError, match=words):
        load(file)


def test_parquet_holds_lists_and_objects(tmp_path: Path) -> None:
    import datasets

    coin = [
        {"name": "heads", "aliases": ["H"], "probability": 0.5},
        {"name": "tails", "aliases": None, "probability": 0.5},
    ]
    rows = [{"question": "A coin?", "golds": coin}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (example,) = load(tmp_path / "rows.parquet").examples
    assert example.golds == (Gold("heads", ("H",), 0.5), Gold("tails", (), 0.5))


def test_columns_that_are_not_read_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"{i}?", "golds": ["x"], "id": str(i), "context": "c"} for i in range(40)]
    rows[7]["note"] = "n"
    config = compose([*WORDS, f"data.path={write(tmp_path / 'rows.jsonl', rows)}"])
    display = Display("plain", 0, 0)
    before: list[Loaded] = []
    for split in ("train", "validation"):
        load_data(config, split, None, 0, display, before)
    said = capsys.readouterr().out
    assert said.count("not read: ") == 1 and "rows.jsonl: not read: 'context', 'note' (" in said


def test_two_files_are_not_cut_and_what_is_measured_is_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Both number their rows from 0, and they share a question, in other letters.
    train = [{**row, "id": n} for n, row in enumerate(ROWS[:30])]
    held_out = [{**row, "id": n} for n, row in enumerate(ROWS[30:])]
    held_out.append({"question": "question  3?", "golds": ["x"]})
    config = compose(
        [
            *WORDS,
            f"data.train_path={write(tmp_path / 'train.jsonl', train)}",
            f"data.eval_path={write(tmp_path / 'eval.jsonl', held_out)}",
        ]
    )
    trained = load_training_data(config, Display("plain", 0, 0))
    expected = [row["question"] for row in train if row["question"] != "Question 3?"]
    assert [example.question for example in trained] == expected
    said = capsys.readouterr().out
    assert "dropped 1 (also in " in said and "eval.jsonl)" in said
    for split in ("test", "validation"):
        assert questions_of(config, split) == [row["question"] for row in held_out]


def test_one_file_is_cut_by_the_ids(tmp_path: Path) -> None:
    rows = [{**row, "id": n} for n, row in enumerate(ROWS)]
    config = compose([*WORDS, f"data.path={write(tmp_path / 'rows.jsonl', rows)}"])
    for split in ("train", "validation", "test"):
        expected = [row["question"] for row in rows if split_of(f"jsonl-{row['id']}") == split]
        assert questions_of(config, split) == expected


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "add data.path=<file.jsonl>, or data.train_path and data.eval_path"),
        (["data.train_path=a"], "data.train_path: two files are .* give both"),
        (["data.eval_path=a"], "data.eval_path: two files are .* give both"),
        (["data.path=a", "data.eval_path=b"], "data.path and data.eval_path: two files are"),
        (
            ["data.path=a", "data.train_path=b", "data.eval_path=c"],
            "data.path is one file that is cut",
        ),
        (["data.train_path=a", "data.eval_path=a"], "are both a: what is trained on"),
        (
            ["data.train_path=a", "data.eval_path=b", "data.source=hub", "data.hub_id=o/n"],
            "data.source=hub reads no file",
        ),
    ],
)
def test_the_settings_of_files_must_fit(words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        compose([*WORDS, *words])


def test_a_missing_file_is_named_by_its_setting(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", ROWS)
    config = compose([*WORDS, f"data.train_path={train}", "data.eval_path=nowhere.jsonl"])
    with pytest.raises(UserError, match="data.eval_path=nowhere.jsonl is not there"):
        questions_of(config, "test")
    with pytest.raises(UserError, match="data.eval_path=nowhere.jsonl is not there"):
        questions_of(config, "train")


def test_a_task_that_draws_its_questions_has_no_files() -> None:
    words = ["+experiment=ddxplus_bayes", "model=smollm2-135m", "data.source=path"]
    config = compose([*words, "data.train_path=a", "data.eval_path=b"])
    with pytest.raises(UserError, match="ddxplus_bayes draws its questions"):
        questions_of(config, "test")


def test_an_empty_split_says_what_to_do(tmp_path: Path) -> None:
    rows = [{**row, "id": n} for n, row in enumerate(ROWS)]
    only_train = [row for row in rows if split_of(f"jsonl-{row['id']}") == "train"]
    config = compose([*WORDS, f"data.path={write(tmp_path / 'rows.jsonl', only_train)}"])
    with pytest.raises(UserError, match="split 'test' is empty .* or two files that are not cut"):
        questions_of(config, "test")


def test_too_few_rows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = f"data.path={write(tmp_path / 'rows.jsonl', ROWS)}"
    display = Display("plain", 0, 0)

    def said(split: str, num_rows: int, *words: str) -> str:
        say_few_rows(compose([*WORDS, file, *words]), split, num_rows, display)
        return capsys.readouterr().out

    assert "only 7 question(s) and algo.prompts_per_step=16" in said("train", 7)
    assert said("train", 16) == ""
    # Half of the 95 % interval of a rate of one half: 1.96 x 0.5 / 5.
    assert "only 25 held-out question(s), with which a rate is known to about ±0.20" in said(
        "test", 25
    )
    assert said("test", 100) == ""
    # So few were asked for.
    assert said("test", 25, "eval.num_items=25") == ""
    clinic = compose(["+experiment=clinic"])
    say_few_rows(clinic, "test", 5, display)
    assert capsys.readouterr().out == ""

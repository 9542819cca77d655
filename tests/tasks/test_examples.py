"""Rows are read once and nothing of them is kept: examples are read again when asked for."""

import csv
import gc
import gzip
import io
import json
import os

import datasets
import pytest

from mar.errors import UserError
from mar.records import Example
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import load_both
from mar.tasks import loading
from mar.tasks.loading import Source, apply_target, load_split, plain_words, rows_of_file, split_of
from mar.tasks.registry import get_task

ROWS = [
    {"id": f"r{n}", "question": f"Name a planet, no. {n}: é?", "golds": ["Mars", "Venus"][: 1 + n % 2]}
    for n in range(200)
]  # fmt: skip


def load(path, split="train", task="jsonl", **options):
    return get_task(task).load(Source("path", split, path=str(path), **options))


def write(path, rows=ROWS, between="\n"):
    lines = between.join(map(json.dumps, rows)) + "\n"
    if ".csv" in path.suffixes:
        cells = [[row["id"], row["question"], json.dumps(row["golds"])] for row in rows]
        table = io.StringIO()
        csv.writer(table).writerows([["id", "question", "golds"], *cells])
        path.write_bytes(gzip.compress(table.getvalue().encode()))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("name", ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv.gz"))
def test_a_row_that_is_read_again_is_the_same(name, tmp_path):
    path = write(tmp_path / name)
    rows = rows_of_file(str(path))
    read = [(where, dict(row)) for where, row in rows]
    assert [row for _, row in read] == ROWS
    for number in (199, 0, 57):
        assert (rows.where(number), rows.again(number)) == read[number]

    examples = load(path).examples
    ids = [id for row in ROWS if split_of(id := f"jsonl-{row['id']}") == "train"]
    assert [e.id for e in examples] == ids and len(examples) == len(ids)
    assert examples[3] == list(examples)[3] == examples[3:4][0] and examples[-1].id == ids[-1]
    with pytest.raises(IndexError):
        examples[len(ids)]


def test_blank_lines_do_not_move_the_others(tmp_path):
    path = write(tmp_path / "a.jsonl", between="\n\n  \n")
    rows = rows_of_file(str(path))
    assert [where for where, _ in rows][:2] == [f"{path}:1", f"{path}:4"]
    assert rows.again(1)["id"] == "r1" and rows.where(1) == f"{path}:4"
    twice = [*ROWS[:3], ROWS[1] | {"question": "Another one?"}]
    write(path, twice, between="\n\n")
    with pytest.raises(
        UserError, match=rf"{path}:7: the id 'jsonl-r1' is also that of {path}:3: ids"
    ):
        load(path)


@pytest.mark.parametrize(
    "text", ("", " ", "A b", " A\nb ", "a  b", "a\tb", "a \n b", "a\x1fb", "Straße\u2003É", "\n\n")
)
def test_plain_words_are_the_words(text):
    assert plain_words(text) == " ".join(text.casefold().split())


def test_no_example_stays_in_memory(tmp_path):
    loaded = load(write(tmp_path / "a.jsonl"))
    gc.collect()
    kept = [thing for thing in gc.get_objects() if type(thing) is Example]
    assert loaded.examples[0] not in kept and len(loaded.examples) > 100


def test_one_reading_serves_both_splits(tmp_path, monkeypatch):
    readings = []
    rows_of_source = loading.rows_of_source
    monkeypatch.setattr(
        loading, "rows_of_source", lambda source: readings.append(1) or rows_of_source(source)
    )
    path = write(tmp_path / "a.jsonl")
    train = load(path)
    source = Source("path", "test", num=7, seed=3, path=str(path))
    test = load_split(train, source)
    assert len(readings) == 1
    alone = get_task("jsonl").load(source)
    assert list(test.examples) == list(alone.examples) and test.dropped == alone.dropped
    assert load_split(train, Source("path", "test", path=str(path), min_prob=0.5)) is None


def test_splits_that_the_hub_keeps_apart_are_read_apart(monkeypatch):
    hub = {
        name: datasets.Dataset.from_list([row | {"id": f"{name}{row['id']}"} for row in ROWS])
        for name in ("train", "dev")
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda hub_id: hub)
    monkeypatch.setattr(loading, "hub_fault", lambda kind, hub_id: "")
    source = Source("hub", "dev", hub_id="owner/name")
    train = get_task("jsonl").load(Source("hub", "train", hub_id="owner/name"))
    assert load_split(train, source) is None
    del hub["dev"]
    train = get_task("jsonl").load(Source("hub", "train", hub_id="owner/name"))
    held_out = load_split(train, Source("hub", "validation", hub_id="owner/name"))
    ids = {e.id for e in train.examples} | {e.id for e in held_out.examples}
    assert len(ids) == len(train.examples) + len(held_out.examples) == 200


def test_a_file_that_is_changed_while_it_is_used_is_told(tmp_path):
    path = write(tmp_path / "a.jsonl")
    examples = load(path).examples
    wanted = list(examples)
    other = write(tmp_path / "b.jsonl", ROWS[::-1])
    os.replace(other, path)  # another file in its place: the run keeps the one it began with
    assert list(examples) == wanted
    examples = load(path).examples
    write(path, ROWS)
    with pytest.raises(UserError, match=r"a\.jsonl was changed while it was in use \(row \d+ is"):
        list(examples)


def test_a_packed_file_without_room_to_unpack_is_told(tmp_path, monkeypatch):
    def full(descriptor, line):
        raise OSError(28, "No space left on device")

    path = write(tmp_path / "a.jsonl.gz")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="a.jsonl.gz find no room in .*No space left.*TMPDIR"):
        load(path)


def test_open_files_end_with_the_examples(tmp_path):
    gc.collect()  # what tests before this one have left
    before = len(os.listdir("/proc/self/fd"))
    loaded = load(write(tmp_path / "a.jsonl.gz"))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del loaded
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_probabilities_need_a_distribution_on_every_row_that_is_taken(tmp_path):
    coin = [{"name": "heads", "probability": 0.5}, {"name": "tails", "probability": 0.5}]
    rows = [row | {"golds": coin} for row in ROWS]
    examples = apply_target(load(write(tmp_path / "a.jsonl", rows)).examples, "probabilities")
    assert all(e.label is None and len(e.golds) == 2 for e in examples)
    taken = [i for i, row in enumerate(rows) if split_of(f"jsonl-{row['id']}") == "train"]
    rows[taken[-1]] = ROWS[taken[-1]]
    with pytest.raises(UserError, match="not all golds have a probability"):
        apply_target(load(write(tmp_path / "a.jsonl", rows)).examples, "probabilities")


def test_a_run_reads_one_file_once_and_of_two_each(tmp_path, monkeypatch):
    readings = []
    read_rows = loading.read_rows

    def counted(source, read):
        readings.append(source.path)
        return read_rows(source, read)

    monkeypatch.setattr(loading, "read_rows", counted)
    display = Display("plain", 0, 0)
    words = ["+experiment=jsonl", "model=smollm2-135m"]
    one, other = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", ROWS[:50])
    train, held_out = load_both(compose([*words, f"data.path={one}"]), display)
    assert readings == [str(one)] and not {e.id for e in train} & {e.id for e in held_out}

    readings.clear()
    two = [*words, f"data.train_path={one}", f"data.eval_path={other}"]
    train, held_out = load_both(compose(two), display)
    assert readings == [str(one), str(other)]
    assert [e.question for e in held_out] == [row["question"] for row in ROWS[:50]]
    assert [e.question for e in train] == [row["question"] for row in ROWS[50:]]

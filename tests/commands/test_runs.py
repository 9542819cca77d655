"""`mar.runs`: every run below a folder is a row, in whatever state it is, and nothing in a folder is
believed or obeyed."""

import fcntl
import json
import os
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from mar import runs
from mar.run.overview import RunRow, list_runs

CONFIG = {
    "name": "own",
    "seed": 3,
    "model": {"name": "embedded"},
    "data": {"task": "medqa"},
    "algo": {"name": "own"},
    "reward": {"objective": "multi_rlcr", "num_answers": 3},
    "train": {"steps": 20},
}
BEFORE = {"step": 0, "coverage@3": 0.6, "interval": {"coverage@3": [0.5, 0.7]}}
AFTER = {"step": 20, "coverage@3": 0.7, "interval": {"coverage@3": [0.68, 0.72]}}


def make_run(folder: Path, steps: int, document: object = None, written: int = 1000) -> Path:
    """A folder as mar.train leaves it after so many steps, last written at `written`."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    if steps:
        rows = [json.dumps({"step": step}) for step in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 9')
    if document is not None:
        (folder / "eval.json").write_text(json.dumps(document))
    for file in folder.iterdir():
        os.utime(file, (written, written))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    finished = {"task": "clinic", "history": [BEFORE, AFTER], "after": AFTER}
    make_run(tmp_path / "own/seed0", 20, finished, written=3000)
    make_run(tmp_path / "own/lr=1,K=3/seed0", 7, {"task": "clinic", "history": [BEFORE]}, 5000)
    make_run(tmp_path / "own/seed2", 0, written=1000)
    # wandb keeps another config.yaml below a run.
    (tmp_path / "own/seed0/wandb/files").mkdir(parents=True)
    (tmp_path / "own/seed0/wandb/files/config.yaml").write_text("wandb: 1\n")
    return tmp_path


def by_name(folder: Path) -> dict[str, RunRow]:
    return {str(Path(row.folder).relative_to(folder)): row for row in list_runs(folder)}


def test_every_run_is_a_row_and_the_newest_comes_first(folder: Path) -> None:
    rows = by_name(folder)
    assert list(rows) == ["own/lr=1,K=3/seed0", "own/seed0", "own/seed2"]
    done = rows["own/seed0"]
    assert (done.state, done.step, done.num_steps) == ("finished", 20, 20)
    # The rehearsal of medqa is on clinic.
    assert (done.task, done.model, done.method, done.seed) == (
        "clinic",
        "embedded",
        "multi_rlcr own",
        3,
    )
    assert (done.metric, done.value, done.low, done.high) == ("coverage@3", 0.7, 0.68, 0.72)
    half = rows["own/lr=1,K=3/seed0"]
    assert (half.state, half.step, half.value, half.measured_at) == ("unfinished", 7, 0.6, 0)
    young = rows["own/seed2"]
    assert (young.state, young.task, young.value) == ("not begun", "medqa", None)


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="only Linux lists its locks")
def test_a_run_that_a_process_writes_is_running(folder: Path) -> None:
    with (folder / "own/lr=1,K=3/.seed0.lock").open("w") as lock:
        assert by_name(folder)["own/lr=1,K=3/seed0"].state == "unfinished"
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert by_name(folder)["own/lr=1,K=3/seed0"].state == "running"


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert runs.main(words) == 0
    return capsys.readouterr().out


def test_the_table_and_the_document_say_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = shown([str(folder)], capsys)
    lines = [line.split() for line in table.splitlines()]
    assert lines[0][0] == "run" and "coverage@3" in lines[0]
    finished = next(line for line in lines if line[0] == str(folder / "own/seed0"))
    assert "0.700" in finished and "±0.020" in finished and "20" in finished
    half = next(line for line in lines if "lr=1" in line[0])
    assert "(0.600" in half and "7/20" in half

    text = shown([str(folder), "json=true"], capsys)
    assert text.count("\n") == 1
    document = json.loads(text)
    assert [row["state"] for row in document["runs"]] == ["unfinished", "finished", "not begun"]
    # Of other sizes of sets, each row says which.
    config = CONFIG | {"reward": {"objective": "multi_rlcr", "num_answers": 1}}
    single = make_run(folder / "single/seed0", 2, {"history": [{"step": 2, "coverage@1": 0.4}]})
    (single / "config.yaml").write_text(yaml.safe_dump(config))
    table = shown([str(folder)], capsys)
    assert "(0.400) @1" in table and "0.700 ±0.020 @3" in table


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_loses_columns_but_no_letter(folder: Path, width: int) -> None:
    console = Console(width=width, force_terminal=True, highlight=False)
    rows = [
        RunRow(
            "runs/own/seed0",
            "finished",
            "clinic",
            "embedded",
            "multi_rlcr own",
            0,
            20,
            20,
            "coverage@3",
            0.7,
            0.6,
            0.8,
        )
    ]
    with console.capture() as capture:
        runs.print_table(rows, console)
    text = capture.get()
    assert "…" not in text
    for word in ("runs/own/seed0", "multi_rlcr own", "finished"):
        assert word in text
    assert ("embedded" in text) == (width == 120)
    assert ("no room for model" in text) == (width < 120)
    assert ("steps" in text.splitlines()[0]) == (width > 60)


# What a folder may hold: name -> how it is spoilt. Nothing outside of the folder is touched.
def _pipe(run: Path) -> None:
    (run / "eval.json").unlink()
    os.mkfifo(run / "eval.json")


def _bomb(run: Path) -> None:
    lines = ["a: &a [x, x]"]
    for name, before in zip("bcdefghijklmnopqrstuvw", "abcdefghijklmnopqrstuv", strict=True):
        lines.append(f"{name}: &{name} [*{before}, *{before}]")
    text = "\n".join(lines)
    (run / "config.yaml").write_text(
        f"{text}\nmodel: {{name: *w}}\nreward: {{objective: *w}}\nalgo: {{name: *w}}\n"
    )


SPOILT = {
    "no yaml": lambda run: (run / "config.yaml").write_text("a: [1\n"),
    "a list": lambda run: (run / "config.yaml").write_text("[1]\n"),
    "bytes": lambda run: (run / "config.yaml").write_bytes(b"\xff\x00\xfe"),
    "python objects": lambda run: (run / "config.yaml").write_text("!!python/name:os.system\n"),
    "huge": lambda run: (run / "config.yaml").write_text("#" * (1 << 21)),
    "deep": lambda run: (run / "config.yaml").write_text("[" * 1200),
    "a bomb": _bomb,
    "half a document": lambda run: (run / "eval.json").write_text('{"after": '),
    "a deep document": lambda run: (run / "eval.json").write_text("[" * 100_000),
    "a pipe": _pipe,
    "a folder": lambda run: (run / "metrics.jsonl").unlink() or (run / "metrics.jsonl").mkdir(),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_folder_is_a_row_with_a_sentence(
    how: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SPOILT[how](folder / "own/seed0")
    row = by_name(folder)["own/seed0"]
    assert row.state == "damaged" and row.fault
    table = shown([str(folder)], capsys)
    assert f"{row.folder}: {row.fault}" in table
    # The others are there as before.
    assert "unfinished" in table
    document = json.loads(shown([str(folder), "json=true"], capsys))
    assert len(document["runs"]) == 3


def test_values_of_another_kind_are_left_out(folder: Path) -> None:
    document = {
        "task": 7,
        "history": [{"step": "9", "coverage@3": "x", "interval": {"coverage@3": [1]}}],
        "after": AFTER,
    }
    (folder / "own/seed0/eval.json").write_text(json.dumps(document))
    (folder / "own/seed0/metrics.jsonl").write_text('[1]\n{"step": [2]}\n')
    config = CONFIG | {"model": {"name": ["embedded"]}, "seed": True}
    (folder / "own/seed0/config.yaml").write_text(yaml.safe_dump(config))
    row = by_name(folder)["own/seed0"]
    assert row.model is None and row.seed is None
    assert (row.state, row.task, row.step, row.value, row.low) == (
        "finished",
        "medqa",
        None,
        None,
        None,
    )


def test_names_are_shown_not_obeyed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(folder / "a\x1b[31m[red]x\n", 1)
    (folder / "loop").symlink_to(folder)
    table = shown([str(folder)], capsys)
    assert "\x1b" not in table and "a\\x1b[31m[red]x\\x0a" in table
    assert len(json.loads(shown([str(folder), "json=true"], capsys))["runs"]) == 4


def test_mistakes_are_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, expected in (
        ([str(folder / "nowhere")], "is no folder"),
        ([str(empty)], "there is no run below"),
        ([str(folder), str(empty)], "one word too many"),
        (["json=yes"], "json=yes is neither true nor false"),
        (["sort=date"], "mar.runs has json"),
    ):
        assert runs.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and expected in said
    assert json.loads(shown([str(empty), "json=true"], capsys)) == {"runs": []}
    assert "python -m mar.runs" in shown(["-h"], capsys)

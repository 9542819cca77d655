"""What is written can be read back, half lines and later steps are forgotten, and no reader sees half a document."""

import io
import json
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from mar import files
from mar.errors import exit_code
from mar.files import (
    append_jsonl,
    jsonable,
    read_jsonl,
    rows_of_jsonl,
    truncate_jsonl,
    write_json,
)
from mar.records import Completion, Example, Gold, Prompt, Rollout
from mar.run.completions import completion_row, constant_runs
from mar.run.console import Display

ODD = "a\u2028b\u0085c\x0bd\ne\r\x1cf\ufffd é"  # all that str.splitlines splits at


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_plain_values():
    value = {"nan": float("nan"), "inf": -np.inf, "np": np.float32(0.1), "int": np.int64(7), "bool": np.bool_(True), "none": None,
             "tensor": torch.tensor(2.5), "tuple": (1, np.float64(1 / 3)), "deep": [{"x": np.float32("nan")}], "text": "é", "yes": True}  # fmt: skip
    out = jsonable(value)
    assert out == {"nan": None, "inf": None, "np": 0.1, "int": 7, "bool": True, "none": None, "tensor": 2.5, "tuple": [1, 0.333333],
                   "deep": [{"x": None}], "text": "é", "yes": True}  # fmt: skip
    assert type(out["int"]) is int and type(out["bool"]) is bool and type(out["yes"]) is bool
    assert json.loads(json.dumps(out, allow_nan=False)) == out


def test_append_and_truncate(tmp_path):
    path = tmp_path / "rows.jsonl"
    truncate_jsonl(path, 3)  # nothing there yet
    assert not path.exists()
    rows = [
        {"step": step, "stage": stage, "text": f"{ODD} {step}"}
        for step in range(6)
        for stage in ("train", "eval")
    ]
    append_jsonl(path, rows[:4])
    append_jsonl(path, rows[4:])
    assert read(path) == rows
    truncate_jsonl(path, 3)
    assert read(path) == rows[:8]
    append_jsonl(path, rows[8:])
    assert read(path) == rows
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("cut", [1, 12, 13, 20])
def test_half_a_line_is_forgotten(cut, tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"step": 1}, {"s": "é" * 20}])
    content = path.read_bytes()
    path.write_bytes(
        content[: content.index(b"\n") + 1 + cut]
    )  # killed while writing, inside a character or not
    truncate_jsonl(path, 5)
    append_jsonl(path, [{"step": 2}])
    assert read(path) == [{"step": 1}, {"step": 2}]


def test_documents_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "eval.json"
    write_json(path, {"before": np.float32(0.5), "after": float("nan")})
    assert json.loads(path.read_text()) == {"before": 0.5, "after": None}

    def crash(*_, **__):
        raise OSError("no space left")

    for owner, name, document in ((Path, "replace", {"new": 1}), (json, "dumps", {"new": 1})):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, crash)
            with pytest.raises(OSError, match="no space left"):
                write_json(path, document)
        assert json.loads(path.read_text()) == {"before": 0.5, "after": None}
    append_jsonl(path := tmp_path / "rows.jsonl", [{"step": 1}, {"step": 2}])
    truncate_jsonl(path, 1)
    assert read(path) == [{"step": 1}]


def test_a_long_record_is_cut_from_its_end(tmp_path, monkeypatch):
    """What stays is not read: the cost is that of the lines that go."""
    path = tmp_path / "rows.jsonl"
    rows = [{"step": step, "text": f"{ODD} {'x' * (step % 7)}"} for step in range(300)]
    append_jsonl(path, rows)
    whole = path.read_bytes()
    for block in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(files, "BLOCK_BYTES", block)
        for last_step in (299, 290, 0, -1):
            path.write_bytes(whole + b'{"step": 300, "te')
            truncate_jsonl(path, last_step)
            assert read(path) == rows[: last_step + 1]
    asked = []
    parse = json.loads
    monkeypatch.setattr(files.json, "loads", lambda line: asked.append(line) or parse(line))
    path.write_bytes(whole)
    truncate_jsonl(path, 297)
    assert len(asked) == 3


def test_a_completion_row_is_json_and_complete():
    asked = Prompt(
        Example(
            "e",
            "clinic",
            "What is it?",
            (Gold("flu", (), 0.7), Gold("cold", (), 0.3)),
            "exact",
            label=1,
        ),
        "?",
        (1, 2),
    )
    done = Completion(3, np.arange(4), np.zeros(4, np.float32), np.zeros(4, np.float32), "length")
    rollout = Rollout(asked, done, ODD, ("flu", None), (0.25, None), (0.0, 0.0), (False, False), "unfinished", np.array([0.0, -0.5]),
                      np.zeros(4, np.int64), -0.5, {"format": 0.0, "brier": np.float64(-0.5)})  # fmt: skip
    row = json.loads(json.dumps(jsonable(completion_row(rollout, "eval", 7)), allow_nan=False))
    assert row == {"step": 7, "stage": "eval", "task": "clinic", "id": "e", "sample": 3, "question": "What is it?", "targets": ["cold"],
                   "text": ODD, "answers": ["flu", None], "confidences": [0.25, None], "hits": [0, 0], "repeated": [False, False],
                   "reason": "unfinished", "reward": -0.5,
                   "parts": {"format": 0.0, "brier": -0.5}, "components": [0, -0.5], "finish_reason": "length", "num_tokens": 4,
                       "inserted": [0, 0]}  # fmt: skip

    shaded = completion_row(
        rollout, "train", 7, [0.5, 0.5, -0.25, -0.25, 0.0]
    )  # padded to the longest of the batch
    assert shaded["advantages"] == []  # no token has a place in the text


def test_equal_neighbours_are_one_run():
    assert constant_runs([0, 2, 2, 5], [0.50001, 0.5, -1 / 3, -1 / 3, 9.0]) == [
        [0, 0.5],
        [2, -0.333],
    ]


def test_broken_lines_are_named_and_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "x\xe2\x80\xa8y"}\n{"b": \n\n[1]\n{"c": 2}\n\xff')
    rows, broken = read_jsonl(path)
    assert rows == [{"a": "x\u2028y"}, {"c": 2}] and broken == [f"{path}:{n}" for n in (2, 4, 6)]


def test_rows_are_read_without_all_of_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"step": n, "text": "x" * 10_000} for n in range(1000)])
    tracemalloc.start()
    assert sum(row["step"] for row in rows_of_jsonl(path, [])) == 499_500
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 20


@pytest.mark.parametrize("mode", ["plain", "rich"])
def test_display_survives_missing_metrics(mode, capsys):
    with Display(mode, 2, 5) as display:
        display.step(3, {"reward/total": 0.25, "train/ece": None, "perf/tokens_per_s": 12345.6})
        display.step(4, {})
    display.table("end", {"floor": {"brier": None, "top1": 0.5}, "before": None}, ("top1", "brier"))
    out = capsys.readouterr().out
    if mode == "plain":
        assert (
            "step 3/5  reward 0.250  tok/s 12,346" in out and "ece" not in out and "[/" not in out
        )
    assert "0.500" in out


def test_time_left_never_says_sixty_seconds(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 59.9])
    monkeypatch.setattr("mar.run.console.time.perf_counter", lambda: next(clock))
    with Display("plain", 0, 2) as display:
        display.step(1, {})
    assert "1:00 left" in capsys.readouterr().out


def test_what_is_written_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (calls.append(("fsync", os.fstat(handle).st_size > 0)), sync(handle)),
    )
    monkeypatch.setattr(Path, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    append_jsonl(tmp_path / "rows.jsonl", [{"step": 1}])
    truncate_jsonl(tmp_path / "rows.jsonl", 1)
    write_json(tmp_path / "eval.json", {"before": 1})
    assert calls == [("fsync", True), ("fsync", True), ("fsync", True), "replace"]


def test_signs_that_a_terminal_does_not_have_become_question_marks(monkeypatch):
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert exit_code(lambda: print("0.7 \u00b1 0.1")) == 0
    assert written.getvalue() == b"0.7 ? 0.1\n"

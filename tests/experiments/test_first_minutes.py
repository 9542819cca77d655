"""The first minutes on a GPU, gone through on a CPU with tiny cases: the same code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.gpu import first_minutes, sampler_values, speed
from experiments.gpu.first_minutes import PARTS, Part
from experiments.gpu.measuring import ROOT, Place, Record, random_requests, shown

SCRIPT = ROOT / "experiments/gpu/first_minutes.py"
TINY = ["--device", "cpu", "--tiny"]


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(out), *TINY, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def all_parts(tmp_path_factory):
    out = tmp_path_factory.mktemp("parts")
    done = run(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_every_part_measures_on_a_cpu(name, all_parts):
    first, *rows, last = first_minutes.rows_of(all_parts / "first_minutes" / f"{name}.jsonl")
    assert first["value"]["torch"] == torch.__version__
    assert len(rows) >= 4
    assert last["what"] == "the part took"
    report = (all_parts / "TESTED_ON.md").read_text()
    assert f"## {name}: " in report and "Not run." not in report


@pytest.mark.slow
def test_one_part_alone_is_measured(tmp_path):
    done = run(tmp_path, "--only", "machine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [file.stem for file in (tmp_path / "first_minutes").glob("*.jsonl")] == ["machine"]
    report = (tmp_path / "TESTED_ON.md").read_text()
    assert all(f"## {part}: " in report for part in PARTS)
    assert report.count("Not run.") == len(PARTS) - 1


def test_a_step_beside_the_plan_is_measured(tmp_path):
    """Sampled, scored and updated twice: what calls the learner keeps up with it."""
    record = Record(tmp_path / "rows.jsonl")
    place = Place(torch.device("cpu"), tiny=True)
    speed.step(place, record, "1.7B", speed.STEPS["1.7B"])
    measured = [row["what"] for row in first_minutes.rows_of(record.file)]
    assert any("second update (planned" in what for what in measured)
    assert any("peak of the second update" in what for what in measured)


def test_the_limits_together_are_eight_minutes():
    assert sum(part.seconds for part in PARTS.values()) <= 480


def test_without_a_device_one_sentence_and_nothing_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert first_minutes.main(["--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err == first_minutes.NO_DEVICE
    assert not printed.out
    assert not list(tmp_path.iterdir())


# --- parts that go wrong ---------------------------------------------------------------------


@pytest.fixture
def parts_that_go_wrong(tmp_path, monkeypatch):
    """A copy of the script whose parts raise, hang, end their process, and work."""
    bodies = {
        "raises": "raise ValueError('no\\nsuch kernel')",
        "hangs": "import time; time.sleep(600)",
        "dies": "import os; os._exit(3)",
        "works": "record('ms', 1.5)",
    }
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, body in bodies.items():
        lines = [
            "def measure(place, record):",
            "    record('before', 7.0, 's')",
            f"    {body}",
        ]
        (folder / f"{name}.py").write_text("\n".join(lines))
    text = SCRIPT.read_text()
    listed = "\n".join(f"    {name!r}: Part({name!r}, 15, 'it {name}')," for name in bodies)
    head, rest = text.split("PARTS = {\n", 1)
    rest = rest.split("\n}\n", 1)[1]
    text = f"{head}PARTS = {{\n{listed}\n}}\n{rest}"
    text = text.replace('f"experiments.gpu.{PARTS[name].module}"', "PARTS[name].module")
    text = text.replace("Path(__file__).resolve().parents[2]", f"Path({str(ROOT)!r})")
    script = folder / "script.py"
    script.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return script


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_leaves_its_rows_and_the_others(parts_that_go_wrong, tmp_path):
    command = [sys.executable, str(parts_that_go_wrong), "--out", str(tmp_path / "out"), *TINY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "3 checks failed"
    found = {}
    for name in ("raises", "hangs", "dies", "works"):
        rows = first_minutes.rows_of(tmp_path / "out/first_minutes" / f"{name}.jsonl")
        found[name] = [shown(row) for row in rows[1:] if row["what"] != "the part took"]
    assert found == {
        "raises": ["before: 7 s", "raises broke off: ValueError: no such kernel MISSED"],
        "hangs": ["before: 7 s", "hangs was ended: it ran into its limit of 15 s MISSED"],
        "dies": ["before: 7 s", "dies ended: exit code 3 MISSED"],
        "works": ["before: 7 s", "ms: 1.5"],
    }
    report = (tmp_path / "out/TESTED_ON.md").read_text()
    assert report.count("**MISSED**") == 4  # the head says what it means


# --- rows ------------------------------------------------------------------------------------


def test_a_row_is_on_the_disk_at_once_and_a_limit_is_a_check(tmp_path):
    file = tmp_path / "rows.jsonl"
    record = Record(file)
    record("error", 0.5, "nats", at_most=0.25)
    assert [json.loads(line)["passed"] for line in file.read_text().splitlines()] == [False]
    record("error", 0.25, "nats", at_most=0.25)
    record("error", float("nan"), at_most=0.25)
    record.attempt("it", lambda: 1 / 0)
    rows = first_minutes.rows_of(file)
    assert [row["passed"] for row in rows] == [False, True, False, False]
    assert shown(rows[0]) == "error: 0.5 nats (at most 0.25) MISSED"
    assert shown(rows[3]) == "it: ZeroDivisionError: division by zero MISSED"


def test_half_a_line_of_a_killed_part_is_left_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"what": "a", "value": 1, "unit": ""}\n{"what": "b", "va')
    assert [row["what"] for row in first_minutes.rows_of(file)] == ["a"]


def test_a_bar_in_a_value_does_not_end_the_cell(tmp_path):
    row = {"what": "a", "value": "x|y", "unit": "", "passed": False}
    assert first_minutes.table_row(row) == "| a | x\\|y **MISSED** |"


def test_time_is_the_median_of_calls_after_the_first(monkeypatch):
    now = iter([0.0, 50.0, 60.0, 61.0, 70.0, 73.0, 80.0, 82.0])
    monkeypatch.setattr("experiments.gpu.measuring.time.perf_counter", lambda: next(now))
    place = Place(torch.device("cpu"), tiny=True)
    # of 1, 3 and 2; the 50 of the first call is not counted
    assert place.seconds(lambda: None, runs=3) == 2.0


def test_mismatch_is_rounding_for_one_model_and_seen_where_two_differ(tiny_model):
    model = tiny_model()
    requests = random_requests(23, [9, 9], 3, (5, 5, 5))
    rms, largest = sampler_values.mismatch(model, requests, 5)
    assert 0 <= rms <= largest < 1e-11

    def sample_from_another(_, *rest):
        return sampler_values.generate(tiny_model(seed=1), *rest)

    rms, largest = sampler_values.mismatch(model, requests, 5, sample_from_another)
    assert 0.01 < rms < largest


def test_a_part_has_its_module():
    for part in PARTS.values():
        assert isinstance(part, Part)
        assert (SCRIPT.parent / f"{part.module}.py").exists()

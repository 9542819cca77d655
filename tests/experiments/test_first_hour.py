"""What of experiments/gpu/first_hour.py a machine without a CUDA device can run."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from experiments.gpu import first_hour


def test_without_a_device_one_sentence_and_nothing_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(first_hour, "REPORT", tmp_path / "TESTED_ON.md")
    assert first_hour.main() == 2
    printed = capsys.readouterr()
    assert (
        printed.err == first_hour.NO_DEVICE + "\n"
        and printed.err.count(".") == 1
        and not printed.out
    )
    assert not list(tmp_path.iterdir())


def test_time_is_the_median_of_calls_after_the_first_between_waits():
    seen, now = [], iter([0.0, 50.0, 60.0, 61.0, 70.0, 73.0, 80.0, 82.0])

    def clock():
        seen.append("clock")
        return next(now)

    taken = first_hour.timed(lambda: seen.append("work"), 3, clock, lambda: seen.append("wait"))
    assert taken == 2.0  # of 1, 3 and 2; the 50 of the first call is not counted
    assert seen == ["wait", "clock", "work", "wait", "clock"] * 4


def test_roofline_by_hand():
    # 6 * 4 * 3 * 5 = 360 FLOPs; 2 * 2 * 3 * (4 + 5) = 108 bytes
    assert first_hour.attainable(4, 3, 5, 2, 36.0, 108.0) == 10.0
    assert first_hour.attainable(4, 3, 5, 2, 360.0, 9.0) == 12.0


def test_mismatch_is_rounding_for_one_model_and_seen_where_two_differ(tiny_model, monkeypatch):
    sizes = {"num_prompts": 2, "prompt_tokens": 9, "group_size": 3, "tokens": 5}
    found = first_hour.mismatch(tiny_model(), **sizes)
    assert found["tokens"] == 30 and 0 <= found["mean"] <= found["max"] < 1e-11
    other, sample = tiny_model(seed=1), first_hour.generate
    monkeypatch.setattr(first_hour, "generate", lambda model, *rest: sample(other, *rest))
    found = first_hour.mismatch(tiny_model(), **sizes)
    assert 0.01 < found["mean"] < found["max"]


def test_a_part_that_fails_leaves_the_others(capsys):
    def fails(device):
        raise ValueError("no\nsuch kernel")

    found = first_hour.measure(
        {"a": lambda device: {"on": device}, "b": fails, "c": lambda device: {"ms": 1.5}}, "cpu"
    )
    assert found == {
        "a": {"found": {"on": "cpu"}},
        "b": {"reason": "ValueError: no such kernel"},
        "c": {"found": {"ms": 1.5}},
    }


def test_the_report_is_rendered_and_the_last_line_is_json(monkeypatch, tmp_path, capsys):
    for name, value in {
        "ROOT": tmp_path,
        "REPORT": tmp_path / "TESTED_ON.md",
        "environment": lambda: {"device": "X100", "driver": "1.2"},
    }.items():
        monkeypatch.setattr(first_hour, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parts = {
        "speed": {"found": {"ms": 12.34567, "rows": "3 of 4", "steps": 20}},
        "broken": {"reason": "OSError: a|b"},
    }
    monkeypatch.setattr(first_hour, "measure", lambda *_: parts)
    assert first_hour.main() == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["first_hour"]["parts"] == parts
    head, table = (
        (tmp_path / "TESTED_ON.md")
        .read_text()
        .split("| part | what | measured |\n| --- | --- | --- |\n")
    )
    assert head.endswith("- device: X100\n- driver: 1.2\n\n")
    assert (
        table
        == "| speed | ms | 12.35 |\n| speed | rows | 3 of 4 |\n| speed | steps | 20 |\n| broken | failed | OSError: a\\|b |\n"
    )


def child(outcomes):
    """In place of subprocess.run: (exit code, stderr) by module; a successful mar.train leaves two
    steps.
    """

    def run(command, **_):
        code, stderr = outcomes[command[2]]
        if command[2] == "mar.train" and not code:
            (folder,) = (first_hour.Path(word[4:]) for word in command if word.startswith("out="))
            steps = [
                {
                    "perf/sample_s": s,
                    "perf/verify_s": 0.5,
                    "perf/update_s": 1.0,
                    "perf/tokens_per_s": 100.0 * s,
                }
                for s in (1.0, 2.0)
            ]
            lines = [
                json.dumps({**step, "policy/sampler_mismatch_max": step["perf/sample_s"] / 100})
                for step in steps
            ]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return subprocess.CompletedProcess(command, code, "", stderr)

    return run


def test_a_model_that_cannot_be_fetched_is_not_reachable():
    found = first_hour.train(
        "a/b", child({"mar.fetch": (1, "fetching\nerror: cannot fetch a/b from the hub\n")})
    )
    assert found == {"steps": "not reachable: error: cannot fetch a/b from the hub"}


def test_steps_of_a_child_are_read_and_its_failure_is_a_reason():
    good = first_hour.train("a/b", child({"mar.fetch": (0, ""), "mar.train": (0, "")}))
    assert good == {
        "steps": 2,
        "seconds a step, median": 3.0,
        "tokens/s, median": 150.0,
        "largest sampler mismatch": 0.02,
        "vLLM reads the export": "vllm is not installed",
    }
    with pytest.raises(RuntimeError, match="mar.train ended with 1: error: too large"):
        first_hour.train("a/b", child({"mar.fetch": (0, ""), "mar.train": (1, "error: too large")}))


def test_vllm_reads_the_export_in_a_process_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(first_hour.importlib.util, "find_spec", lambda name: name)
    calls = []

    def run(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, "loading\nTOKENS 8\nINFO: down\n", "")

    assert first_hour.read_by_vllm(tmp_path / "seed0", run) == "TOKENS 8"
    assert calls[0][1:] == [
        "-m",
        "mar.export",
        str(tmp_path / "seed0"),
        f"out={tmp_path / 'exported'}",
    ]
    assert calls[1][-1] == str(tmp_path / "exported") and "vllm" in calls[1][2]

    def failing(command, **_):
        error = "Traceback\nValueError: no such shape\n"
        return subprocess.CompletedProcess(command, 1, "", error)

    assert first_hour.read_by_vllm(tmp_path / "seed0", failing) == "ValueError: no such shape"


def test_a_failed_gpu_test_is_a_reason():
    def run(code):
        return lambda command, **_: subprocess.CompletedProcess(
            command, code, f"F..\n{code} failed\n", ""
        )

    assert first_hour.gpu_tests(run(0)) == {"pytest": "0 failed"}
    with pytest.raises(RuntimeError, match="1 failed"):
        first_hour.gpu_tests(run(1))


def test_the_driver_is_unknown_where_no_program_tells_it(monkeypatch):
    def run(command, **_):
        if command[0] == "nvidia-smi":
            raise FileNotFoundError
        return SimpleNamespace(stdout="abc\n")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X100")
    monkeypatch.setattr(first_hour.subprocess, "run", run)
    found = first_hour.environment()
    assert (found["device"], found["driver"], found["commit"]) == ("X100", "unknown", "abc")

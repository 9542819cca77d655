"""Sweeps: the same command goes on wherever it was stopped, and a refused job ends nothing."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mar import train
from mar.config import Config
from mar.errors import UserError
from mar.run import sweep
from mar.run.interrupts import Interrupts
from mar.run.sweep import Sweep, count_jobs

NUM_STEPS = 16


def command_of(out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "mar.train", "-m", "+experiment=clinic", "algo.prompts_per_step=2"),
        *("algo.group_size=3", f"train.steps={NUM_STEPS}", "model.max_completion_tokens=4"),
        *("eval.num_items=2", f"out={out}", "logger.console=plain", *more),
    ]


def steps_of(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def num_trained(output: str) -> int:
    """How many steps a command has trained, by what it said."""
    return len(re.findall(r"^step \d+/", output, re.MULTILINE))


@pytest.mark.slow
def test_an_interrupted_and_repeated_sweep_trains_nothing_twice(tmp_path: Path) -> None:
    command = command_of(tmp_path, "seed=0,1,2", "name=swept")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(6000):
        begun = list(tmp_path.glob("swept/*/seed1/metrics.jsonl"))
        if begun and begun[0].read_text().count("\n") >= 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    first, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "3 jobs: 1 finished, 1 interrupted, 1 not begun\n" in first
    (folder,) = (path.parent for path in tmp_path.glob("swept/*/seed0"))
    files = ("metrics.jsonl", "completions.jsonl", "eval.json", "config.yaml")
    of_seed0 = [(folder / "seed0" / name).read_bytes() for name in files]
    cut = len(steps_of(folder / "seed1"))
    assert 0 < cut < NUM_STEPS and not (folder / "seed2").exists()

    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and not again.stderr
    assert f"{folder}/seed0 is finished with an equal configuration: skipped\n" in again.stdout
    assert f"resuming after step {cut}" in again.stdout, (first, again.stdout)
    assert "3 jobs: 1 finished before, 2 finished\n" in again.stdout
    assert num_trained(first) + num_trained(again.stdout) == 3 * NUM_STEPS
    assert [(folder / "seed0" / name).read_bytes() for name in files] == of_seed0
    for seed in range(3):
        assert steps_of(folder / f"seed{seed}") == list(range(1, NUM_STEPS + 1))
    assert sorted(path.name for path in folder.glob("seed*")) == ["seed0", "seed1", "seed2"]

    third = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert third.returncode == 0 and num_trained(third.stdout) == 0


@pytest.mark.slow
def test_after_a_refused_job_the_others_are_trained(tmp_path: Path) -> None:
    command = command_of(tmp_path, "algo.group_size=3,1,2", "train.steps=2")
    for state, trained in (("finished", 4), ("finished before", 0)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 2 and num_trained(done.stdout) == trained
        assert done.stderr.startswith("error: algo.group_size=1 leaves") and (
            done.stderr.count("\n") == 1
        )
        table = done.stdout[done.stdout.index("\n3 jobs: ") :].splitlines()[1:]
        told = json.loads(table.pop())["jobs"]
        assert [job["state"] for job in told] == [state, "refused", state]
        assert (
            table.pop()
            == f"  python -m mar.report {tmp_path}/clinic   # all runs there in one HTML file"
        )
        assert table[0] == f"3 jobs: 2 {state}, 1 refused"
        assert table[1].split("  ")[1:3] == ["algo.group_size=3", state]
        assert table[2].split() == ["algo.group_size=1", "refused"]
        assert table[3].startswith("    algo.group_size=1 leaves")
        assert table[4].split("  ")[1:3] == ["algo.group_size=2", state]
        assert len(table) == 5


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweep]:
    """A sweep of four jobs whose words are their numbers."""
    one = Sweep()
    monkeypatch.setattr(sweep, "words_of_job", lambda: f"seed={len(one.ended)}")
    monkeypatch.setattr(sweep, "count_jobs", lambda: 4)
    monkeypatch.setattr(Interrupts, "any_received", False)
    yield one


def config_in(folder: str) -> Config:
    return Config(run_dir=folder)


def test_a_job_that_fails_is_told_and_the_next_one_runs(
    jobs: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(config: Config) -> str:
        raise UserError("no")

    def fail(config: Config) -> str:
        raise RuntimeError("out of\nmemory")

    def command() -> None:
        jobs.take(lambda: config_in("a"), lambda _: "finished")
        jobs.take(lambda: config_in("b"), refuse)
        jobs.take(lambda: config_in("c"), fail)
        jobs.take(lambda: config_in("d"), lambda _: "stopped")

    assert jobs.run_to_its_end(command) == 1
    said = capsys.readouterr()
    assert "error: no\n" in said.err and "Traceback" in said.err
    assert [(job.state, job.reason) for job in jobs.ended] == [
        ("finished", ""),
        ("refused", "no"),
        ("failed", "RuntimeError: out of memory"),
        ("stopped", ""),
    ]
    assert "4 jobs: 1 finished, 1 refused, 1 failed, 1 stopped\n" in said.out
    assert "goes on" not in said.out
    # In a pipe the last line is one document.
    document = json.loads(said.out.splitlines()[-1])
    assert document["jobs"][1] == {
        "words": "seed=1",
        "state": "refused",
        "folder": "b",
        "reason": "no",
    }
    assert len(document["jobs"]) == 4 and document["not_begun"] == 0


def test_the_words_of_a_sweep_come_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra itself reads no flag between two settings."""
    seen = []
    monkeypatch.setattr(sys, "argv", ["mar.train"])
    monkeypatch.setattr(train, "SWEEP", Sweep())
    monkeypatch.setattr(train, "with_hydra", lambda: seen.append(sys.argv[1:]))
    assert train.main(["+experiment=clinic", "-m", "seed=0,1"]) == 0
    assert seen == [["-m", "+experiment=clinic", "seed=0,1"]]


@pytest.mark.parametrize("how", ["outcome", "exception", "signal in the last step", "between"])
def test_an_interrupt_ends_the_sweep(
    how: str, jobs: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Config) -> str:
        if how == "exception":
            raise KeyboardInterrupt
        if how == "outcome":
            return "interrupted"
        if how == "signal in the last step":
            Interrupts.any_received = True
        return "finished"

    def command() -> None:
        jobs.take(lambda: config_in("a"), train)
        if how == "between":
            raise KeyboardInterrupt
        pytest.fail("the next job began")

    assert jobs.run_to_its_end(command) == 130
    said = capsys.readouterr().out
    assert "3 not begun" in said and "the same command goes on" in said


def test_of_several_ranks_an_error_within_a_job_ends_the_sweep(
    jobs: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others may wait for this rank in the job: it must not go on to the next one."""
    monkeypatch.setenv("WORLD_SIZE", "2")

    def refuse(*_: object) -> str:
        raise UserError("the disk is full")

    def command() -> None:
        jobs.take(lambda: refuse(), lambda _: "finished")
        jobs.take(lambda: config_in("b"), lambda _: "finished")
        jobs.take(lambda: config_in("c"), refuse)
        pytest.fail("the next job began")

    assert jobs.run_to_its_end(command) == 2
    assert "4 jobs: 2 refused, 1 finished, 1 not begun" in capsys.readouterr().out


def test_two_jobs_of_one_folder_are_refused(jobs: Sweep) -> None:
    """Repeated, each would move the other's results aside and train anew."""
    jobs.take(lambda: config_in("a"), lambda _: "finished")
    jobs.take(lambda: config_in("./a"), lambda _: pytest.fail("trained"))
    assert jobs.ended[1].state == "refused" and "run_dir" in jobs.ended[1].reason


def test_a_command_without_jobs_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert Sweep().run_to_its_end(lambda: None) == 0
    assert not capsys.readouterr().out


def test_jobs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["seed=0,1", "seed=0,1,2", "+experiment=clinic", "algo.group_size=range(2,4)", "-m"]
    monkeypatch.setattr(sweep, "words_of_sweep", lambda: words)
    monkeypatch.setattr(sweep.GlobalHydra, "config_loader", lambda _: None)
    assert count_jobs() == 6

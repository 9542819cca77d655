"""The tools of experiments/faults see what they say they see.

The faults themselves are `make faults-quick`.
"""

import os
import platform
import sys
from dataclasses import replace
from pathlib import Path

import pytest

if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
    pytest.skip("ptrace as used here is Linux on x86_64 or aarch64", allow_module_level=True)

from experiments.faults import kill_points, soak
from experiments.faults.run import page, selected, summary
from experiments.faults.runs import Row, before_call
from mar.answers.tokenizer import load_tokenizer
from mar.policy.weights import read_config


def publish(folder: Path, sync: bool = True, early: bool = False) -> None:
    """A save in small: one file, its folder, the rename, the folder above; then an old one goes."""
    (folder / "new.tmp").mkdir()
    with (folder / "new.tmp" / "data").open("w") as file:
        file.write("x")
        file.flush()
        if sync:
            os.fsync(file.fileno())
    if early:
        (folder / "old").unlink()
    for name in ("new.tmp", "."):
        handle = os.open(folder / name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        if name == "new.tmp":
            (folder / "new.tmp").rename(folder / "new")
    if not early:
        (folder / "old").unlink()


def traced(
    folder: Path, kill_at: int | None = None, **options: bool
) -> tuple[list[kill_points.Call], int]:
    folder.mkdir()
    (folder / "old").write_text("old")
    try:
        return kill_points.run(lambda: publish(folder, **options), folder, kill_at)
    except OSError as error:
        pytest.skip(str(error))


def test_every_call_is_seen_and_can_be_the_last(tmp_path: Path) -> None:
    calls, code = traced(tmp_path / "whole")
    assert code == 0
    names = [call.name.removesuffix("at") for call in calls]
    assert names == ["mkdir", "open", "write", "fsync", "fsync", "rename", "fsync", "unlink"]
    for n in range(len(calls)):
        folder = tmp_path / f"killed{n}"
        made, code = traced(folder, kill_at=n)
        assert code == -9 and len(made) == n + 1
        assert (folder / "new").exists() == (n > 5) and (folder / "old").exists()


def test_what_a_power_cut_could_spoil_is_named(tmp_path: Path) -> None:
    for options, expected in (
        ({}, []),
        ({"sync": False}, ["is not synced"]),
        ({"early": True}, ["is removed before"]),
    ):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        calls, _ = traced(folder, **options)
        found = kill_points.disorder(calls, folder / "new.tmp", folder / "new")
        assert len(found) == len(expected) and all(
            e in f for e, f in zip(expected, found, strict=True)
        ), found
        assert kill_points.unsynced(calls) == (
            {str(folder / "new" / "data")} if options == {"sync": False} else set()
        )


def test_the_page_is_the_results() -> None:
    good, bad = (
        Row("a", "what", 0, "it | said", 2, True),
        Row("b", "what", problems=["wrong"], equal=False),
    )
    results = summary(
        [good, bad, Row("c", "what", skipped="no root")], {"commit": "abc", "torch": "2"}
    )
    assert (
        results["faults_tried"],
        results["survived"],
        results["steps_lost_max"],
        results["mismatched"],
    ) == (2, 1, 2, ["b"])
    text = page(results)
    assert "1 of 2 faults survived, at most 2 steps lost, 1 mismatched" in text
    assert "it \\| said" in text and "**no**: wrong" in text and "skipped: no root" in text
    assert {case.__name__ for case in selected(False, [])} - {case.__name__ for case in selected(True, [])} == {
        "disk_full_at_a_save", "disk_full_at_a_line", "disk_full_at_start", "read_only_mount", "soak"
    }  # fmt: skip


# --- the soak --------------------------------------------------------------------------------


def steady(number: int = 2000) -> list[soak.Reading]:
    """Memory that settles and then is noisy; a checkpoint's file and thread now and then."""
    found = []
    for step in range(number):
        saving = step % 100 < 3
        memory = 300 + min(step, 200) / 10 + step % 7 / 10
        found.append(soak.Reading(memory, files=11 + saving, threads=4 + saving))
    return found


def test_a_steady_run_has_not_grown():
    said, problems = soak.growth(steady())
    assert problems == [] and "at most 12 and 12 open files, 5 and 5 threads" in said
    assert "memory 320.3 and 320.3 MB" in said


@pytest.mark.parametrize("leaking", ("memory_mb", "files", "threads"))
def test_what_grows_in_every_step_or_every_hundredth_is_seen(leaking):
    found = []
    for step, reading in enumerate(steady()):
        leaked = step * 0.003 if leaking == "memory_mb" else step // 100
        found.append(replace(reading, **{leaking: getattr(reading, leaking) + leaked}))
    (problem,) = soak.growth(found)[1]
    assert problem.startswith(leaking.removesuffix("_mb")) and "from" in problem


def test_the_soak_reads_this_process_in_every_step(tmp_path, monkeypatch):
    for name in ("batch", "rollout"):
        module = getattr(soak, name)
        called = {"batch": "make_batch", "rollout": "lru_cache"}[name]
        monkeypatch.setattr(module, called, getattr(module, called))
    monkeypatch.setattr(soak.batch, "make_batch", lambda number: number)
    leaked = []
    soak.watched(tmp_path / "log", leaked.append)()
    before = soak.read_process()
    with (tmp_path / "log").open():
        assert soak.batch.make_batch(7) == 7
    assert soak.batch.make_batch(8) == 8 and leaked == [1, 2]
    first, second = soak.readings(tmp_path / "log")
    assert first.files == before.files + 1 == second.files + 1
    assert first.threads == before.threads and abs(first.memory_mb - before.memory_mb) < 50
    assert soak.rollout.lru_cache(maxsize=1 << 16)(len).cache_info().maxsize == soak.REMEMBERED


def test_the_tiny_model_of_the_soak_is_a_checkpoint(tmp_path):
    folder = soak.tiny_model(tmp_path / "tiny")
    assert read_config(folder).num_layers == 1 and load_tokenizer(folder).eos_token_id is not None


def test_a_fault_at_a_function_that_is_gone_is_an_error_at_once():
    with pytest.raises(AttributeError, match="no_such_function"):
        before_call(soak, "no_such_function", 1, print)

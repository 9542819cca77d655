"""wandb offline: what a run logs can be read back, a resumed run keeps its id, and no fault of wandb reaches the run."""

import json
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from mar.run import wandb_mirror as mirror
from mar.run.compose import compose
from mar.run.wandb_mirror import Mirror
from mar.train import run

wandb = pytest.importorskip("wandb")


def frames(data: bytes) -> Iterator[bytes]:
    """The records of wandb's file: a header of 7 bytes, then blocks of 32 kB of pieces (checksum 4, length 2, kind 1: whole, first, middle, last)."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


def records(folder: Path) -> list:
    """Everything in the offline files of a run, oldest first.

    wandb writes them in a process of its own, which may still be at it: a file ends with `exit`.
    """
    from wandb.proto import wandb_internal_pb2 as pb

    until = time.monotonic() + 60
    while True:
        files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
        found = [pb.Record.FromString(f) for file in files for f in frames(file.read_bytes())]
        if any(record.HasField("exit") for record in found) or time.monotonic() > until:
            return found
        time.sleep(0.2)


def history(found: list) -> list[dict]:
    rows = [
        {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
        for r in found
        if r.HasField("history")
    ]
    return [row for row in rows if "reward/total" in row]


@pytest.mark.slow
def test_a_run_and_its_mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "+experiment=clinic",
        "train.steps=3",
        "algo.group_size=2",
        "algo.prompts_per_step=2",
        "eval.num_items=3",
        "checkpoint.every=1",
    ]
    words += [f"out={tmp_path}", "logger.console=plain", "logger.wandb=offline"]
    folder = tmp_path / "clinic/seed0"
    assert run(compose([*words, "train.stop_at=2"])) == 0
    id = (folder / "wandb_id").read_text()
    assert run(compose(words)) == 0
    assert (folder / "wandb_id").read_text() == id
    found = records(folder)
    assert {r.run.run_id for r in found if r.HasField("run")} == {id}
    logged, own = (
        history(found),
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
    )
    assert [row["step"] for row in logged] == [1, 2, 3]
    for theirs, ours in zip(logged, own, strict=True):
        for key, value in ours.items():
            if key != "step" and value is not None:
                assert theirs[key] == value, key
    media = {p.suffix for p in folder.glob("wandb/offline-run-*/files/media/**/*") if p.is_file()}
    assert (
        media == {".png", ".json"} and (folder / "plots/learning.svg").exists()
    )  # figures, and the table of completions
    summary = {
        i.key or i.nested_key[0]: i.value_json
        for r in found
        if r.HasField("summary")
        for i in r.summary.update
    }
    assert (
        json.loads(summary["gap_closed"])
        == json.loads((folder / "eval.json").read_text())["gap_closed"]
    )
    assert "wandb is off" not in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["init", "log", "hang", "missing", "no key"])
def test_a_fault_is_said_once_and_the_run_goes_on(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "PATIENCE_S", 0.2)
    stop = threading.Event()

    def act(*_: object, **__: object) -> None:
        if fault == "hang":
            stop.wait(5)
        raise SystemExit(f"{fault} is broken")

    fake = types.SimpleNamespace(
        init=act, login=lambda **_: fault != "no key", Settings=lambda **_: None
    )
    if fault == "log":
        fake.init = lambda **_: types.SimpleNamespace(log=act)
    monkeypatch.setitem(sys.modules, "wandb", None if fault == "missing" else fake)
    said: list[str] = []
    one = Mirror("online", tmp_path, {}, said.append)
    for step in (1, 2):
        one.step(step, {"x": 1.0})
        one.completions(step, [])
    one.close({}, lambda: pytest.fail("no pictures are drawn for nobody"))
    stop.set()
    assert (
        len(said) == 1 and said[0].startswith("wandb is off from here on") and "\n" not in said[0]
    )
    assert ("no API key" in said[0]) == (fault == "no key") and ("no answer" in said[0]) == (
        fault == "hang"
    )


def test_off_touches_nothing(tmp_path: Path) -> None:
    Mirror("off", tmp_path, {}, pytest.fail).step(1, {"x": 1})
    assert not list(tmp_path.iterdir())

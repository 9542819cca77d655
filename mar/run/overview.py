"""All runs below a folder, one row each, whatever state they are in.

A folder may come from anywhere: nothing in it is trusted. What cannot be read becomes a row that
says so; only texts and numbers of known keys are taken over.
"""

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from mar.files import last_row

CONFIG = "config.yaml"
# What a run goes on writing: the newest of them says when it last did.
WRITTEN = ("metrics.jsonl", "eval.json", "evaluation.json", CONFIG)
# A config of ours has about 4 kB, an eval.json a few more for each evaluation.
LARGEST_CONFIG = 1 << 20
LARGEST_DOCUMENT = 1 << 28
LOCKS = Path("/proc/locks")  # of Linux: which files are locked


@dataclass(frozen=True)
class RunRow:
    """What is said of one run. None: it is not known (yet)."""

    folder: str
    # finished, running, unfinished, not begun, damaged
    state: str
    task: str | None = None
    model: str | None = None
    # reward.objective and algo.name
    method: str | None = None
    seed: int | None = None
    step: int | None = None
    num_steps: int | None = None
    # Coverage of one set of K answers on the held-out questions, with its 95 % interval, and the
    # step that it was measured at.
    metric: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    measured_at: int | None = None
    # When the run last wrote, in local time.
    date: str | None = None
    # What is wrong with a damaged one, in a sentence.
    fault: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Damaged(Exception):
    """A file of a run that cannot be read; the message names it."""


def list_runs(folder: Path) -> list[RunRow]:
    """The runs in a folder or below it, the one that wrote last first."""
    dated = []
    for run in _run_folders(folder):
        seconds = _last_written(run)
        row = replace(_read_row(run), date=_as_date(seconds))
        dated.append((-seconds, row.folder, row))
    return [row for _, _, row in sorted(dated, key=lambda entry: entry[:2])]


def _run_folders(folder: Path) -> Iterator[Path]:
    """Folders with a config.yaml. What lies below a run is its own business (wandb keeps another
    config.yaml there); links are not followed, they may lead in a circle."""
    for path, subfolders, names in os.walk(folder):
        if CONFIG in names:
            subfolders.clear()
            yield Path(path)
        subfolders.sort()


def _last_written(run: Path) -> float:
    """Seconds since 1970; 0 where nothing can be seen."""
    times = [0.0]
    for name in WRITTEN:
        try:
            times.append((run / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)


def _as_date(seconds: float) -> str | None:
    if not seconds:
        return None
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


# --- one run ---------------------------------------------------------------------------------


def _read_row(run: Path) -> RunRow:
    row = RunRow(folder=str(run), state="damaged")
    try:
        config = _read_config(run / CONFIG)
        row = _with_settings(row, config)
        document = _read_document(run / "eval.json")
        row = _with_measurement(row, config, document)
        row = replace(row, step=_last_step(run))
    except Damaged as error:
        return replace(row, fault=str(error))
    return replace(row, state=_state(run, row.step, document))


def _state(run: Path, step: int | None, document: Mapping[str, Any]) -> str:
    if document.get("after"):
        return "finished"
    if _is_locked(run.with_name(f".{run.name}.lock")):
        return "running"
    return "unfinished" if step else "not begun"


def _is_locked(lock: Path) -> bool:
    """Whether a process holds the lock, as the kernel lists it. Trying the lock could get in the
    way of a run that starts at this moment."""
    try:
        number = str(lock.stat().st_ino)
        lines = LOCKS.read_text().splitlines()
    except OSError:
        return False
    # 1: FLOCK  ADVISORY  WRITE 4242 fd:01:1234567 0 EOF
    held = [line.split() for line in lines if " FLOCK " in line]
    return any(len(words) > 5 and words[5].rpartition(":")[2] == number for words in held)


def _with_settings(row: RunRow, config: Mapping[str, Any]) -> RunRow:
    objective = _text(config, "reward", "objective")
    algo = _text(config, "algo", "name")
    if objective is None or algo is None:
        raise Damaged(f"{CONFIG} is of another version of mar, or of another program")
    return replace(
        row,
        task=_text(config, "data", "task"),
        model=_text(config, "model", "name"),
        method=f"{objective} {algo}",
        seed=_integer(config.get("seed")),
        num_steps=_integer(_value(config, "train", "steps")),
    )


def _with_measurement(
    row: RunRow, config: Mapping[str, Any], document: Mapping[str, Any]
) -> RunRow:
    """The coverage of the last evaluation, and the task that was really asked (the rehearsal of
    medqa is on clinic)."""
    asked = document.get("task")
    if isinstance(asked, str):
        row = replace(row, task=asked)
    history = document.get("history")
    if not isinstance(history, list) or not history or not isinstance(history[-1], dict):
        return row
    last = history[-1]
    name = f"coverage@{_integer(_value(config, 'reward', 'num_answers'))}"
    interval = _value(last, "interval", name)
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    return replace(
        row,
        metric=name,
        value=_number(last.get(name)),
        low=_number(low),
        high=_number(high),
        measured_at=_integer(last.get("step")),
    )


def _last_step(run: Path) -> int | None:
    """The step of the last whole line of metrics.jsonl; 0 where there is none."""
    file = run / "metrics.jsonl"
    if not _is_there(file, largest=None):
        return 0
    try:
        return _integer(last_row(file).get("step", 0))
    except (OSError, RecursionError) as error:
        raise Damaged(f"{file.name} cannot be read ({type(error).__name__})") from None


# --- files that may hold anything ------------------------------------------------------------


def _is_there(file: Path, largest: int | None) -> bool:
    """Raises Damaged for what is no plain file (reading a pipe would wait for ever), or too big."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Damaged(f"{file.name} cannot be read ({type(error).__name__})") from None
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{file.name} is no file")
    if largest is not None and status.st_size > largest:
        raise Damaged(f"{file.name} has {status.st_size:,} bytes, which mar does not write")
    return True


def _read_config(file: Path) -> dict[str, Any]:
    if not _is_there(file, LARGEST_CONFIG):
        raise Damaged(f"{file.name} leads nowhere")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise Damaged(f"{file.name} cannot be read ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise Damaged(f"{file.name} holds no settings")
    return content


def _read_document(file: Path) -> dict[str, Any]:
    if not _is_there(file, LARGEST_DOCUMENT):
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{file.name} cannot be read ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise Damaged(f"{file.name} is no JSON object")
    return content


def _value(tree: Mapping[str, Any], section: str, key: str) -> Any:
    part = tree.get(section)
    return part.get(key) if isinstance(part, dict) else None


def _text(tree: Mapping[str, Any], section: str, key: str) -> str | None:
    value = _value(tree, section, key)
    return value if isinstance(value, str) else None


def _integer(value: Any) -> int | None:
    return value if type(value) is int else None


def _number(value: Any) -> float | None:
    is_number = type(value) in (int, float) and math.isfinite(value)
    return float(value) if is_number else None

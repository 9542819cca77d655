"""What a run writes and shows: `metrics.jsonl` is the record, `completions.jsonl` the text, the console a view of them."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table

from mar.mirror import Mirror
from mar.records import Rollout


def plain(value: Any) -> Any:
    """A value as JSON can hold it: no nan, no numpy, floats to six significant digits."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def shown(value: float | Sequence[float | None] | None) -> str:
    """A metric in a table; [value, low, high] with half of its interval."""
    if isinstance(value, Sequence):
        middle, low, high = value
        return shown(middle) + (
            "" if low is None or high is None else f" ±{shown((high - low) / 2)}"
        )
    return "–" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file, and `file:line` of every line that is no JSON object (a crash, a full disk): these are skipped."""
    rows, broken = [], []
    for number, line in enumerate(
        path.read_text(encoding="utf-8", errors="replace").split("\n"), 1
    ):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError:
            row = line
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            broken.append(f"{path}:{number}")
    return rows, broken


def append_jsonl(
    path: Path, rows: Iterable[Mapping[str, Any]], mode: str = "a", indent: int | None = None
) -> None:
    """Append rows, one JSON document a line, and wait until they are on the disk."""
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(
            json.dumps(plain(row), ensure_ascii=False, indent=indent) + "\n" for row in rows
        )
        file.flush()
        os.fsync(file.fileno())


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]], indent: int | None = None) -> None:
    """Write a file of rows so that a reader never sees half of it."""
    append_jsonl(path.with_suffix(".tmp"), rows, "w", indent)
    path.with_suffix(".tmp").replace(path)


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Forget what a run wrote after the checkpoint it resumes from, and any half line."""
    if path.exists():
        write_jsonl(path, [row for row in read_jsonl(path)[0] if row.get("step", 0) <= last_step])


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write one JSON document so that a reader never sees half of it."""
    write_jsonl(path, [document], indent=2)


def runs_of(starts: Sequence[int], values: Sequence[float]) -> list[list[float]]:
    """[[first character, value], ...] of each run of tokens with one value, to three digits: an advantage is constant over a segment."""
    tokens = zip(starts, (float(f"{v:.3g}") for v in values), strict=False)
    return [[int(next(run)[0]), value] for value, run in groupby(tokens, key=itemgetter(1))]


def completion_row(
    rollout: Rollout, stage: str, step: int, advantages: Sequence[float] | None = None
) -> dict[str, Any]:
    """One line of `completions.jsonl`. advantages [>= R]: one per token, kept as `runs_of` them."""
    example = rollout.prompt.example
    return {
        "step": step,
        "stage": stage,
        "task": example.task,
        "id": example.id,
        "sample": rollout.completion.sample_index,
        "question": example.question,
        "targets": [gold.name for gold in example.targets()],
        **{
            name: getattr(rollout, name)
            for name in ("text", "answers", "confidences", "hits", "repeated", "reason")
        },
        "reward": rollout.total,
        "parts": rollout.parts,
        "components": rollout.components.tolist(),
        "finish_reason": rollout.completion.finish_reason,
        "num_tokens": len(rollout.completion.ids),
        "inserted": rollout.completion.inserted,
        **(
            {}
            if advantages is None
            else {"advantages": runs_of(rollout.token_starts.tolist(), advantages)}
        ),
    }


class Display:
    """Progress of a run: a live bar on a terminal, plain lines elsewhere. Goes to stderr-free stdout; the last line is the caller's JSON."""

    SHOWN = {
        "reward": "reward/total",
        "coverage": "reward/coverage",
        "ece": "train/ece",
        "format": "train/format_rate",
    }
    SHOWN |= {"tok/s": "perf/tokens_per_s"}

    def __init__(self, mode: str, first_step: int, num_steps: int):
        self.console = Console()
        self.live = mode == "rich" or (mode == "auto" and sys.stdout.isatty())
        self.first_step, self.num_steps, self.began = first_step, num_steps, time.perf_counter()
        self.progress: Progress | None = None
        self.mirror: Mirror | None = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def __enter__(self) -> "Display":
        self.began = time.perf_counter()  # loading and the evaluation before are no steps
        if self.live:
            columns = (
                "step {task.completed:.0f}/{task.total:.0f}",
                BarColumn(),
                "{task.fields[line]}",
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=self.console)
            self.task = self.progress.add_task(
                "train", total=self.num_steps, completed=self.first_step, line=""
            )
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step (counted from 1)."""
        if self.mirror:
            self.mirror.step(step, plain(metrics))
        values = {
            label: metrics[key] for label, key in self.SHOWN.items() if metrics.get(key) is not None
        }
        line = "  ".join(
            f"{label} {value:,.0f}" if label == "tok/s" else f"{label} {value:.3f}"
            for label, value in values.items()
        )
        if self.progress:
            self.progress.update(self.task, completed=step, line=line)
            return
        rate = (time.perf_counter() - self.began) / (step - self.first_step)
        left = round(rate * (self.num_steps - step))
        self.say(f"step {step}/{self.num_steps}  {line}  {left // 60}:{left % 60:02} left")

    def table(
        self, title: str, columns: Mapping[str, Mapping[str, Any] | None], rows: Sequence[str]
    ) -> None:
        """Metrics (rows) of several policies (columns)."""
        table = Table(title=title, title_justify="left")
        table.add_column("", no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right", overflow="fold")
        for row in rows:
            values = [(column or {}).get(row) for column in columns.values()]
            table.add_row(row, *map(shown, values))
        self.console.print(table)

"""What a run writes and shows: `metrics.jsonl` is the record, `completions.jsonl` the text, the console a view of them."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table

from mar.files import plain
from mar.run.wandb_mirror import Mirror


def shown(value: float | Sequence[float | None] | None) -> str:
    """A metric in a table; [value, low, high] with half of its interval."""
    if isinstance(value, Sequence):
        middle, low, high = value
        return shown(middle) + (
            "" if low is None or high is None else f" ±{shown((high - low) / 2)}"
        )
    return "–" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


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

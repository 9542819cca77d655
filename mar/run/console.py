"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere, tables."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table

from mar.files import jsonable
from mar.measure.shown_metrics import PROGRESS
from mar.run.wandb_mirror import Mirror


def format_metric(value: float | Sequence[float | None] | None) -> str:
    """A metric in a table; [value, low, high] with half of its interval."""
    if value is None:
        return "–"
    if isinstance(value, Sequence):
        middle, low, high = value
        if low is None or high is None:
            return format_metric(middle)
        return f"{format_metric(middle)} ±{format_metric((high - low) / 2)}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def printable(text: str) -> str:
    """Control characters are shown, not obeyed: somebody else wrote this."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class Display:
    """Progress of a run, on stdout. The last line is left to the command: its JSON document."""

    def __init__(self, mode: str, first_step: int, num_steps: int):
        self.console = Console()
        self.live = mode == "rich" or (mode == "auto" and sys.stdout.isatty())
        self.first_step = first_step
        self.num_steps = num_steps
        self.began = time.perf_counter()
        self.progress: Progress | None = None
        self.mirror: Mirror | None = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def __enter__(self) -> "Display":
        self.began = time.perf_counter()  # loading and the evaluation before are no steps
        if self.live:
            self.progress = Progress(
                "step {task.completed:.0f}/{task.total:.0f}",
                BarColumn(),
                "{task.fields[line]}",
                TimeRemainingColumn(),
                console=self.console,
            )
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
            self.mirror.step(step, jsonable(metrics))
        line = self._step_line(metrics)
        if self.progress:
            self.progress.update(self.task, completed=step, line=line)
            return
        seconds_per_step = (time.perf_counter() - self.began) / (step - self.first_step)
        minutes, seconds = divmod(round(seconds_per_step * (self.num_steps - step)), 60)
        self.say(f"step {step}/{self.num_steps}  {line}  {minutes}:{seconds:02} left")

    def _step_line(self, metrics: Mapping[str, Any]) -> str:
        parts = []
        for label, key in PROGRESS.items():
            value = metrics.get(key)
            if value is not None:
                number = f"{value:,.0f}" if label == "tok/s" else f"{value:.3f}"
                parts.append(f"{label} {number}")
        return "  ".join(parts)

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
            table.add_row(row, *map(format_metric, values))
        self.console.print(table)

"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere, tables."""

import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.table import Table
from rich.text import Text

from mar.files import jsonable
from mar.measure.shown_metrics import PROGRESS
from mar.run.wandb_mirror import Mirror

GAP = "  "  # between two parts of a line
SHORTEST_BAR = 8  # characters
LONGEST_BAR = 40
UNLIMITED = 10_000
HARD_SPACE = "\0"  # where a line is not broken


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


def printable(text: str, keep: str = "") -> str:
    """Control characters are shown, not obeyed: somebody else wrote this. `keep`: those to leave."""
    return "".join(c if c.isprintable() or c in keep else f"\\x{ord(c):02x}" for c in text)


def folded(line: str, width: int) -> str:
    """A line in lines of `width` characters, the later ones two spaces further in. It breaks at
    gaps of two spaces where it has them, else between words. A path or a command is never broken.
    """
    body = line.lstrip(" ")
    indent = " " * (len(line) - len(body))
    parts = []
    for part in re.split("( {2,})", body):
        stays_whole = len(part) <= width - len(indent) - len(GAP) or part.startswith("python -m")
        if GAP in body and stays_whole and part.strip():
            part = part.replace(" ", HARD_SPACE)
        parts.append(part)
    lines = textwrap.wrap(
        "".join(parts),
        width,
        initial_indent=indent,
        subsequent_indent=indent + GAP,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace(HARD_SPACE, " ")


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours: 1:05, 2:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"


def progress_line(
    position: str, metrics: Mapping[str, str], left: str, width: int, done: float | None = None
) -> str:
    """One line that fits into `width` characters. `position`: "step 3/200", always there.

    Then come the metrics (label -> number) in their order, and the time left. What does not fit is
    left out whole, the least important first: what stands in the middle of the line, then the time
    left, then coverage and reward (the first two metrics). A bar, of `done` from 0 to 1, takes the
    room that remains.
    """
    parts = [f"{label} {number}" for label, number in metrics.items()]
    by_importance = [*parts[:2], left, *parts[2:]]
    room = width - len(position)
    kept = []
    for part in by_importance:
        if not part:
            continue
        if len(part) + len(GAP) > room:
            break
        room -= len(part) + len(GAP)
        kept.append(part)
    line = [part for part in (position, *parts, left) if part == position or part in kept]
    bar_width = min(room - len(GAP), LONGEST_BAR)
    if done is not None and bar_width >= SHORTEST_BAR:
        filled = round(bar_width * min(max(done, 0.0), 1.0))
        line.insert(1, "━" * filled + "╌" * (bar_width - filled))
    return GAP.join(line)[:width]


class Live(ProgressColumn):
    """The line of a task of `rich.progress`, made anew for the width that the terminal has now."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["first"]
        left = ""
        if done > 0 and task.total is not None and task.start_time is not None:
            # Since the last one was done, time has gone on.
            measured = task.fields["measured_at"] - task.start_time
            since = task.get_time() - task.fields["measured_at"]
            rest = measured / done * (task.total - task.completed) - since
            left = f"{clock(max(rest, 0.0))} left"
        share = task.completed / task.total if task.total else 0.0
        position = f"{task.description} {task.completed:.0f}/{task.total:.0f}"
        width = self.console.width
        return Text(progress_line(position, task.fields["metrics"], left, width, share))


class Display:
    """Progress of a run, on stdout. The last line is left to the command: its JSON document."""

    def __init__(self, mode: str, first_step: int, num_steps: int):
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = UNLIMITED  # nobody's screen has an edge here
        self.live = mode == "rich" or (mode == "auto" and sys.stdout.isatty())
        self.first_step = first_step
        self.num_steps = num_steps
        self.began = time.perf_counter()
        self.progress: Progress | None = None
        self.mirror: Mirror | None = None

    def say(self, text: str) -> None:
        """Print a line, on a terminal in as many lines as it takes."""
        if self.console.is_terminal:
            lines = [folded(line, self.console.width) for line in text.splitlines()]
            text = "\n".join(lines)
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def __enter__(self) -> "Display":
        self.began = time.perf_counter()  # loading and the evaluation before are no steps
        if self.live:
            self.progress = self._start_progress()
            self.task = self._add_task(self.progress, "step", self.num_steps, self.first_step)
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None

    def _start_progress(self, transient: bool = False) -> Progress:
        progress = Progress(Live(self.console), console=self.console, transient=transient)
        progress.start()
        return progress

    def _add_task(self, progress: Progress, name: str, total: int, first: int = 0) -> TaskID:
        return progress.add_task(
            name,
            total=total,
            completed=first,
            first=first,
            measured_at=progress.get_time(),
            metrics={},
        )

    @contextmanager
    def counting(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """A bar with the time left while something is done `total` times; it goes when that is
        done. The function that comes is called once for each time, with whatever. Plain output has
        none, and neither has what is done already."""
        if not self.live or self.console.quiet or not total:
            yield lambda *_: None
            return
        progress = self.progress or self._start_progress(transient=True)
        task = self._add_task(progress, name, total)
        count = 0

        def tick(*_: object) -> None:
            nonlocal count
            count += 1
            progress.update(task, completed=count, measured_at=progress.get_time())

        try:
            yield tick
        finally:
            progress.remove_task(task)
            if progress is not self.progress:
                progress.stop()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step (counted from 1)."""
        if self.mirror:
            self.mirror.step(step, jsonable(metrics))
        shown = _shown_metrics(metrics)
        if self.progress:
            now = self.progress.get_time()
            self.progress.update(self.task, completed=step, metrics=shown, measured_at=now)
            return
        seconds_per_step = (time.perf_counter() - self.began) / (step - self.first_step)
        left = f"{clock(seconds_per_step * (self.num_steps - step))} left"
        width = self.console.width if self.console.is_terminal else UNLIMITED
        self.say(progress_line(f"step {step}/{self.num_steps}", shown, left, width))

    def table(
        self, title: str, columns: Mapping[str, Mapping[str, Any] | None], rows: Sequence[str]
    ) -> None:
        """Metrics (rows) of several policies (columns): without lines between the columns where
        the terminal has no room for them, in several tables where it is narrower still, and whole
        in a pipe."""
        widths = {name: _narrowest(name, column, rows) for name, column in columns.items()}
        room = self.console.width - 1 - max(map(len, rows), default=0)
        for names in _that_fit(widths, room):
            self._table(title, {name: columns[name] for name in names}, rows, widths)

    def _table(
        self,
        title: str,
        columns: Mapping[str, Mapping[str, Any] | None],
        rows: Sequence[str],
        widths: Mapping[str, int],
    ) -> None:
        table = Table(title=title, title_justify="left")
        table.add_column("", no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right", overflow="fold")
        for row in rows:
            values = [(column or {}).get(row) for column in columns.values()]
            table.add_row(row, *map(format_metric, values))
        unlimited = self.console.options.update(width=UNLIMITED)
        if Measurement.get(self.console, unlimited, table).maximum > self.console.width:
            table.box = None
            table.padding = (0, 1, 0, 0)
            table.pad_edge = False
        if Measurement.get(self.console, unlimited, table).maximum > self.console.width:
            # An interval goes below its value; a name stays whole.
            for name, column in zip(columns, table.columns[1:], strict=True):
                column.width = widths[name]
        self.console.print(table)


def _narrowest(name: str, column: Mapping[str, Any] | None, rows: Sequence[str]) -> int:
    """The width of a column's longest word."""
    words = [name]
    for row in rows:
        words += format_metric((column or {}).get(row)).split()
    return max(map(len, words))


def _that_fit(widths: Mapping[str, int], room: int) -> list[list[str]]:
    """The names in groups that fit into so many signs, a space after each."""
    groups: list[list[str]] = [[]]
    left = room
    for name, width in widths.items():
        if groups[-1] and width + 1 > left:
            groups.append([])
            left = room
        groups[-1].append(name)
        left -= width + 1
    return groups


def _shown_metrics(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Label -> number of what a step's line shows."""
    shown = {}
    for label, key in PROGRESS.items():
        value = metrics.get(key)
        if value is not None:
            shown[label] = f"{value:,.0f}" if label == "tok/s" else f"{value:.3f}"
    return shown


def hint_where_busy(display: Display, device: str, threads: int | None) -> None:
    """One hint where other programs keep the cores busy: the threads of a CPU run then wait for
    each other."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    is_free_to_choose = threads is None and "OMP_NUM_THREADS" not in os.environ
    if device != "cpu" or not is_free_to_choose or not num_cores:
        return
    load = os.getloadavg()[0]
    if load > num_cores:
        display.say(
            f"this machine is busy (load {load:.1f} on {num_cores} cores): "
            "model.threads=1 may be faster"
        )

"""All runs in a table, the newest first.

A row has the run's folder, task, model, method, steps, state, coverage of one set with half of its
95 % interval, and when it last wrote. Coverage in brackets was measured before the run's end. A
folder that cannot be read is a row that says why.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mar.config import option
from mar.errors import UserError
from mar.files import jsonable
from mar.run.console import format_metric, printable
from mar.run.overview import RunRow, list_runs
from mar.run.words import Command, Words, run_command

COLOURS = {"finished": "green", "running": "bold cyan", "damaged": "red"}
# Columns that a narrow terminal goes without, the first one first. A pipe has room for all.
DISPENSABLE = ("model", "last wrote", "task", "steps")
PIPE_WIDTH = 10_000


@dataclass
class RunsOptions:
    """Words of this command alone."""

    json: bool = option(False, help="true: one JSON document, for programs")


def coverage_cell(row: RunRow, with_name: bool) -> str:
    """`0.702 ±0.012`, in brackets where it is not that of the end; `@1` where K differs."""
    if row.value is None:
        return "–"
    cell = format_metric([row.value, row.low, row.high])
    if row.state != "finished":
        cell = f"({cell})"
    name = str(row.metric).removeprefix("coverage")
    return f"{cell} {name}" if with_name else cell


def steps_cell(row: RunRow) -> str:
    if row.num_steps is None:
        return "–"
    if row.state == "finished":
        return str(row.num_steps)
    return f"{row.step or 0}/{row.num_steps}"


def make_table(rows: Sequence[RunRow], without: Sequence[str] = ()) -> Table:
    metrics = {row.metric for row in rows if row.metric}
    one_metric = len(metrics) == 1
    columns = {
        "run": [printable(row.folder) for row in rows],
        "task": [printable(row.task or "–") for row in rows],
        "model": [printable(row.model or "–") for row in rows],
        "method": [printable(row.method or "–") for row in rows],
        "steps": [steps_cell(row) for row in rows],
        "state": [row.state for row in rows],
        metrics.pop() if one_metric else "coverage": [
            coverage_cell(row, with_name=not one_metric) for row in rows
        ],
        "last wrote": [row.date or "–" for row in rows],
    }
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    shown = [name for name in columns if name not in without]
    for name in shown:
        in_pieces = name in ("run", "method", "last wrote")
        table.add_column(name, overflow="fold", no_wrap=not in_pieces)
    for index, row in enumerate(rows):
        style = COLOURS.get(row.state, "")
        cells = [Text(columns[name][index], style if name == "state" else "") for name in shown]
        table.add_row(*cells)
    return table


def print_table(rows: Sequence[RunRow], console: Console) -> None:
    """The table, without the columns that do not fit, and what is wrong with damaged folders."""
    without: list[str] = []
    for name in DISPENSABLE:
        table = make_table(rows, without)
        needed = Measurement.get(console, console.options.update(width=PIPE_WIDTH), table)
        if needed.maximum <= console.width:
            break
        without.append(name)
    console.print(make_table(rows, without))
    for row in rows:
        if row.fault:
            line = f"{row.folder}: {row.fault}"
            console.print(Text(printable(line), "red"), soft_wrap=True)
    if without:
        said = f"no room for {', '.join(without)}: a wider terminal, or json=true, has them"
        console.print(Text(said, "dim"), soft_wrap=True)


def run(words: Words[RunsOptions]) -> None:
    folder = Path(words.places[0]) if words.places else Path("runs")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name one that holds runs, or train one first")
    rows = list_runs(folder)
    if words.options.json:
        print(json.dumps(jsonable({"runs": [row.as_json() for row in rows]})))
        return
    if not rows:
        raise UserError(f"there is no run below {folder} (no config.yaml)")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    print_table(rows, console)


COMMAND = Command(
    name="mar.runs",
    about=__doc__,
    places="[FOLDER]",
    options=RunsOptions,
    examples=(
        "                    # those below runs/",
        "runs/medqa          # those below another folder",
        "json=true",
    ),
)


def main(words: Sequence[str]) -> int:
    return run_command(COMMAND, words, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

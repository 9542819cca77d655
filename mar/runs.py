"""All runs in a table, the newest first:

    python -m mar.runs                     those below runs/
    python -m mar.runs runs/medqa          those below another folder
    python -m mar.runs json=true           one JSON document, for programs

A row has the run's folder, task, model, method, steps, state, coverage of one set with half of its
95 % interval, and when it last wrote. Coverage in brackets was measured before the run's end. A
folder that cannot be read is a row that says why.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mar.errors import UserError, exit_code
from mar.files import jsonable
from mar.run.console import format_metric, printable
from mar.run.overview import RunRow, list_runs

COLOURS = {"finished": "green", "running": "bold cyan", "damaged": "red"}
# Columns that a narrow terminal goes without, the first one first. A pipe has room for all.
DISPENSABLE = ("model", "last wrote", "task")
PIPE_WIDTH = 10_000


def split_words(words: Sequence[str]) -> tuple[Path, bool]:
    """(the folder, whether JSON is wanted) of a command line. Raises UserError."""
    folders = []
    as_json = False
    for word in words:
        key, equals, value = word.partition("=")
        # A folder of a sweep has = in its name.
        if not equals or Path(word).exists():
            folders.append(Path(word).expanduser())
        elif key == "json" and value in ("true", "false"):
            as_json = value == "true"
        else:
            raise UserError(f"{word}: there are a folder and json=true; -h shows examples")
    if len(folders) > 1:
        raise UserError(f"name one folder, not {len(folders)}: all runs below it are listed")
    folder = folders[0] if folders else Path("runs")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name one that holds runs, or train one first")
    return folder, as_json


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


def run(words: Sequence[str]) -> None:
    folder, as_json = split_words(words)
    rows = list_runs(folder)
    if as_json:
        print(json.dumps(jsonable({"runs": [row.as_json() for row in rows]})))
        return
    if not rows:
        raise UserError(f"there is no run below {folder} (no config.yaml)")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    print_table(rows, console)


def main(words: Sequence[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    return exit_code(lambda: run(words))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

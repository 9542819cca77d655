"""What a run says when it ends."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mar.files import jsonable
from mar.measure.bounds import gap_closed
from mar.measure.shown_metrics import evaluation_metrics, headline_metrics
from mar.run.console import Display

COLUMNS = ("floor", "before", "after", "ceiling")
NEXT_COMMANDS = {
    "ask": "ask it something",
    "show": "read its completions",
    "report": "one HTML file: curves, completions",
}
FILES = ("config.yaml", "metrics.jsonl", "completions.jsonl", "eval.json", "checkpoints")


def summary(document: Mapping[str, Any], num_answers: int) -> dict[str, Any]:
    """The part of `eval.json` that goes on the last line of stdout: four policies, and how much of
    the gap between floor and ceiling is closed (None where that is not known)."""
    key = f"coverage@{num_answers}"
    columns: dict[str, Any] = {}
    for name in COLUMNS:
        column = document.get(name)
        if column is not None:
            column = {metric: column.get(metric) for metric in headline_metrics(num_answers)}
        columns[name] = column
    closed = None
    if columns["floor"] and columns["ceiling"] and columns["after"]:
        floor, after, ceiling = (document[name][key] for name in ("floor", "after", "ceiling"))
        closed = gap_closed(after, floor, ceiling)
    return {**columns, "gap_closed": closed}


def close(
    document: Mapping[str, Any],
    num_answers: int,
    folder: Path,
    display: Display,
    seconds: float,
    pictures: Callable[[Path], Mapping[str, Path]],
) -> None:
    """The table that a run ends with, the paths of what it wrote, and what to do next.

    `pictures` draws the run's figures; it is called where wandb shows them.
    """
    end = summary(document, num_answers)
    display.table(
        title=f"{document['task']}, {document['num_items']} held-out items",
        columns={name: end[name] for name in COLUMNS},
        rows=headline_metrics(num_answers),
    )
    if end["gap_closed"] is not None:
        display.say(
            f"gap closed: {end['gap_closed']:.3f}  "
            "(0: K draws from the posterior, 1: its K most probable answers)"
        )
    if display.mirror:
        display.mirror.close(jsonable(end), lambda: pictures(folder))
    for name in FILES:
        display.say(f"  {folder / name}")
    say_next_commands(folder, display)
    numbers = {"run_dir": str(folder), "job_s": round(seconds, 1), **end}
    say_last_line(numbers, folder / "eval.json", display)


def say_last_line(numbers: Mapping[str, Any], file: Path, display: Display) -> None:
    """One JSON document for programs; on a terminal, which no program reads, the name of the file
    that has these numbers."""
    if sys.stdout.isatty():
        display.say(f"all numbers, for programs: {file}")
    else:
        print(json.dumps(jsonable(numbers)), flush=True)


def say_next_commands(folder: Path, display: Display) -> None:
    """What a person does with a run, as commands to copy."""
    for command, what in NEXT_COMMANDS.items():
        display.say(f"  python -m mar.{command} {shlex.quote(str(folder))}   # {what}")


def shown_of_evaluation(document: Mapping[str, Any]) -> list[str]:
    """The metrics of an `evaluation.json` that its table has."""
    arms = document["arms"]
    most = max(arm["num_answers"] * arm["num_sets"] for arm in arms.values())
    names = evaluation_metrics(arms["policy"]["num_answers"], most)
    return [name for name in names if any(name in arm["metrics"] for arm in arms.values())]


def evaluation_summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `evaluation.json` that goes on the last line of stdout: the metrics of the table,
    each with its interval."""
    names = shown_of_evaluation(document)
    arms = {
        name: {metric: arm["metrics"].get(metric) for metric in names}
        for name, arm in document["arms"].items()
    }
    paired = {
        pair: {name: differences[name] for name in names if name in differences}
        for pair, differences in document["paired"].items()
    }
    head = {key: document[key] for key in ("task", "target", "step", "num_items", "k")}
    return {**head, "arms": arms, "paired": paired}


def show_evaluation(document: Mapping[str, Any], display: Display) -> None:
    """The table of an `evaluation.json`, without the arms of other sizes, and what pairs say."""
    arms = document["arms"]
    columns = {name: arm["metrics"] for name, arm in arms.items() if not name.startswith("K=")}
    names = shown_of_evaluation(document)
    display.table(
        f"{document['task']}, {document['num_items']} items, ± half of the 95 % interval",
        columns,
        [name for name in names if any(name in column for column in columns.values())],
    )
    for pair, differences in document["paired"].items():
        coverage = next((name for name in differences if name.startswith("coverage@")), None)
        if coverage is None or differences[coverage][0] is None:
            continue
        value, low, high = differences[coverage]
        display.say(
            f"{pair}: {coverage} {value:+.3f} [{low:+.3f}, {high:+.3f}] "
            f"on {differences['num_items']} items"
        )

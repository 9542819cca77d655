"""What a run says when it ends."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mar.files import jsonable
from mar.measure.bounds import gap_closed
from mar.measure.metrics import SHOWN_METRICS
from mar.run.console import Display

COLUMNS = ("floor", "before", "after", "ceiling")
FILES = ("config.yaml", "metrics.jsonl", "completions.jsonl", "eval.json", "checkpoints")


def summary(document: Mapping[str, Any], num_answers: int) -> dict[str, Any]:
    """The part of `eval.json` that goes on the last line of stdout: four policies, and how much of
    the gap between floor and ceiling is closed (None where that is not known)."""
    key = f"coverage@{num_answers}"
    columns: dict[str, Any] = {}
    for name in COLUMNS:
        column = document.get(name)
        if column is not None:
            column = {metric: column.get(metric) for metric in (key, *SHOWN_METRICS)}
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
    """The table that a run ends with, the paths of what it wrote, and one JSON line for programs.

    `pictures` draws the run's figures; it is called where wandb shows them.
    """
    end = summary(document, num_answers)
    display.table(
        title=f"{document['task']}, {document['num_items']} held-out items",
        columns={name: end[name] for name in COLUMNS},
        rows=(f"coverage@{num_answers}", *SHOWN_METRICS),
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
    for command in ("ask", "show", "report"):
        display.say(f"  python -m mar.{command} {folder}")
    line = {"run_dir": str(folder), "job_s": round(seconds, 1), **end}
    print(json.dumps(jsonable(line)), flush=True)


SHOWN = "top1 brier ece auroc q_mse tv_distance regret format_rate repeats_per_set tokens_per_set".split()


def show(document: Mapping[str, Any], display: Display) -> None:
    """The table of the arms, without those of other sizes, and what the pairs say of coverage."""
    K = document["arms"]["policy"]["num_answers"]
    columns = {n: a["metrics"] for n, a in document["arms"].items() if not n.startswith("K=")}
    most = max(a["num_answers"] * a["num_sets"] for a in document["arms"].values())
    names = (f"coverage@{K}", f"coverage@{most}", f"unique@{most}", *SHOWN)
    display.table(
        f"{document['task']}, {document['num_items']} items, ± half of the 95 % interval",
        columns,
        names,
    )
    for pair, values in document["paired"].items():
        key = next((n for n in values if n.startswith("coverage@")), None)
        if key and values[key][0] is not None:
            value, low, high = values[key]
            display.say(
                f"{pair}: {key} {value:+.3f} [{low:+.3f}, {high:+.3f}] on {values['num_items']} items"
            )

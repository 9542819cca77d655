"""Committed logs, and Markdown tables made of them: means over seeds with their intervals."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mar.measure.bootstrap import student_t_95

Log = Mapping[str, Any]
# What stands in a column, read off one log; None where the log has no such number.
Columns = Mapping[str, Callable[[Log], float | None]]


def read_logs_by(folder: Path, key: str, order: Iterable[str]) -> dict[str, list[Log]]:
    """The logs of a folder, grouped by `log[key]` in the given order and sorted by seed."""
    found: dict[str, list[Log]] = defaultdict(list)
    for file in folder.glob("*.json"):
        log = json.loads(file.read_text(encoding="utf-8"))
        found[log[key]].append(log)
    logs = {}
    for name in order:
        if name in found:
            logs[name] = sorted(found[name], key=lambda log: log["seed"])
    return logs


def metric(name: str) -> Callable[[Log], float | None]:
    """The column of a metric of `mar.evaluate`."""

    def of_log(log: Log) -> float | None:
        value_and_bounds = log["metrics"].get(name)
        return value_and_bounds[0] if value_and_bounds else None

    return of_log


def on_curve(log: Log, name: str, k: int) -> float | None:
    """`coverage` or `unique` of k answers; None where the method's sets do not add up to k."""
    points = dict(zip(log["curve"]["k"], log["curve"][name], strict=True))
    return points[k][0] if k in points else None


def curve_at(name: str, k: int) -> Callable[[Log], float | None]:
    """The column of `on_curve`."""
    return lambda log: on_curve(log, name, k)


def interval(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and Student's 95 % interval over n seeds.

    All None where a seed has no value; no interval for one seed.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "lo": None, "hi": None, "n": len(values)}
    n = len(known)
    mean = float(np.mean(known))
    if n == 1:
        return {"mean": mean, "lo": None, "hi": None, "n": n}
    half = student_t_95(n - 1) * float(np.std(known, ddof=1)) / math.sqrt(n)
    return {"mean": mean, "lo": mean - half, "hi": mean + half, "n": n}


def cell(values: Sequence[float | None]) -> str:
    """What a table says of the seeds.

    The mean ± half of Student's 95 % interval. Of two seeds both values, because an interval of
    two is 12.7 standard errors wide. One value where there is one, or where all agree. "–" where
    a seed has none.
    """
    found = interval(values)
    mean = found["mean"]
    if mean is None:
        return "–"
    if all(isinstance(value, int) and value == values[0] for value in values):
        return str(values[0])
    digits = 1 if abs(mean) >= 2 else 3
    half = 0.0 if found["lo"] is None else mean - found["lo"]
    if half <= 1e-9:
        return f"{mean:.{digits}f}"
    if len(values) == 2:
        return f"{values[0]:.{digits}f}, {values[1]:.{digits}f}"
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def table_over_seeds(rows: Mapping[str, Sequence[Log]], columns: Columns, first: str) -> str:
    """A line for each setting: its name, the number of seeds, and what the columns say of them."""
    lines = []
    for name, logs in rows.items():
        cells = [cell([column(log) for log in logs]) for column in columns.values()]
        lines.append([name, str(len(logs)), *cells])
    return markdown_table([first, "seeds", *columns], lines)


def arm_over_seeds(
    logs: Sequence[Log],
    spread: Callable[[Sequence[float]], Mapping[str, Any]] = interval,
) -> dict[str, Any]:
    """One arm as `mar.figures.plots` draws it, of several seeds.

    Curves are means with the seeds' spread; the numbers of different answers and the token counts
    are of all seeds together; the reliability curve and the ECE are the first seed's.
    """
    first = logs[0]
    tokens_on_curve = np.mean([log["curve"]["tokens"] for log in logs], 0)
    curve: dict[str, Any] = {"k": first["curve"]["k"], "tokens": tokens_on_curve.tolist()}
    for name in ("coverage", "unique"):
        curve[name] = _mean_curve([log["curve"][name] for log in logs], spread)
    histogram: dict[str, int] = defaultdict(int)
    for log in logs:
        for value, count in log["unique_histogram"].items():
            histogram[value] += count
    return {
        "num_answers": first["num_answers"],
        "num_sets": first["num_sets"],
        "curve": curve,
        "unique_histogram": histogram,
        "metrics": {"ece": first["metrics"].get("ece") or [None]},
        "reliability": first["reliability"],
        "tokens": [n for log in logs for n in log["tokens"]],
    }


def _mean_curve(
    curves: Sequence[Sequence[Sequence[float]]],
    spread: Callable[[Sequence[float]], Mapping[str, Any]],
) -> list[list[float]]:
    """[value, low, high] at each point of a curve, over seeds."""
    values = np.array([[point[0] for point in curve] for curve in curves])
    points = []
    for of_seeds in values.T:
        found = spread(of_seeds.tolist())
        mean = found["mean"]
        low = mean if found["lo"] is None else found["lo"]
        high = mean if found["hi"] is None else found["hi"]
        points.append([mean, low, high])
    return points

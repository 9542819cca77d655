"""The curves of the report, as numbers: the page draws whichever metrics a reader chooses.

Every metric of metrics.jsonl is there, as the running mean that plots.py draws too, in at most
MAX_POINTS points. One set of curves belongs to one task: two tasks share no axis.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mar.figures import plots
from mar.figures.runs import Run, seeds_of
from mar.measure.shown_metrics import range_of

MAX_POINTS = 400  # of a curve; more would not be seen

Row = Mapping[str, Any]


def curves_of_task(task: str, groups: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """What the page needs to draw the curves of all settings (name -> its seeds) of one task."""
    runs = [run for group in groups.values() for run in group]
    return {
        "task": task,
        "metrics": _logged_metrics(runs),
        "chosen": _metrics_at_first(runs),
        "bounds": _bounds(runs[0].document),
        "ranges": _ranges(runs),
        "settings": [_curves_of_setting(name, seeds_of(group)) for name, group in groups.items()],
    }


def _logged_metrics(runs: Sequence[Run]) -> list[str]:
    """Every key that is ever a number, in the order of the log."""
    found: dict[str, None] = {}
    for run in runs:
        for row in run.metrics:
            found |= dict.fromkeys(key for key, value in row.items() if _is_number(value))
    return [key for key in found if key != "step"]


def _metrics_at_first(runs: Sequence[Run]) -> list[str]:
    """What is shown before anybody chooses: the reward, then the headline's metrics."""
    chosen: dict[str, None] = {}
    for run in runs:
        chosen |= dict.fromkeys(plots.learning_metrics(run.document, run.metrics))
    return list(chosen)


def _bounds(document: Row) -> dict[str, dict[str, float]]:
    """Floor and ceiling by metric, where they say something."""
    found: dict[str, dict[str, float]] = {}
    for bound in ("floor", "ceiling"):
        for name, value in (document.get(bound) or {}).items():
            if name.startswith(plots.BOUNDED) and _is_number(value):
                found.setdefault(f"train/{name}", {})[bound] = value
    return found


def _ranges(runs: Sequence[Run]) -> dict[str, list[float | None]]:
    """[lowest, highest] value of the metrics that have one; None where there is no limit."""
    found = {}
    rows = [row for run in runs for row in run.metrics]
    for metric in _logged_metrics(runs):
        stage, _, name = metric.partition("/")
        values = [row[metric] for row in rows if _is_number(row.get(metric))]
        limits = [limit if math.isfinite(limit) else None for limit in range_of(name, values)]
        if stage == "train" and limits != [None, None]:
            found[metric] = limits
    return found


def _curves_of_setting(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    metrics = _logged_metrics(runs)
    rows_of_seeds = [{row["step"]: row for row in run.metrics} for run in runs]
    # Up to the last step that all seeds have made; a broken line of one is left out of all.
    steps = sorted(set.intersection(*(set(rows) for rows in rows_of_seeds)))
    aligned = [[rows[step] for step in steps] for rows in rows_of_seeds]
    return {
        "name": name,
        "num_seeds": len(runs),
        "curves": {metric: _curve(metric, steps, aligned) for metric in metrics},
        "points": _held_out_points(runs, metrics),
    }


def _curve(
    metric: str, steps: Sequence[int], rows_of_seeds: Sequence[Sequence[Row]]
) -> dict[str, Any]:
    """The mean over seeds of the running mean, the lowest and highest seed, and single steps.

    Only steps at which every seed has a value: a metric may be logged now and then.
    """
    raw = np.array([plots.series(rows, metric) for rows in rows_of_seeds])
    smooth = np.array([plots.smoothed(values) for values in raw])
    logged = np.flatnonzero(~np.isnan(raw).any(0))
    if len(logged) > MAX_POINTS:
        chosen = np.linspace(0, len(logged) - 1, MAX_POINTS).round().astype(int)
        logged = logged[chosen]
    curve: dict[str, Any] = {
        "steps": [steps[i] for i in logged.tolist()],
        "mean": smooth[:, logged].mean(0).tolist(),
    }
    if len(raw) > 1:
        curve["low"] = smooth[:, logged].min(0).tolist()
        curve["high"] = smooth[:, logged].max(0).tolist()
    else:
        curve["single"] = raw[0, logged].tolist()
    return curve


def _held_out_points(runs: Sequence[Run], metrics: Sequence[str]) -> dict[str, list[list[Any]]]:
    """[step, value, low, high] of each evaluation, by the `train/` metric that it is drawn with.

    Of one seed with the interval over its questions; of several their mean, from the lowest to the
    highest.
    """
    histories = [
        {entry["step"]: entry for entry in run.document.get("history", [])} for run in runs
    ]
    steps = sorted(set.intersection(*(set(history) for history in histories)))
    found: dict[str, list[list[Any]]] = {}
    for metric in metrics:
        stage, _, name = metric.partition("/")
        if stage != "train":
            continue
        for step in steps:
            entries = [history[step] for history in histories]
            values = [entry.get(name) for entry in entries]
            if not all(_is_number(value) for value in values):
                continue
            low, high = min(values), max(values)
            if len(runs) == 1:
                low, high = entries[0].get("interval", {}).get(name, (None, None))
            mean = float(np.mean(values))
            found.setdefault(metric, []).append([step, mean, low, high])
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

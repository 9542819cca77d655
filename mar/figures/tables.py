"""The tables of a report. A cell is a text, a number, or [value, low, high]."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mar.figures.runs import (
    Run,
    distinguishing_keys,
    metric_with_interval,
    over_seeds,
    seeds_of,
    short_names,
)
from mar.measure.comparison import coverage_at_tokens
from mar.measure.shown_metrics import HEADLINE, headline_metrics
from mar.run.folder import differing_keys, flatten

# {"title", "note", "columns": [...], "rows": [[...]]}; "seed_rows": the numbers of rows that belong to
# the row above them; "leads": the table stands above the figures
Table = dict[str, Any]


def metric_table(title: str, note: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row for each metric that any column has."""
    metrics = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[metric, *(column.get(metric) for column in columns.values())] for metric in metrics]
    return {"title": title, "note": note, "columns": ["", *columns], "rows": rows}


def headline(run: Run, title: str = "Headline") -> Table:
    """Floor, before, after (or the latest evaluation) and ceiling of each headline metric."""
    stages = dict(run.document)
    history = stages.get("history", [])
    last = "after"
    if not run.finished and len(history) > 1:
        last = "latest"
        stages[last] = history[-1]
    columns = {}
    for name in ("floor", "before", last, "ceiling"):
        stage = stages.get(name) or {}
        columns[name] = {
            metric: metric_with_interval(stage, metric)
            for metric in headline_metrics(run.num_answers)
        }
    num_items, task = stages.get("num_items", "?"), stages.get("task", "?")
    note = f"{num_items} held-out items of {task}. Intervals: 95 %, bootstrap over items."
    gap_closed = stages.get("gap_closed")
    if gap_closed is not None:
        note += (
            f" Gap closed: {gap_closed:.3f} (0 is K draws from the posterior, "
            "1 its K most probable answers)."
        )
    return metric_table(title, note, columns) | {"leads": title == "Headline"}


def evaluation_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """Every metric of every arm, coverage at equal tokens, and paired differences if there are any.

    Arms that give sets of another size (K=...) stand in a figure instead.
    """
    arms = {name: arm for name, arm in evaluation["arms"].items() if not name.startswith("K=")}
    descriptions = " · ".join(f"{name}: {arm['says']}" for name, arm in arms.items())
    every_metric = metric_table(
        "Evaluation",
        f"{evaluation['num_items']} items. {descriptions}.",
        {name: arm["metrics"] for name, arm in arms.items()},
    )

    budgets = [budget["tokens"] for budget in evaluation["equal_tokens"]]
    coverage: dict[str, dict[str, float | None]] = {}
    for name, arm in arms.items():
        coverage[name] = {
            f"{budget:.0f} tokens": coverage_at_tokens(arm["curve"], budget) for budget in budgets
        }
    equal_tokens = metric_table(
        "Coverage at equal tokens",
        "What an item gets for so many tokens, between two numbers of sets interpolated. "
        "– means that more sets would fit than were sampled.",
        coverage,
    )
    if not evaluation["paired"]:
        return [every_metric, equal_tokens]

    differences: dict[str, dict[str, Any]] = {}
    for pair, metrics in evaluation["paired"].items():
        differences[pair] = {name: v for name, v in metrics.items() if name != "num_items"}
    paired = metric_table(
        "Paired differences",
        "On the same items; both sides of a pair are resampled together.",
        differences,
    )
    return [every_metric, equal_tokens, paired]


def settings_table(task: str, groups: Mapping[str, Sequence[Run]]) -> Table:
    """One line for each setting of a sweep, and under it one for each seed where there are several.

    `seed_rows` are the numbers of the latter.
    """
    coverages = dict.fromkeys(f"coverage@{runs[0].num_answers}" for runs in groups.values())
    metrics = [*coverages, *(name for name in HEADLINE if name != "prompt_tokens")]
    rows: list[list[Any]] = []
    seed_rows = []
    for setting, runs in groups.items():
        gaps = [run.document.get("gap_closed") for run in runs]
        known = [gap for gap in gaps if gap is not None]
        num_finished = sum(run.finished for run in runs)
        gap_closed = float(np.mean(known)) if known else None
        rows.append(
            [setting, num_finished, gap_closed, *(over_seeds(runs, metric) for metric in metrics)]
        )
        if len(runs) == 1:
            continue
        for run in seeds_of(runs):
            seed_rows.append(len(rows))
            rows.append(_seed_row(run, metrics))
    return {
        "title": f"Settings ({task})",
        "note": "Mean over the n finished seeds with Student's 95 % interval; "
        "of one seed, the bootstrap interval over its items.",
        "columns": ["setting", "n", "gap_closed", *metrics],
        "rows": rows,
        "seed_rows": seed_rows,
        "leads": True,
    }


def _seed_row(run: Run, metrics: Sequence[str]) -> list[Any]:
    """The last measurement of one seed; an unfinished run says at which step it was."""
    name = f"seed {run.config['seed']}"
    if not run.finished:
        name += f", at step {run.last_measured.get('step', 0)} of {run.config['train']['steps']}"
    values = [metric_with_interval(run.last_measured, metric) for metric in metrics]
    return [name, "", run.document.get("gap_closed"), *values]


def settings_that_differ(task: str, groups: Mapping[str, Sequence[Run]]) -> Table:
    """Every key in which settings differ, with its value in each of them."""
    runs = [runs[0] for runs in groups.values()]
    configs = [flatten(run.config) for run in runs]
    rows = [
        [key, *(str(config.get(key, "–")) for config in configs)]
        for key in distinguishing_keys(runs)
    ]
    return {
        "title": f"What differs ({task})",
        "note": "All other settings are the same.",
        "columns": ["", *groups],
        "rows": rows,
    }


def differences_table(a: Run, b: Run) -> Table:
    """The keys in which two runs' configs differ."""
    first = flatten(a.config)
    second = flatten(b.config)
    rows = [
        [key, str(first.get(key, "–")), str(second.get(key, "–"))]
        for key in differing_keys(a.config, b.config)
    ]
    return {
        "title": "What differs",
        "note": "All other settings are the same." if rows else "No setting differs.",
        "columns": ["", *short_names(a, b)] if rows else [],
        "rows": rows,
    }

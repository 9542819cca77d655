"""The tables and the figure of the algorithms on clinic, from logs/ alone (`make report`)."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.algorithms.run import CURVES, SETTINGS
from experiments.common.tables import (
    Columns,
    interval,
    markdown_table,
    read_logs_by,
    table_over_seeds,
)
from mar.figures import plots

HERE = Path(__file__).parent
METRICS = ("gap_closed", "coverage@3", "top1", "ece", "q_mse", "repeats_per_set")
PAIRS = (
    ("rloo, to_go", "rloo, set"),
    ("rloo, set", "grpo"),
    ("rloo, to_go", "grpo"),
    ("reinforce", "rloo, to_go"),
    ("own", "reinforce"),
)
# The settings in the figure: five are more than one can tell apart.
DRAWN = ("own", "rloo, to_go", "grpo")
Log = Mapping[str, Any]


def read_logs() -> dict[str, list[Log]]:
    """Setting -> its logs."""
    return read_logs_by(HERE / "logs", "setting", SETTINGS)


def after_training(log: Log, name: str) -> float | None:
    return log["gap_closed"] if name == "gap_closed" else log["after"][name]


def zero_group_frac(log: Log) -> float:
    """The mean share of groups whose completions all earned the same."""
    return float(np.mean(log["curves"]["adv/zero_group_frac"]))


def markdown() -> str:
    """One line a setting, after training."""
    columns: Columns = {name: partial(after_training, name=name) for name in METRICS}
    columns = {**columns, "groups without spread": zero_group_frac}
    return table_over_seeds(read_logs(), columns, "setting")


def paired() -> str:
    """Differences of gap_closed seed by seed: the same patients and draws on both sides."""
    closed = {}
    for setting, logs in read_logs().items():
        closed[setting] = {log["seed"]: log["gap_closed"] for log in logs}
    lines = []
    for a, b in PAIRS:
        seeds = sorted(closed[a].keys() & closed[b].keys())
        found = interval([closed[a][seed] - closed[b][seed] for seed in seeds])
        difference = f"{found['mean']:+.3f} ({found['lo']:+.3f} to {found['hi']:+.3f})"
        lines.append([f"{a} − {b}", str(len(seeds)), difference])
    return markdown_table(["gap_closed", "seeds", "difference, its 95 % interval"], lines)


def evaluations_over_seeds(logs: Sequence[Log]) -> list[dict[str, Any]]:
    """The evaluations of a setting: means over its seeds with their intervals."""
    rows = []
    for at_step in zip(*(log["history"] for log in logs), strict=True):
        row: dict[str, Any] = {"step": at_step[0]["step"], "interval": {}}
        for name in ("coverage@3", "ece"):
            found = interval([evaluation[name] for evaluation in at_step])
            row[name] = found["mean"]
            row["interval"][name] = (found["lo"], found["hi"])
        rows.append(row)
    return rows


def steps_of(log: Log) -> list[dict[str, Any]]:
    """The curves of a log as rows of training steps, counted from 1."""
    rows = []
    for i in range(len(log["curves"]["train/ece"])):
        values = {name: log["curves"][name][i] for name in CURVES}
        rows.append({"step": i + 1, **values})
    return rows


def write() -> None:
    """curves.png: what training sees (lines) and 1,000 held-out patients (points)."""
    found = read_logs()
    logs = {setting: found[setting] for setting in DRAWN if setting in found}
    runs = {setting: [steps_of(log) for log in of_seeds] for setting, of_seeds in logs.items()}
    evals = {setting: evaluations_over_seeds(of_seeds) for setting, of_seeds in logs.items()}
    first = next(iter(logs.values()))[0]
    plots.save({"curves": plots.learning_curves(runs, evals, CURVES[:3], first)}, HERE)
    (HERE / "curves.svg").unlink()

"""The table and the figure of the algorithms on clinic, from logs/ alone:  `make report` writes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.algorithms.run import CURVES, SETTINGS
from experiments.claims.summary import grid, grouped, interval, lines_of
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
DRAWN = ("own", "rloo, to_go", "grpo")  # five are more than one can tell apart
Log = Mapping[str, Any]


def read_logs() -> dict[str, list[Log]]:
    """Setting -> its logs."""
    return grouped(HERE / "logs", "setting", SETTINGS)


def markdown() -> str:
    """One line a setting, after training."""
    columns = {
        name: lambda log, name=name: {"gap_closed": log["gap_closed"], **log["after"]}[name]
        for name in METRICS
    }
    flat = {
        "groups without spread": lambda log: float(np.mean(log["curves"]["adv/zero_group_frac"]))
    }
    return lines_of(read_logs(), columns | flat, "setting")


def paired() -> str:
    """Differences of gap_closed seed by seed: the same patients and draws on both sides."""
    closed = {
        setting: {log["seed"]: log["gap_closed"] for log in logs}
        for setting, logs in read_logs().items()
    }
    lines = []
    for a, b in PAIRS:
        seeds = sorted(closed[a].keys() & closed[b].keys())
        found = interval([closed[a][seed] - closed[b][seed] for seed in seeds])
        lines.append(
            [
                f"{a} − {b}",
                str(len(seeds)),
                f"{found['mean']:+.3f} ({found['lo']:+.3f} to {found['hi']:+.3f})",
            ]
        )
    return grid(["gap_closed", "seeds", "difference, its 95 % interval"], lines)


def over_seeds(logs: Sequence[Log]) -> list[dict[str, Any]]:
    """The evaluations of a setting: means over its seeds with their intervals."""
    rows = []
    for at_step in zip(*(log["history"] for log in logs), strict=True):
        found = {name: interval([row[name] for row in at_step]) for name in ("coverage@3", "ece")}
        means = {name: value["mean"] for name, value in found.items()} | {
            "step": at_step[0]["step"]
        }
        rows.append(
            means
            | {"interval": {name: (value["lo"], value["hi"]) for name, value in found.items()}}
        )
    return rows


def write() -> None:
    """curves.png: what training sees (lines) and 1,000 held-out patients (points), for three of the settings with several seeds."""
    found = read_logs()
    logs = {setting: found[setting] for setting in DRAWN if setting in found}
    runs = {
        setting: [
            [
                {"step": i + 1, **{name: log["curves"][name][i] for name in CURVES}}
                for i in range(len(log["curves"]["train/ece"]))
            ]
            for log in own
        ]
        for setting, own in logs.items()
    }
    evals = {setting: over_seeds(own) for setting, own in logs.items()}
    first = next(iter(logs.values()))[0]
    plots.save({"curves": plots.learning_curves(runs, evals, CURVES[:3], first)}, HERE)
    (HERE / "curves.svg").unlink()

"""The table and the figure of ours against TRL's, from logs/ alone; `make report` writes them."""

import ast
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from experiments.common.tables import cell, markdown_table, read_logs_by
from experiments.peers import run
from mar.figures.plots import STYLE

HERE = Path(__file__).parent
# Steps whose mean the table shows.
ENDS = 10
# Steps of the figure's running mean.
SMOOTH = 5
LINE_STYLES = {"ours": ("#0072b2", "-"), "trl": ("#d55e00", "--")}
Logs = Mapping[str, Sequence[Mapping[str, Any]]]


def read_logs() -> Logs:
    """Side -> its logs."""
    return read_logs_by(HERE / "logs", "side", ("ours", "trl"))


def written(side: str) -> str:
    """What a user writes beside the reward: the words of our command, or `trl()` of run.py."""
    if side == "ours":
        return f"1 command of {len(run.WORDS)} words"
    function = ast.parse(inspect.getsource(run.trl))
    num_statements = sum(isinstance(node, ast.stmt) for node in ast.walk(function))
    return f"{num_statements} statements"


def markdown() -> str:
    """One line a side."""
    header = [
        "side",
        "seeds",
        f"reward, first {ENDS} steps",
        f"last {ENDS} steps",
        "coverage@3 after",
        "ece after",
        "s a step",
        "written",
    ]
    lines = []
    for side, logs in read_logs().items():
        first = [float(np.mean(log["rewards"][:ENDS])) for log in logs]
        last = [float(np.mean(log["rewards"][-ENDS:])) for log in logs]
        coverage = [log["after"]["coverage@3"] for log in logs]
        ece = [log["after"]["ece"] for log in logs]
        seconds = float(np.median([s for log in logs for s in log["seconds"]]))
        name = f"TRL {logs[0]['trl']}" if side == "trl" else "mar"
        cells = [cell(values) for values in (first, last, coverage, ece)]
        lines.append([name, str(len(logs)), *cells, f"{seconds:.2f}", written(side)])
    return markdown_table(header, lines)


def write() -> None:
    """curves.png: mean reward of the step, the seeds' mean in a band from lowest to highest."""
    kernel = np.ones(SMOOTH) / SMOOTH
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        for side, logs in read_logs().items():
            colour, style = LINE_STYLES[side]
            curves = np.array([np.convolve(log["rewards"], kernel, "valid") for log in logs])
            steps = np.arange(SMOOTH, SMOOTH + curves.shape[1])
            name = "TRL" if side == "trl" else "mar"
            label = f"{name}, {len(logs)} seeds"
            axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
            axes.plot(steps, curves.mean(0), color=colour, ls=style, label=label)
        axes.set(xlabel="step", ylabel=f"reward, mean of {SMOOTH} steps")
        axes.legend(frameon=False)
        figure.savefig(HERE / "curves.png", dpi=150)

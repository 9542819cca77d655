"""The table and the figure of ours against TRL's, from logs/ alone:  `make report` writes them."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from experiments.claims.summary import grid, grouped, told
from experiments.peers import run
from mar.figures.plots import STYLE

HERE = Path(__file__).parent
ENDS = 10  # steps whose mean the table shows
SMOOTH = 5  # steps of the figure's running mean
Logs = Mapping[str, Sequence[Mapping[str, Any]]]


def read_logs() -> Logs:
    """Side -> its logs."""
    return grouped(HERE / "logs", "side", ("ours", "trl"))


def markdown() -> str:
    """One line a side. Lines: what a user writes beside the reward, `trl()` of run.py, and the words of our command."""
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
    written = {
        "ours": f"1 command of {len(run.WORDS)} words",
        "trl": f"{len(inspect.getsource(run.trl).splitlines())} lines",
    }
    for side, logs in read_logs().items():
        ends = [
            [float(np.mean(log["rewards"][part])) for log in logs]
            for part in (slice(ENDS), slice(-ENDS, None))
        ]
        after = [[log["after"][name] for log in logs] for name in ("coverage@3", "ece")]
        seconds = float(np.median([s for log in logs for s in log["seconds"]]))
        name = f"TRL {logs[0]['trl']}" if side == "trl" else "mar"
        cells = [*(told(v) for v in (*ends, *after)), f"{seconds:.2f}", written[side]]
        lines.append([name, str(len(logs)), *cells])
    return grid(header, lines)


def write() -> None:
    """curves.png: mean reward of the step, the mean over seeds in a band from the lowest to the highest."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        for (side, logs), (colour, style) in zip(
            read_logs().items(), (("#0072b2", "-"), ("#d55e00", "--")), strict=False
        ):
            kernel = np.ones(SMOOTH) / SMOOTH
            curves = np.array([np.convolve(log["rewards"], kernel, "valid") for log in logs])
            steps = np.arange(SMOOTH, SMOOTH + curves.shape[1])
            axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
            axes.plot(
                steps,
                curves.mean(0),
                color=colour,
                ls=style,
                label=f"{'TRL' if side == 'trl' else 'mar'}, {len(logs)} seeds",
            )
        axes.set(xlabel="step", ylabel=f"reward, mean of {SMOOTH} steps")
        axes.legend(frameon=False)
        figure.savefig(HERE / "curves.png", dpi=150)

"""The tables and the figure of the comparison on DDXPlus, from its logs alone; `make report` writes them."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claims.summary import grouped, interval, on_curve
from experiments.ddxplus_smollm2.run import ANSWERS

HERE = Path(__file__).parent
ORDER = ("multi_rlcr", "multi_rlcr_50", "rlvr_single", "rlvr_single_50", "base", "single")
OF_SETS = ("top1", "ece", "brier", "format_rate", "tokens_per_set")
WINDOW = 10  # steps whose mean the learning table shows
Log = Mapping[str, Any]


def read_logs() -> dict[str, list[Log]]:
    """Method -> its logs."""
    return grouped(HERE / "logs", "method", ORDER)


def read_steps() -> dict[str, list[list[Log]]]:
    """Method -> for each seed the rows of its training steps, of unfinished runs too."""
    found: dict[str, list[list[Log]]] = defaultdict(list)
    for file in sorted((HERE / "logs").glob("*_seed*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[file.stem.partition("_seed")[0]].append(rows)
    return {method: found[method] for method in ORDER if method in found}


def cell(values: Sequence[float | None]) -> str:
    """Mean ± half of Student's interval over seeds."""
    told = interval(values)
    if told["mean"] is None:
        return "–"
    digits = 1 if told["mean"] >= 2 else 3
    return f"{told['mean']:.{digits}f}" + ("" if told["lo"] is None else f" ± {told['mean'] - told['lo']:.{digits}f}")


def markdown() -> str:
    """What held-out patients get: the policies, and the warm-up alone asked for three answers (base) or for one (single)."""
    columns = ["coverage@3", f"coverage@{ANSWERS}", f"unique@{ANSWERS}", *OF_SETS]
    lines = [["method", "seeds", *columns], ["---"] * (len(columns) + 2)]
    for method, logs in read_logs().items():
        rows = [[on_curve(log, "coverage", 3), on_curve(log, "coverage", ANSWERS), on_curve(log, "unique", ANSWERS)] for log in logs]
        rows = [[*row, *((log["metrics"].get(name) or [None])[0] for name in OF_SETS)] for row, log in zip(rows, logs, strict=True)]
        lines.append([method, str(len(logs)), *(cell(column) for column in zip(*rows, strict=True))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def learning() -> str:
    """Training patients, at temperature 1: means over the first and the last steps of each run."""
    names = ("reward/total", "train/top1", "train/ece", "train/format_rate", "perf/sample_s", "perf/update_s")
    lines = [["method, seed", "steps", *(f"{name}, first {WINDOW} → last {WINDOW}" for name in names)]]
    lines.append(["---"] * len(lines[0]))
    for method, seeds in read_steps().items():
        for seed, rows in enumerate(seeds):
            ends = (rows[:WINDOW], rows[-WINDOW:])
            means = [[np.mean([row[name] for row in part if row.get(name) is not None] or [np.nan]) for part in ends] for name in names]
            lines.append([f"{method}, {seed}", str(len(rows)), *("–" if np.isnan(a) else f"{a:.3f} → {b:.3f}" for a, b in means)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

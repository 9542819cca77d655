"""The tables and the figure of SmolLM2 on real data, from logs alone; `make report` writes them."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.common.tables import (
    Log,
    arm_over_seeds,
    curve_at,
    markdown_table,
    metric,
    read_logs_by,
    table_over_seeds,
)
from mar.figures import plots

HERE = Path(__file__).parent
ORDER = ("multi_rlcr", "rlvr_single", "base", "single")
SET_METRICS = ("top1", "ece", "auroc", "brier", "format_rate", "tokens_per_set")
LEARNING = (
    "reward/total",
    "train/top1",
    "train/ece",
    "train/format_rate",
    "perf/sample_s",
    "perf/update_s",
)
# Steps whose mean the learning table shows.
WINDOW = 10


def read_rows(file: Path) -> list[Log]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_steps(folder: Path) -> dict[str, list[list[Log]]]:
    """Method -> for each seed the rows of its training steps, of unfinished runs too."""
    found: dict[str, list[list[Log]]] = defaultdict(list)
    for file in sorted(folder.glob("*_seed*.jsonl")):
        method, _, _ = file.stem.partition("_seed")
        found[method].append(read_rows(file))
    return {method: found[method] for method in ORDER if method in found}


def held_out(folder: Path, answers: int, more: Sequence[str] = SET_METRICS) -> str:
    """A line for each method with a log in the folder.

    What 3 and what `answers` answers cover, and metrics of one completion.
    """
    columns: dict[str, Callable[[Log], float | None]] = {
        "coverage@3": curve_at("coverage", 3),
        f"coverage@{answers}": curve_at("coverage", answers),
        f"unique@{answers}": curve_at("unique", answers),
    }
    for name in more:
        columns[name] = metric(name)
    return table_over_seeds(read_logs_by(folder, "method", ORDER), columns, "method")


def _set_to_read(row: Log) -> str:
    """A set: right answers in bold, repeats struck out, confidences behind them."""
    if row["reason"]:
        return f"*{row['reason']}*"
    shown = []
    for i, answer in enumerate(row["answers"]):
        mark = ""
        if row["hits"][i]:
            mark = "**"
        elif row["repeated"][i]:
            mark = "~~"
        shown.append(f"{mark}{answer}{mark} {row['confidences'][i]:.2f}")
    return " · ".join(shown)


def _answer_to_read(row: Log) -> str:
    """A single answer, in bold if it is right."""
    if row["reason"]:
        return f"*{row['reason']}*"
    answer = row["answers"][0]
    return f"**{answer}**" if row["hits"][0] else answer


def _answers_counted(rows: Sequence[Log]) -> str:
    """Single answers and how often each came."""
    counts = Counter(_answer_to_read(row) for row in rows)
    return " · ".join(f"{n} x {answer}" for answer, n in counts.most_common())


def _by_patient(file: Path) -> dict[str, list[Log]]:
    found: dict[str, list[Log]] = defaultdict(list)
    for row in read_rows(file):
        found[row["id"]].append(row)
    return found


def to_read(sets: Path, single: Path) -> str:
    """What a few held-out patients are told.

    One set before training, one after it, and all single answers of the other method after it.
    """
    single_answers = _by_patient(single)
    lines = []
    for patient, rows in _by_patient(sets).items():
        before, after = rows[0], rows[1]
        num_golds = str(before["golds"])
        # The first of the single ones is before training.
        counted = _answers_counted(single_answers[patient][1:])
        lines.append([num_golds, _set_to_read(before), _set_to_read(after), counted])
    header = ["right ones", "before training, a set", "Multi-RLCR, a set"]
    return markdown_table([*header, "RLVR-Single, nine answers"], lines)


def extremes(values: Sequence[float]) -> dict[str, float]:
    """Mean, lowest and highest: of two seeds, Student's interval would hide what both say."""
    return {"mean": float(np.mean(values)), "lo": min(values), "hi": max(values)}


def write() -> None:
    """coverage.png: what held-out patients get, at equal answers and at equal tokens."""
    logs = read_logs_by(HERE / "logs", "method", ORDER)
    arms = {method: arm_over_seeds(of_seeds, extremes) for method, of_seeds in logs.items()}
    plots.save({"coverage": plots.coverage(arms, None)}, HERE)
    (HERE / "coverage.svg").unlink()


def learning(folder: Path) -> str:
    """Training patients, at temperature 1: means over the first and the last steps of each run."""
    lines = []
    for method, seeds in read_steps(folder).items():
        for seed, rows in enumerate(seeds):
            cells = [_first_to_last(rows, name) for name in LEARNING]
            lines.append([f"{method}, {seed}", str(len(rows)), *cells])
    names = [f"{name}, first {WINDOW} → last {WINDOW}" for name in LEARNING]
    return markdown_table(["method, seed", "steps", *names], lines)


def _first_to_last(rows: Sequence[Log], name: str) -> str:
    """The means of a metric over the first and the last WINDOW steps; "–" without a value."""
    means = []
    for part in (rows[:WINDOW], rows[-WINDOW:]):
        values = [row[name] for row in part if row.get(name) is not None]
        if not values:
            return "–"
        means.append(np.mean(values))
    return f"{means[0]:.3f} → {means[1]:.3f}"

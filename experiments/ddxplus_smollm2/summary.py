"""The tables and the figure of SmolLM2 on real data, from logs alone; `make report` writes them."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.claims.summary import (
    Columns,
    Log,
    averaged,
    grid,
    grouped,
    lines_of,
    metric,
    on_curve,
)
from mar.figures import plots

HERE = Path(__file__).parent
ORDER = ("multi_rlcr", "rlvr_single", "base", "single")
CALIBRATED = ("multi_rlcr", "multi_rlcr_elsewhere", "multi_rlcr_low_rate", "multi_rlcr_own")
OF_SETS = ("top1", "ece", "brier", "format_rate", "tokens_per_set")
WINDOW = 10  # steps whose mean the learning table shows


def read_steps(folder: Path) -> dict[str, list[list[Log]]]:
    """Method -> for each seed the rows of its training steps, of unfinished runs too."""
    found: dict[str, list[list[Log]]] = defaultdict(list)
    for file in sorted(folder.glob("*_seed*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[file.stem.partition("_seed")[0]].append(rows)
    return {method: found[method] for method in ORDER if method in found}


def held_out(folder: Path, answers: int, more: Sequence[str] = OF_SETS) -> str:
    """A line for each method with a log in the folder: what 3 and what `answers` answers cover, and metrics of one completion."""
    columns = {
        f"coverage@{k}": lambda log, k=k: on_curve(log, "coverage", k)
        for k in dict.fromkeys((3, answers))
    }
    columns[f"unique@{answers}"] = lambda log: on_curve(log, "unique", answers)
    return lines_of(
        grouped(folder, "method", ORDER), columns | {name: metric(name) for name in more}, "method"
    )


def calibration(folder: Path) -> str:
    """Mean confidence beside the share of answers that are right, of every run of Multi-RLCR, seed by seed."""
    of_all = grouped(folder, "method", ("base", *CALIBRATED))
    rows = {f"{method}, {log['seed']}": [log] for method, logs in of_all.items() for log in logs}

    def mean_of(value: Callable[[Log], float]) -> Callable[[Log], float]:
        return lambda log: (
            sum(b["count"] * value(b) for b in log["reliability"])
            / sum(b["count"] for b in log["reliability"])
        )

    columns: Columns = {
        "mean confidence": mean_of(lambda b: b["said"]),
        "right": mean_of(lambda b: b["right"][0]),
    }
    columns |= {name: metric(name) for name in ("ece", "auroc", "brier")} | {
        "coverage@3": lambda log: on_curve(log, "coverage", 3)
    }
    return lines_of(rows, columns, "method, seed")


def _shown(row: Log) -> str:
    """A set: right answers in bold, repeats struck out, confidences behind them."""
    if row["reason"]:
        return f"*{row['reason']}*"
    marks = [
        "**" if hit else "~~" if again else ""
        for hit, again in zip(row["hits"], row["repeated"], strict=True)
    ]
    slots = zip(marks, row["answers"], row["confidences"], strict=True)
    return " · ".join(f"{mark}{answer}{mark} {q:.2f}" for mark, answer, q in slots)


def _counted(rows: Sequence[Log]) -> str:
    """Single answers and how often each came, the right ones in bold."""
    said = Counter(
        f"*{row['reason']}*" if row["reason"] else "**" * bool(row["hits"][0]) + row["answers"][0]
        for row in rows
    )
    return " · ".join(
        f"{n} x {answer}{'**' * answer.startswith('**')}" for answer, n in said.most_common()
    )


def to_read(sets: Path, single: Path) -> str:
    """What a few held-out patients are told: one set before training, one after it, and all single answers of the other method."""
    by_patient: list[dict[str, list[Log]]] = [{}, {}]
    for found, file in zip(by_patient, (sets, single), strict=True):
        for line in file.read_text(encoding="utf-8").splitlines():
            found.setdefault((row := json.loads(line))["id"], []).append(row)
    lines = [
        [str(rows[0]["golds"]), _shown(rows[0]), _shown(rows[1]), _counted(by_patient[1][name][1:])]
        for name, rows in by_patient[0].items()
    ]
    return grid(
        ["right ones", "before training, a set", "Multi-RLCR, a set", "RLVR-Single, nine answers"],
        lines,
    )


def extremes(values: Sequence[float]) -> dict[str, float]:
    """Mean, lowest and highest: of two seeds, Student's interval would hide what both say."""
    return {"mean": float(np.mean(values)), "lo": min(values), "hi": max(values)}


def write() -> None:
    """coverage.png: what held-out patients get, at equal answers and at equal tokens."""
    arms = {
        method: averaged(logs, extremes)
        for method, logs in grouped(HERE / "logs", "method", ORDER).items()
    }
    plots.save({"coverage": plots.coverage(arms, None)}, HERE)
    (HERE / "coverage.svg").unlink()


def learning(folder: Path) -> str:
    """Training patients, at temperature 1: means over the first and the last steps of each run."""
    names = (
        "reward/total",
        "train/top1",
        "train/ece",
        "train/format_rate",
        "perf/sample_s",
        "perf/update_s",
    )
    lines = []
    for method, seeds in read_steps(folder).items():
        for seed, rows in enumerate(seeds):
            ends = (rows[:WINDOW], rows[-WINDOW:])
            means = [
                [
                    np.mean([row[name] for row in part if row.get(name) is not None] or [np.nan])
                    for part in ends
                ]
                for name in names
            ]
            lines.append(
                [
                    f"{method}, {seed}",
                    str(len(rows)),
                    *("–" if np.isnan(a) else f"{a:.3f} → {b:.3f}" for a, b in means),
                ]
            )
    return grid(
        ["method, seed", "steps", *(f"{name}, first {WINDOW} → last {WINDOW}" for name in names)],
        lines,
    )

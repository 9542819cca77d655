"""Running `mar.train` and `mar.evaluate` for an experiment, and the committed logs of the runs."""

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mar.files import read_jsonl

# A log keeps the token counts of this many completions: one for each held-out item.
KEPT_COMPLETIONS = 500
# What the tables and figures need of one arm of `evaluation.json`.
ARM_KEYS = (
    "num_answers",
    "num_sets",
    "metrics",
    "curve",
    "reliability",
    "unique_histogram",
    "format_failures",
)
# Steps over which `confidence_sums` takes a mean.
WINDOW = 20


def run_module(module: str, *words: str) -> float:
    """Run `python -m module words`, its output shown; returns seconds. Exits where it fails."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", module, *words], check=False)
    if done.returncode:
        sys.exit(f"{module} {' '.join(words)} ended with {done.returncode}")
    return time.perf_counter() - began


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has made all of its steps and was measured."""
    end = folder / "eval.json"
    return end.exists() and "after" in json.loads(end.read_text())


def train_unless_finished(folder: Path, *words: str, again: bool = False) -> float:
    """Seconds that training took until the run in `folder` was finished.

    A finished run is left alone and costs 0 seconds, unless `again` asks for a new one:
    `mar.train` then moves the old folder aside.
    """
    if is_finished(folder) and not again:
        return 0.0
    return run_module("mar.train", *words, "logger.console=plain")


def kept_of_arm(arm: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables and figures need of one arm of `evaluation.json`."""
    kept = {name: arm[name] for name in ARM_KEYS}
    kept["tokens"] = arm["tokens"][:KEPT_COMPLETIONS]
    return kept


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The document that `mar.evaluate` wrote into a folder."""
    return json.loads((folder / "evaluation.json").read_text())


def write_log(file: Path, document: Mapping[str, Any]) -> None:
    """Write one JSON document in one line, with its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document) + "\n")


def confidence_sums(run: Path) -> list[float | None]:
    """The mean sum of a set's confidences in training, for every WINDOW steps of a run.

    None where no completion of those steps has the right form.
    """
    rows, _ = read_jsonl(run / "completions.jsonl")
    sums: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["stage"] != "train" or row["reason"] is not None:
            continue
        confidences = row["confidences"][: len(row["answers"])]
        # Some forms have no confidences.
        if not confidences or None in confidences:
            continue
        window = (row["step"] - 1) // WINDOW
        sums[window].append(sum(confidences))
    num_windows = max(sums, default=-1) + 1
    means: list[float | None] = [None] * num_windows
    for window, found in sums.items():
        means[window] = float(np.mean(found))
    return means


def share_of(jobs: list[Any], part: str) -> list[Any]:
    """The jobs of one of several processes: `part` is `1/2` for the first of two."""
    number, num_parts = (int(word) for word in part.split("/"))
    return jobs[number - 1 :: num_parts]

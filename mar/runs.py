"""What finished and unfinished runs left in their folders, read with suspicion, and runs that differ by their seed alone taken together."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mar.log import read_jsonl
from mar.records import UserError
from mar.rundir import flatten

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 % points for 1 to 9 degrees of freedom


@dataclass(frozen=True)
class Run:
    """What a run's folder holds. `evaluation`: what `mar.evaluate` found, {} where it was not run. `faults`: lines that had to be skipped."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    document: dict[str, Any]
    evaluation: dict[str, Any]
    faults: list[str]

    @property
    def num_answers(self) -> int:
        return int(self.config["reward"]["num_answers"])

    @property
    def finished(self) -> bool:
        return bool(self.document.get("after"))


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: remove it, or the run") from None


def read_run(path: Path) -> Run:
    """UserError for what is no run, or is one that has not made a step."""
    try:
        config = dict(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
        config["reward"]["num_answers"]
    except FileNotFoundError:
        raise UserError(f"{path} holds no config.yaml: name a folder that mar.train wrote, or one above such folders") from None
    except (yaml.YAMLError, TypeError, KeyError, ValueError):
        raise UserError(f"{path}/config.yaml is damaged or of another version of mar: make the report with that version") from None
    metrics, faults = read_jsonl(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else ([], [])
    if not metrics:
        raise UserError(f"{path} has not finished a step yet: there is nothing to report")
    return Run(path, config, metrics, read_json(path / "eval.json"), read_json(path / "evaluation.json"), faults)


def settings_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ by their seed alone under one name, which says how they differ from the others."""
    flat = [{k: v for k, v in flatten(run.config).items() if not k.startswith(("provenance", "logger", "out", "run_dir"))} for run in runs]
    keys = sorted({k for one in flat for k in one if k not in ("seed", "name") and any(one.get(k) != other.get(k) for other in flat)})
    keys = [k for k in keys if k != "optim.lr" or "model.lr" not in keys]  # it follows the other
    groups: dict[str, list[Run]] = defaultdict(list)
    for run, one in zip(runs, flat, strict=True):
        groups[", ".join(f"{k.rpartition('.')[2]}={one.get(k)}" for k in keys) or str(run.config["name"])].append(run)
    return groups


def over_seeds(runs: Sequence[Run], metric: str) -> list[float | None]:
    """[mean, low, high] over finished runs: Student's 95 % interval of the seeds' means; with one seed, that of its items."""
    columns = [run.document["after"] for run in runs if run.finished and run.document["after"].get(metric) is not None]
    values = [column[metric] for column in columns]
    if len(values) < 2:
        return with_interval(columns[0], metric) if columns else [None, None, None]
    mean, freedom = float(np.mean(values)), len(values) - 1
    half = (STUDENT[freedom - 1] if freedom <= len(STUDENT) else 2.0) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def with_interval(column: Mapping[str, Any], metric: str) -> list[float | None]:
    return [column.get(metric), *column.get("interval", {}).get(metric, (None, None))]

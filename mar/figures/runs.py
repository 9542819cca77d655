"""What a run's folder holds, and runs grouped by their settings."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mar.errors import UserError
from mar.files import read_jsonl
from mar.measure.bootstrap import student_t_95
from mar.run.folder import differing_keys, flatten


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]  # the rows of metrics.jsonl
    document: dict[str, Any]  # eval.json
    evaluation: dict[str, Any]  # evaluation.json, {} where `mar.evaluate` was not run
    faults: list[str]  # lines that had to be skipped

    @property
    def num_answers(self) -> int:
        return int(self.config["reward"]["num_answers"])

    @property
    def finished(self) -> bool:
        return bool(self.document.get("after"))


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: remove it, or the run") from None


def read_run(folder: Path) -> Run:
    """Raises UserError for what is no run, or is one that has not made a step."""
    try:
        config = dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        config["reward"]["num_answers"]
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no config.yaml: "
            "name a folder that mar.train wrote, or one above such folders"
        ) from None
    except (yaml.YAMLError, TypeError, KeyError, ValueError):
        raise UserError(
            f"{folder}/config.yaml is damaged or of another version of mar: "
            "make the report with that version"
        ) from None
    metrics_file = folder / "metrics.jsonl"
    metrics, faults = read_jsonl(metrics_file) if metrics_file.exists() else ([], [])
    if not metrics:
        raise UserError(f"{folder} has not finished a step yet: there is nothing to report")
    return Run(
        path=folder,
        config=config,
        metrics=metrics,
        document=read_document(folder / "eval.json"),
        evaluation=read_document(folder / "evaluation.json"),
        faults=faults,
    )


def group_by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs whose configs differ by their seed alone, under a name that says what is special."""
    keys = _distinguishing_keys(runs)
    groups: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        config = flatten(run.config)
        special = [f"{_last_part(key)}={config.get(key)}" for key in keys]
        setting = ", ".join(special) or str(run.config["name"])
        # A seed counts once. Of seed0 and seed0~1, an older run of the same, the finished one does.
        other = groups[setting].get(config["seed"])
        if other is None or (run.finished and not other.finished):
            groups[setting][config["seed"]] = run
    return {setting: list(by_seed.values()) for setting, by_seed in groups.items()}


def _last_part(key: str) -> str:
    return key.rpartition(".")[2]


def _distinguishing_keys(runs: Sequence[Run]) -> list[str]:
    """The keys by which any run's config differs from the first one's, but for seed and name."""
    keys: set[str] = set()
    for run in runs:
        keys |= set(differing_keys(runs[0].config, run.config))
    keys -= {"seed", "name"}
    if "model.lr" in keys:
        keys.discard("optim.lr")  # it follows model.lr
    return sorted(keys)


def over_seeds(runs: Sequence[Run], metric: str) -> list[float | None]:
    """[mean, low, high] of a final metric over the finished runs of one setting.

    Student's 95 % interval of the mean over seeds; with one seed, the interval over its items.
    """
    finals = [run.document["after"] for run in runs if run.finished]
    finals = [final for final in finals if final.get(metric) is not None]
    if not finals:
        return [None, None, None]
    if len(finals) == 1:
        return metric_with_interval(finals[0], metric)
    values = [final[metric] for final in finals]
    mean = float(np.mean(values))
    deviation = float(np.std(values, ddof=1))
    half = student_t_95(len(values) - 1) * deviation / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def metric_with_interval(metrics: Mapping[str, Any], name: str) -> list[float | None]:
    """[value, low, high] of a stage of eval.json; None for what it does not have."""
    low, high = metrics.get("interval", {}).get(name, (None, None))
    return [metrics.get(name), low, high]

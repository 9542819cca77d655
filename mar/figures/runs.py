"""What a run's folder holds, and runs grouped by their settings."""

import json
import math
import os
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
from mar.measure.shown_metrics import range_of
from mar.run.folder import differing_keys, flatten

READ_OF_EVALUATION = ("num_items", "arms", "equal_tokens", "paired")

# The name of a preset -> the sections whose settings it brings along (conf/).
BROUGHT_ALONG = {
    "data.task": ("data.",),
    "model.name": ("model.", "optim.lr"),
    "algo.name": ("algo.", "reward.brier_weight"),
    "reward.objective": ("reward.",),
    "scale.name": ("scale.", "sampler.", "train.micro_batch_tokens"),
}


# Settings that every report reads.
NEEDED = (("reward", "num_answers"), ("data", "task"), ("train", "steps"))


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

    @property
    def task(self) -> str:
        """What was asked; the rehearsal of medqa says clinic."""
        return str(self.document.get("task") or self.config["data"]["task"])

    @property
    def last_measured(self) -> dict[str, Any]:
        """The last evaluation on held-out questions, {} where there is none."""
        history = self.document.get("history") or [{}]
        return dict(self.document.get("after") or history[-1])


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError, RecursionError, OSError):
        raise UserError(f"{path} is damaged: remove it, or the run") from None


def _require_whole(run: Run) -> Run:
    """Raises UserError where what the report reads of both documents is missing."""
    history = run.document.get("history") or []
    if not all(isinstance(entry, dict) and type(entry.get("step")) is int for entry in history):
        raise UserError(f"{run.path}/eval.json is damaged: an entry of its history has no step")
    missing = [key for key in READ_OF_EVALUATION if key not in run.evaluation]
    if run.evaluation and missing:
        raise UserError(
            f"{run.path}/evaluation.json has no {', '.join(missing)}: evaluate again, or remove it"
        )
    return run


def read_run(folder: Path) -> Run:
    """Raises UserError for what is no run, or is one that has not made a step."""
    try:
        config = dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        for section, key in NEEDED:
            config[section][key]
        config["seed"]
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
    if any(type(row.get("step")) is not int for row in metrics):
        raise UserError(f"{metrics_file} has a row without the number of its step: remove the row")
    run = Run(
        path=folder,
        config=config,
        metrics=metrics,
        document=read_document(folder / "eval.json"),
        evaluation=read_document(folder / "evaluation.json"),
        faults=faults,
    )
    return _require_whole(run)


def short_names(a: Run, b: Run) -> tuple[str, str]:
    """What two runs' paths differ in: the folder above both is left out."""
    paths = [str(a.path), str(b.path)]
    above = os.path.commonpath(paths) if a.path.is_absolute() == b.path.is_absolute() else ""
    names = [os.path.relpath(path, above) if above else path for path in paths]
    return (paths[0], paths[1]) if "." in names else (names[0], names[1])


def group_by_task(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each task: numbers of two tasks are no comparison."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.task].append(run)
    return dict(groups)


def group_by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs whose configs differ by their seed alone, under a name that says what is special."""
    all_keys = distinguishing_keys(runs)
    keys = _without_what_follows(all_keys, runs)
    groups: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        config = flatten(run.config)
        special = [f"{key}={config.get(key)}" for key in keys]
        setting = ", ".join(special) or str(run.config["name"])
        # A seed counts once. Of seed0 and seed0~1, an older run of the same, the finished one does.
        other = groups[setting].get(config["seed"])
        if other is None or (run.finished and not other.finished):
            groups[setting][config["seed"]] = run
    return {setting: list(by_seed.values()) for setting, by_seed in groups.items()}


def _without_what_follows(keys: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The keys without those that a chosen preset brings along: of runs with algo=grpo and algo=own
    it is enough to say which. A key stays where runs of the same preset differ in it."""
    configs = [flatten(run.config) for run in runs]
    kept = list(keys)
    for choice, sections in BROUGHT_ALONG.items():
        if choice not in keys:
            continue
        for key in keys:
            if key in BROUGHT_ALONG or not key.startswith(sections):
                continue
            pairs = {(repr(config.get(choice)), repr(config.get(key))) for config in configs}
            choices = {chosen for chosen, _ in pairs}
            if len(pairs) == len(choices) and key in kept:
                kept.remove(key)
    return kept


def distinguishing_keys(runs: Sequence[Run]) -> list[str]:
    """The keys by which any run's config differs from the first one's, but for seed and name."""
    keys: set[str] = set()
    for run in runs:
        keys |= set(differing_keys(runs[0].config, run.config))
    keys -= {"seed", "name"}
    if "model.lr" in keys:
        keys.discard("optim.lr")  # it follows model.lr
    return sorted(keys)


def seeds_of(runs: Sequence[Run]) -> list[Run]:
    """The runs of one setting in the order of their seeds."""
    return sorted(runs, key=lambda run: int(run.config["seed"]))


def over_seeds(runs: Sequence[Run], metric: str) -> list[float | None]:
    """[mean, low, high] of a final metric over the finished runs of one setting.

    Student's 95 % interval of the mean over seeds, cut where the metric cannot be; with one seed,
    the interval over its items.
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
    lowest, highest = range_of(metric, values)
    return [mean, max(mean - half, lowest), min(mean + half, highest)]


def metric_with_interval(metrics: Mapping[str, Any], name: str) -> list[float | None]:
    """[value, low, high] of a stage of eval.json; None for what it does not have."""
    low, high = metrics.get("interval", {}).get(name, (None, None))
    return [metrics.get(name), low, high]

"""Where a run writes, and whether it starts, resumes or steps aside.

A single run lives in `runs/<name>/seed<seed>`, a job of a sweep in
`runs/<name>/<variant>/seed<seed>`. A run is finished when its `eval.json` has an `after` section;
until then the configuration that is written in the folder resumes it.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import IO, Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from mar.errors import UserError
from mar.files import write_json

LONGEST_VARIANT = 80  # characters of a folder's name
MOST_NAMED_RUNS = 4  # of a folder that holds many
MOST_DIFFERENCES = 8  # settings that are named when a finished run moves aside

# A run's path has these already.
IN_THE_PATH = {"seed", "name", "out", "run_dir"}
# These name, place or show a run, or are the same for all jobs of a sweep unless they are swept.
NOT_A_VARIANT = {
    "seed",
    "name",
    "experiment",
    "sweep",
    "out",
    "run_dir",
    "data.path",
    "data.train_path",
    "data.eval_path",
    "train.stop_at",
}
# A run that gets more steps may be measured and saved at others, too.
BESIDE_MORE_STEPS = {"eval.every", "checkpoint.every", "checkpoint.keep"}
# A run resumes with other values of these. (Threads may change the last bits.)
NOT_A_DIFFERENCE = {"train.stop_at", "out", "run_dir", "logger", "provenance", "model.threads"}
# In place of the settings that differ, where nobody can tell.
CONFIG_IS_DAMAGED = "its config.yaml is damaged"
# What a run did whose config.yaml is older than one of these keys.
BEFORE_THE_KEY = {"model.explain_decimals": False}


@dataclass(frozen=True)
class RunDir:
    """A run's folder. `resume`: it holds a run that goes on. `extends`: that run, finished or not,
    was to have only so many steps. `archive`: where the finished run that it holds moves to, and
    `differs` the settings in which that one was another, or CONFIG_IS_DAMAGED alone."""

    path: Path
    resume: bool
    archive: Path | None = None
    differs: tuple[str, ...] = ()
    extends: int | None = None

    @property
    def is_done(self) -> bool:
        """It holds a finished run of this configuration."""
        return self.archive is not None and not self.differs

    @property
    def why(self) -> str:
        """Why the finished run moves aside, as the end of a sentence."""
        if self.differs == (CONFIG_IS_DAMAGED,):
            return CONFIG_IS_DAMAGED
        return f"differed in {', '.join(self.differs) or 'nothing'}"


# --- names -----------------------------------------------------------------------------------


def variant(overrides: Iterable[str], swept: Collection[str] = ()) -> str:
    """What of a job's command line makes it another experiment, as the name of a folder; may be
    empty. Long or odd texts end with a hash.

    `swept`: the keys in which the jobs of this sweep differ. Whichever they are, the folders
    differ, or one job would move another's results aside.
    """
    kept = {}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        about_display = key.startswith(("logger.", "hydra.", "hydra/"))
        names_this_job = key in swept and key not in IN_THE_PATH
        if names_this_job or not (key in NOT_A_VARIANT or about_display):
            kept[key] = value
    text = ",".join(f"{key}={value}" for key, value in sorted(kept.items()))
    clean = re.sub(r"[^\w.,=+-]+", "-", text)
    if clean == text and len(text) <= LONGEST_VARIANT:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return f"{clean[: LONGEST_VARIANT - 11]}-{digest}"


def swept_keys(words: Iterable[str]) -> set[str]:
    """The keys of a command line that have several values."""
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {o.get_key_element().lstrip("+~") for o in parsed if o.is_sweep_override()}


def _job_variant() -> str:
    """`/<variant>` inside a job of a sweep, "" elsewhere."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    swept = swept_keys(words_of_sweep())
    return f"/{variant(HydraConfig.get().overrides.task, swept)}".rstrip("/")


def words_of_sweep() -> list[str]:
    """What the sweep that this job belongs to is over: a job knows its own values alone.

    The words of the file of conf/sweep come first, those of the command line win.
    """
    from_file = HydraConfig.get().sweeper.get("params") or {}
    return [*(f"{key}={value}" for key, value in from_file.items()), *sys.argv[1:]]


OmegaConf.register_new_resolver("variant", _job_variant, replace=True)


# --- differences -----------------------------------------------------------------------------


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys by which two configurations would train or measure something else."""
    a = BEFORE_THE_KEY | flatten(old)
    b = BEFORE_THE_KEY | flatten(new)

    def differs(key: str) -> bool:
        section = key.partition(".")[0]
        if key in NOT_A_DIFFERENCE or section in NOT_A_DIFFERENCE:
            return False
        return key not in a or key not in b or a[key] != b[key]

    return sorted(key for key in a.keys() | b.keys() if differs(key))


# --- the folder ------------------------------------------------------------------------------


def require_run(path: Path) -> Path:
    """The folder of a run. Raises UserError with what to name instead."""
    if not (path / "config.yaml").is_file():
        raise UserError(no_run(path))
    return path


def no_run(path: Path, others: str = "") -> str:
    """What to say of a path that is no run. `others`: what else it might have been."""
    wanted = f"name a run (a folder with config.yaml){others}"
    if not path.exists():
        siblings = [str(other) for other in path.parent.glob("*") if other.is_dir()]
        near = get_close_matches(str(path), siblings, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        return f"{path} is not there: {wanted}{meant}"
    if path.is_file():
        return f"{path} is a file: {wanted}{_run_around(path)}"
    below = [file.parent for file in sorted(path.rglob("config.yaml")) if "wandb" not in file.parts]
    if not below:
        return f"{path} is no run: {wanted}{_run_around(path)}"
    some = ", ".join(map(str, below[:MOST_NAMED_RUNS]))
    more = ", ..." if len(below) > MOST_NAMED_RUNS else ""
    return f"{path} is a folder of {len(below)} runs: name one of them, {some}{more}"


def require_no_file(path: Path) -> None:
    """Raises UserError where a folder cannot be made, because a file has its name or is above it."""
    above = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if not above.is_dir():
        where = "it" if above == path.absolute() else str(above)
        raise UserError(
            f"{path} cannot be a run's folder, {where} is a file: choose another out= or run_dir="
        )


def _run_around(path: Path) -> str:
    """The question whether the run was meant in which a path lies; "" where it lies in none."""
    around = next((one for one in path.parents if (one / "config.yaml").is_file()), None)
    return f"; did you mean {around}?" if around else ""


def find(config: Mapping[str, Any]) -> RunDir:
    """What `prepare` would do; touches nothing. Raises UserError where the folder belongs to
    something else."""
    path = Path(config["run_dir"])
    require_no_file(path)
    is_empty = path.is_dir() and not any(path.iterdir())
    if not path.exists() or is_empty:
        return RunDir(path, resume=False)
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"{path} exists but holds no config.yaml, so it is no run of mar: "
            "choose another name= or seed="
        )
    finished = is_finished(path)
    saved = _read_yaml(path / "config.yaml", strict=not finished)
    if not saved:
        return _step_aside(path, [CONFIG_IS_DAMAGED])
    keys = differing_keys(saved, config)
    if "train.steps" in keys and set(keys) <= {"train.steps", *BESIDE_MORE_STEPS}:
        old_steps = flatten(saved).get("train.steps", math.inf)
        if old_steps < config["train"]["steps"]:
            return RunDir(path, resume=True, extends=old_steps)
    if finished:
        return _step_aside(path, keys)
    if keys:
        raise UserError(
            f"{path} holds an unfinished run with another configuration "
            f"(it differs in {', '.join(keys)}): give the same values to resume it, "
            "choose another name= or seed=, or remove the folder"
        )
    return RunDir(path, resume=True)


def is_finished(path: Path) -> bool:
    """Whether a run's folder has the measurement after training."""
    evaluations = path / "eval.json"
    return evaluations.is_file() and bool(_read_yaml(evaluations).get("after"))


def _step_aside(path: Path, keys: list[str]) -> RunDir:
    """A finished run moves to the first of `seed0~1`, `seed0~2`, ... that is free."""
    numbered = (path.with_name(f"{path.name}~{number}") for number in count(1))
    archive = next(candidate for candidate in numbered if not candidate.exists())
    if len(keys) > MOST_DIFFERENCES:
        keys = [*keys[:MOST_DIFFERENCES], "..."]
    return RunDir(path, resume=False, archive=archive, differs=tuple(keys))


def _read_yaml(file: Path, strict: bool = True) -> dict[str, Any]:
    """A mapping from a YAML or JSON file (JSON is YAML too); {} for a damaged one if not strict."""
    try:
        return dict(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, TypeError, ValueError):
        if not strict:
            return {}
        raise UserError(
            f"{file} is damaged: remove {file.parent}, or choose another name= or seed="
        ) from None


def lock(path: Path, remedy: str = "wait for it, or choose another name= or seed=") -> IO[str]:
    """Keep a run's folder for this process while the returned file is open. The kernel lets go when
    the process ends, however it ends. `remedy`: what to do where another process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(f".{path.name}.lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is being written by another process: {remedy}") from None
    except OSError as error:
        raise UserError(
            f"cannot write beside {path} ({error}): set the permissions, or choose another out="
        ) from None
    return file


def _move_aside(folder: Path, archive: Path) -> None:
    """Raises UserError while `mar.evaluate` measures the run: it would write into the next one."""
    evaluation = folder / "evaluation"
    if not evaluation.with_name(".evaluation.lock").exists():
        folder.rename(archive)
        return
    with lock(evaluation, remedy="wait for mar.evaluate, or choose another name= or seed="):
        folder.rename(archive)


def prepare(config: Mapping[str, Any]) -> RunDir:
    """Make the run's folder (`config["run_dir"]`) and write `config.yaml` (plain values) into it.

    A finished run that is there moves aside; an unfinished one of the same configuration is to be
    resumed, and either where `train.steps` alone is raised; anything else raises UserError and
    leaves the folder as it is.
    """
    run = find(config)
    if run.archive is not None:
        _move_aside(run.path, run.archive)
    if run.resume:
        config = _with_earlier_lengths(run, config)
    if run.extends is not None:
        # First: a folder with the new number of steps and the old end would count as finished.
        _reopen(run.path / "eval.json")
    run.path.mkdir(parents=True, exist_ok=True)
    # Written beside the folder: an interrupted start leaves it empty.
    half = run.path.with_name(f".{run.path.name}.config.yaml")
    with half.open("w") as file:
        yaml.safe_dump(dict(config), file, sort_keys=False)
        file.flush()
        os.fsync(file.fileno())
    half.replace(run.path / "config.yaml")
    return run


def _with_earlier_lengths(run: RunDir, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the numbers of steps that an extended run had before, as
    `provenance.extended_from`: its learning rate has a jump there."""
    origin = _read_yaml(run.path / "config.yaml").get("provenance") or {}
    lengths = list(origin.get("extended_from", []))
    if run.extends is not None:
        lengths.append(run.extends)
    if not lengths:
        return dict(config)
    provenance = {**config.get("provenance", {}), "extended_from": lengths}
    return {**config, "provenance": provenance}


def _reopen(file: Path) -> None:
    """Take the end out of a finished run's `eval.json`; its history keeps the measurement."""
    if file.is_file():
        document = json.loads(file.read_text())
        document.pop("after", None)
        document.pop("gap_closed", None)
        write_json(file, document)

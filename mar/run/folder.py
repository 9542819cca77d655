"""Where a run writes, and whether it starts, resumes or steps aside.

A single run lives in `runs/<name>/seed<seed>`, a job of a multirun in `runs/<name>/<variant>/seed<seed>`. A run is
finished when its `eval.json` has an `after` section; until then the configuration written in the folder resumes it.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from mar.errors import UserError

LONGEST_VARIANT = 80

# They name, place or show a run; they do not change it, but for the last bits that threads can.
NOT_A_VARIANT = {
    "seed",
    "name",
    "experiment",
    "sweep",
    "out",
    "run_dir",
    "data.path",
    "train.stop_at",
}

NOT_A_DIFFERENCE = {"train.stop_at", "out", "run_dir", "logger", "provenance", "model.threads"}


@dataclass(frozen=True)
class RunDir:
    """`resume`: it holds an unfinished run of this configuration. `archive`: where a finished one, other in the settings `differs`, moves to."""

    path: Path
    resume: bool
    archive: Path | None = None
    differs: tuple[str, ...] = ()


def variant(overrides: Iterable[str]) -> str:
    """What of a job's command line makes it another experiment: a folder name of at most 80 characters, or ""."""
    kept = {}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key not in NOT_A_VARIANT and not key.startswith(("logger.", "hydra.", "hydra/")):
            kept[key] = value
    text = ",".join(f"{key}={value}" for key, value in sorted(kept.items()))
    clean = re.sub(r"[^\w.,=+-]+", "-", text)
    if clean == text and len(text) <= LONGEST_VARIANT:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return f"{clean[: LONGEST_VARIANT - 11]}-{digest}"


def _job_variant() -> str:
    """`/<variant>` inside a job of a multirun, "" elsewhere."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    return f"/{variant(HydraConfig.get().overrides.task)}".rstrip("/")


OmegaConf.register_new_resolver("variant", _job_variant, replace=True)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {prefix + key: value}
        )
    return flat


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys by which two configurations would train or measure something else."""
    a, b = flatten(old), flatten(new)
    different = {key for key in a.keys() | b.keys() if (key in a) != (key in b) or a[key] != b[key]}
    return sorted(key for key in different if not {key, key.partition(".")[0]} & NOT_A_DIFFERENCE)


def _read(file: Path, strict: bool = True) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(file.read_text()))  # JSON is YAML too
    except (yaml.YAMLError, TypeError, ValueError):
        if strict:
            raise UserError(
                f"{file} is damaged: remove {file.parent}, or choose another name= or seed="
            ) from None
        return {}


def find(config: Mapping[str, Any]) -> RunDir:
    """What `prepare` would do; touches nothing. Raises UserError if the folder belongs to something else."""
    path = Path(config["run_dir"])
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return RunDir(path, resume=False)
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"{path} exists but holds no config.yaml, so it is no run of mar: choose another name= or seed="
        )
    if (path / "eval.json").is_file() and _read(path / "eval.json").get("after"):
        places = (path.with_name(f"{path.name}~{number}") for number in count(1))
        keys = differing_keys(_read(path / "config.yaml", strict=False), config)
        differs = (*keys[:8], *["..."] * (len(keys) > 8))
        return RunDir(
            path,
            resume=False,
            archive=next(place for place in places if not place.exists()),
            differs=differs,
        )
    if keys := differing_keys(_read(path / "config.yaml"), config):
        raise UserError(
            f"{path} holds an unfinished run with another configuration (it differs in {', '.join(keys)}): "
            f"give the same values to resume it, choose another name= or seed=, or remove the folder"
        )
    return RunDir(path, resume=True)


def lock(path: Path) -> IO[str]:
    """Keep a run's folder for this process while the file it returns is open; the kernel lets go when the process ends, however it ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(f".{path.name}.lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path} is being written by another process: wait for it, or choose another name= or seed="
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write beside {path} ({error}): set the permissions, or choose another out="
        ) from None
    return file


def prepare(config: Mapping[str, Any]) -> RunDir:
    """Make the run's folder and write `config.yaml` (plain values; `config["run_dir"]` is the place) into it.

    A finished run that is there moves to `seed0~1`, `seed0~2`, ...; an unfinished one of the same configuration is
    to be resumed; anything else raises UserError and leaves the folder as it is.
    """
    run = find(config)
    if run.archive is not None:
        run.path.rename(run.archive)
    run.path.mkdir(parents=True, exist_ok=True)
    half = run.path.with_name(
        f".{run.path.name}.config.yaml"
    )  # beside the folder: an interrupted start leaves it empty
    with half.open("w") as file:
        yaml.safe_dump(dict(config), file, sort_keys=False)
        file.flush()
        os.fsync(file.fileno())
    half.replace(run.path / "config.yaml")
    return run

"""Save and resume: torch.distributed.checkpoint into a temporary directory, a manifest with checksums last, then one rename.

A run directory's newest valid checkpoint is what counts; a folder without a manifest, or whose files differ from it, is named and passed over.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict
from torch.optim import Optimizer

from mar.distributed import ALONE, World

MANIFEST = "manifest.json"
Trained = tuple[nn.Module, Optimizer]


@dataclass(frozen=True)
class Found:
    """A valid checkpoint: where, after how many updates, and the newer ones that had to be passed over (with the reason)."""

    path: Path
    step: int
    broken: tuple[str, ...] = ()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _state(model: nn.Module, optimizer: Optimizer, critic: Trained | None) -> dict[str, Any]:
    parts = {"": (model, optimizer)} | ({"critic_": critic} if critic else {})
    states = {prefix: get_state_dict(*part) for prefix, part in parts.items()}
    return {f"{p}{name}": s for p, pair in states.items() for name, s in zip(("model", "optimizer"), pair, strict=True)}


def save(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, keep: int, critic: Trained | None = None, world: World = ALONE
) -> Path:
    """Write the state after `step` updates as `folder/step<step>` and keep the newest `keep`; a crash at any point leaves the older ones usable.
    Every rank writes its shards, rank 0 publishes them."""
    target, temporary = folder / f"step{step:06d}", folder / f"step{step:06d}.tmp"
    if world.leads:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.wait()
    with _quiet():
        dcp.save(_state(model, optimizer, critic), checkpoint_id=temporary, no_dist=world.size == 1)
    if world.leads:
        _publish(temporary, target, step, keep)
    world.wait()
    return target


def _publish(temporary: Path, target: Path, step: int, keep: int) -> None:
    """Manifest, fsyncs, rename; then the oldest go."""
    folder = target.parent
    files = sorted(p for p in temporary.iterdir() if p.is_file())
    manifest: dict[str, Any] = {"step": step, "files": {p.name: _sha256(p) for p in files}}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in (*files, temporary / MANIFEST, temporary):
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    _sync(folder)
    for old in sorted(folder.glob("step" + "[0-9]" * 6))[:-keep]:
        shutil.rmtree(old)


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, None if every file is as its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if not manifest["files"]:
            return f"{path / MANIFEST} lists no files"
        for name, digest in manifest["files"].items():
            if not (path / name).is_file():
                return f"{path / name} is missing"
            if _sha256(path / name) != digest:
                return f"{path / name} differs from its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{path / MANIFEST} is missing or unreadable"
    return None


def newest(folder: Path) -> Found | None:
    """The newest valid checkpoint of a run, if there is one."""
    broken: list[str] = []
    for path in sorted(folder.glob("step" + "[0-9]" * 6), reverse=True):
        fault = _fault(path)
        if fault is None:
            return Found(path, int(path.name.removeprefix("step")), tuple(broken))
        broken.append(fault)
    return None


def restore(found: Found, model: nn.Module, optimizer: Optimizer, critic: Trained | None = None, world: World = ALONE) -> None:
    """Load weights and optimizer state in place, of a run with a critic also the critic's, whatever the number of ranks that wrote them."""
    state = _state(model, optimizer, critic)
    with _quiet():
        dcp.load(state, checkpoint_id=found.path, no_dist=world.size == 1)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if critic:
        set_state_dict(*critic, model_state_dict=state["critic_model"], optim_state_dict=state["critic_optimizer"])


def restore_weights(found: Found, model: nn.Module) -> None:
    """Load the weights alone, in place."""
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    with _quiet():
        dcp.load(state, checkpoint_id=found.path, no_dist=True)
    set_model_state_dict(model, state["model"])

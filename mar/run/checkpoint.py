"""Save and resume: torch.distributed.checkpoint into a temporary directory, a manifest with checksums last, then one rename. A run copies its state
and writes the copy behind its back, while the next step runs.

A run directory's newest valid checkpoint is what counts; a folder without a manifest, or whose files differ from it, is named and passed over.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from mar.errors import UserError
from mar.policy.distributed import ALONE, World

MANIFEST = "manifest.json"

STEP = "step" + "[0-9]" * 6

Trained = tuple[nn.Module, Optimizer]

warnings.filterwarnings(
    "ignore", "torch.distributed is disabled", UserWarning
)  # one process is one process


@dataclass(frozen=True)
class Found:
    """A valid checkpoint: where, and after how many updates."""

    path: Path
    step: int


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
    unused = [o for _, o in parts.values() if not o.state]
    states = {prefix: get_state_dict(*part) for prefix, part in parts.items()}
    for entry in (entry for optimizer in unused for entry in optimizer.state.values()):
        entry[
            "step"
        ].zero_()  # get_state_dict makes a step of an optimizer that has made none, which would count in AdamW's correction
    return {
        f"{p}{name}": s
        for p, pair in states.items()
        for name, s in zip(("model", "optimizer"), pair, strict=True)
    }


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    keep: int,
    critic: Trained | None = None,
    world: World = ALONE,
) -> "Future[Path]":
    """Copy the state after `step` updates; a thread writes it as `folder/step<step>` and keeps the newest `keep`. One at a time. A crash at any point
    leaves the older ones usable. Every rank writes its shards, rank 0 publishes them. Its result is the path, or an OSError where the disk is full,
    read-only or broken."""
    copied = DefaultStager(StagingOptions(False, False, False, False)).stage(
        _state(model, optimizer, critic)
    )  # in CPU memory
    thread = ThreadPoolExecutor(1, "checkpoint")
    future = thread.submit(_write, copied, folder, step, keep, world)
    thread.shutdown(wait=False)
    return future


def _write(state: Any, folder: Path, step: int, keep: int, world: World) -> Path:
    target, temporary = folder / f"step{step:06d}", folder / f"step{step:06d}.tmp"
    if world.leads:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.wait(world.files)
    try:
        dcp.save(state, checkpoint_id=temporary, no_dist=world.size == 1, process_group=world.files)
    except CheckpointException as error:  # no Exception, a page long, and of a full disk torch says that a position is unexpected
        fault = next(iter(error.failures.values()))[0]
        while fault.__context__:
            fault = fault.__context__
        raise OSError(f"cannot write {temporary}: {fault}") from None
    if world.leads:
        _publish(temporary, target, step, keep)
    world.wait(world.files)
    return target


def _publish(temporary: Path, target: Path, step: int, keep: int) -> None:
    """Manifest, fsyncs, rename; then the oldest go, and what is left of saves that were cut off."""
    folder = target.parent
    files = sorted(p for p in temporary.iterdir() if p.is_file())
    (temporary / MANIFEST).write_text(
        json.dumps({"step": step, "files": {p.name: _sha256(p) for p in files}}, indent=2)
    )
    for path in (*files, temporary / MANIFEST, temporary):
        _sync(path)
    if target.exists():
        aside = folder / f"old.{target.name}"  # `newest` finds it until the new one has its name
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    temporary.rename(target)
    _sync(folder)
    kept = [path for path in sorted(folder.glob(STEP)) if path <= target][-keep:]
    for path in sorted(
        {path for kind in (STEP, f"{STEP}.tmp", f"old.{STEP}") for path in folder.glob(kind)}
        - {*kept}
    ):
        shutil.rmtree(path)


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


def newest(folder: Path, say: Callable[[str], object] = warnings.warn) -> Found | None:
    """The newest valid checkpoint of a run, if there is one; `say` hears which newer ones are passed over, and why."""
    for path in sorted(
        folder.glob(f"*{STEP}"), key=lambda path: (path.name[-6:], path.name), reverse=True
    ):
        if (fault := _fault(path)) is None:
            return Found(path, int(path.name[-6:]))
        say(f"passed over a checkpoint: {fault}")
    return None


def require_room(folder: Path, parts: Iterable[nn.Module]) -> None:
    """UserError where the disk that `folder` is on cannot take one checkpoint: weights, and two moments of those that are trained."""
    needed = sum(
        p.numel() * p.element_size() * (3 if p.requires_grad else 1)
        for part in parts
        for p in part.parameters()
    )
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"{folder} has room for {free / 1e6:.0f} of a checkpoint's {needed / 1e6:.0f} MB: make room, or take another out="
        )


def restore(
    found: Found,
    model: nn.Module,
    optimizer: Optimizer,
    critic: Trained | None = None,
    world: World = ALONE,
) -> None:
    """Load weights and optimizer state in place, of a run with a critic also the critic's, whatever the number of ranks that wrote them."""
    state = _state(model, optimizer, critic)
    dcp.load(state, checkpoint_id=found.path, no_dist=world.size == 1)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    if critic:
        set_state_dict(
            *critic,
            model_state_dict=state["critic_model"],
            optim_state_dict=state["critic_optimizer"],
        )


def restore_weights(found: Found, model: nn.Module) -> None:
    """Load the weights alone, in place."""
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=found.path, no_dist=True)
    set_model_state_dict(model, state["model"])

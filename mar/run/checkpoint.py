"""Save and resume.

A save copies the state to CPU memory; a thread writes the copy while the next step runs:
torch.distributed.checkpoint into a temporary directory, a manifest with checksums last, then one
rename. What counts is the newest valid checkpoint of a run. A folder without a manifest, or whose
files differ from it, is named and passed over.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from mar.config import Config
from mar.errors import UserError
from mar.learn.learner import Learner
from mar.policy.distributed import ALONE, World
from mar.run.folder import is_finished

MANIFEST = "manifest.json"
STEP = "step" + "[0-9]" * 6  # a glob: the name of a checkpoint's folder

Trained = tuple[nn.Module, Optimizer]
PastWeights = Sequence[dict[str, Tensor]]

# Expected: a single process saves without torch.distributed.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


@dataclass(frozen=True)
class Found:
    """A valid checkpoint: where, and after how many updates."""

    path: Path
    step: int


# --- saving ----------------------------------------------------------------------------------


class CheckpointWriter:
    """The checkpoints of a run. At most one is being written at a time, behind the training."""

    def __init__(
        self, folder: Path, learner: Learner, keep: int, say: Callable[[str], object]
    ) -> None:
        self.folder = folder
        self.learner = learner
        self.keep = keep
        self.say = say
        self.pending: Future[Path] | None = None

    def save(self, step: int) -> None:
        """Start to write the state after `step` updates."""
        learner = self.learner
        self.pending = save(
            self.folder,
            step,
            learner.policy,
            learner.optimizer,
            self.keep,
            critic_of(learner),
            learner.world,
            list(learner.past_weights),
        )

    def finish(self) -> None:
        """Wait for the write in progress. Raises its OSError."""
        if self.pending:
            self.pending.result()

    def last_step(self, reported: OSError | None = None) -> int:
        """The step that the same command goes on from. An error of the write in progress is said,
        unless it is `reported` already."""
        if self.pending:
            error = self.pending.exception()
            if error is None:
                return int(self.pending.result().name[-6:])
            if error is not reported:
                self.say(f"a checkpoint could not be written: {error}")
        found = newest(self.folder, self.say)
        return found.step if found else 0

    def close(self) -> None:
        """Wait for the write in progress, however it ends."""
        if self.pending:
            wait([self.pending])


def critic_of(learner: Learner) -> Trained | None:
    """The critic and its optimizer, where there is one."""
    if learner.critic is None or learner.critic_optimizer is None:
        return None
    return learner.critic, learner.critic_optimizer


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    keep: int,
    critic: Trained | None = None,
    world: World = ALONE,
    past: PastWeights = (),
) -> "Future[Path]":
    """Copy the state after `step` updates, and let a thread write it as `folder/step<step>`.

    The newest `keep` checkpoints stay. A crash at any point leaves the older ones usable. Every
    rank writes its shards, rank 0 publishes them. The future's result is the path, or an OSError
    where the disk is full, read-only or broken. Start no second save before the first has ended.
    """
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    copied = stager.stage(_state(model, optimizer, critic, past))
    thread = ThreadPoolExecutor(1, "checkpoint")
    future = thread.submit(_write, copied, folder, step, keep, world)
    thread.shutdown(wait=False)
    return future


def _state(
    model: nn.Module, optimizer: Optimizer, critic: Trained | None, past: PastWeights
) -> dict[str, Any]:
    """Weights and optimizer state by name; those of the critic begin with `critic_`. `past_weights`
    are those of earlier steps that rollouts are still to be sampled from (`algo.lag`)."""
    parts = {"": (model, optimizer)}
    if critic:
        parts["critic_"] = critic
    state: dict[str, Any] = {}
    for prefix, (part_model, part_optimizer) in parts.items():
        has_stepped = bool(part_optimizer.state)
        if not has_stepped:
            # With gradients left (all updates were refused) it would make no moments.
            part_optimizer.zero_grad(set_to_none=True)
        weights, moments = get_state_dict(part_model, part_optimizer)
        state[f"{prefix}model"] = weights
        state[f"{prefix}optimizer"] = moments
        if not has_stepped:
            # get_state_dict has just made a step of it, which AdamW's bias correction would count
            for entry in part_optimizer.state.values():
                entry["step"].zero_()
    if past:
        state["past_weights"] = {str(i): weights for i, weights in enumerate(past)}
    return state


def _write(state: Any, folder: Path, step: int, keep: int, world: World) -> Path:
    target = folder / f"step{step:06d}"
    temporary = folder / f"step{step:06d}.tmp"
    if world.leads:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.wait(world.checkpoint_group)
    try:
        dcp.save(
            state,
            checkpoint_id=temporary,
            no_dist=world.size == 1,
            process_group=world.checkpoint_group,
        )
    except CheckpointException as error:
        # Not an Exception, a page long, and it hides a full disk behind an unexpected position.
        cause = next(iter(error.failures.values()))[0]
        while cause.__context__:
            cause = cause.__context__
        raise OSError(f"cannot write {temporary}: {cause}") from None
    if world.leads:
        _publish(temporary, target, step, keep)
    world.wait(world.checkpoint_group)
    return target


def _publish(temporary: Path, target: Path, step: int, keep: int) -> None:
    """Manifest, fsyncs, rename. Then remove old checkpoints, and the remains of saves that were cut
    off."""
    folder = target.parent
    files = sorted(path for path in temporary.iterdir() if path.is_file())
    manifest = {"step": step, "files": {path.name: _sha256(path) for path in files}}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in (*files, temporary / MANIFEST, temporary):
        _sync(path)
    if target.exists():
        aside = folder / f"old.{target.name}"  # `newest` finds it until the new one has its name
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    temporary.rename(target)
    _sync(folder)

    up_to_this = [path for path in sorted(folder.glob(STEP)) if path <= target]
    kept = set(up_to_this[-keep:])
    there = {path for kind in (STEP, f"{STEP}.tmp", f"old.{STEP}") for path in folder.glob(kind)}
    for path in sorted(there - kept):
        shutil.rmtree(path)


def require_room(folder: Path, models: Sequence[nn.Module], keep: int, num_past: int = 0) -> None:
    """Raises UserError where the disk has no room for the checkpoints of a run in `folder`.

    `keep` of them stay while the next one is written. Each holds the weights, and two moments of
    those that are trained; of the first model, the policy, also the trained weights of `num_past`
    earlier steps. What is in the folder already counts.
    """
    one = 0
    for model in models:
        earlier = num_past if model is models[0] else 0
        for parameter in model.parameters():
            copies = 3 + earlier if parameter.requires_grad else 1
            one += copies * parameter.numel() * parameter.element_size()
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed = (keep + 1) * one - there
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise UserError(
            f"{nearest} has room for {free / 1e6:.0f} MB and {keep + 1} checkpoints of "
            f"{one / 1e6:.0f} MB need {needed / 1e6:.0f} MB more: make room, lower "
            "checkpoint.keep, or take another out="
        )


# --- finding ---------------------------------------------------------------------------------


def newest(folder: Path, say: Callable[[str], object] = warnings.warn) -> Found | None:
    """The newest valid checkpoint of a run, if there is one. `say` hears which newer ones are
    passed over, and why."""

    def age(path: Path) -> tuple[str, str]:
        return path.name[-6:], path.name

    for path in sorted(folder.glob(f"*{STEP}"), key=age, reverse=True):
        fault = _fault(path)
        if fault is None:
            return Found(path, int(path.name[-6:]))
        say(f"passed over a checkpoint: {fault}")
    return None


def require_newest(run: Path, config: Config) -> Found:
    """The newest valid checkpoint of a run's folder. Raises UserError where there is none."""
    faults: list[str] = []
    found = newest(run / "checkpoints", lambda said: faults.append(str(said)))
    if found is not None:
        for fault in faults:
            warnings.warn(fault, stacklevel=2)
        return found
    if faults:
        raise UserError(f"{run} has no readable checkpoint ({'; '.join(faults)}): train it again")
    if is_finished(run):
        raise UserError(f"{run} is finished and its checkpoints are gone: train it again")
    raise UserError(
        f"{run} has no readable checkpoint: let the run reach "
        f"checkpoint.every={config.checkpoint.every} steps"
    )


def of_step(folder: Path, step: int) -> Found | None:
    """The checkpoint after `step` updates, if it is there and whole."""
    path = folder / f"step{step:06d}"
    return None if _fault(path) else Found(path, step)


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's folder; None where every file is as its manifest says."""
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


# --- restoring -------------------------------------------------------------------------------


def restore(
    found: Found,
    model: nn.Module,
    optimizer: Optimizer,
    critic: Trained | None = None,
    world: World = ALONE,
    past: PastWeights = (),
) -> None:
    """Load weights and optimizer state in place, also the critic's and those of earlier steps where
    there are any, whatever the number of ranks that wrote them."""
    state = _state(model, optimizer, critic, past)
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

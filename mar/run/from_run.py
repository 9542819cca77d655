"""Start from another run's policy: `model=run model.path=runs/medqa/seed0`.

The run's newest checkpoint becomes a checkpoint folder in the cache, its adapters merged, in the
precision that the run kept its parameters in: from then on it is a model like any other. The new
run's `model.path` says which checkpoint that was, `runs/medqa/seed0@200-<hash>`, so that it stays
the same one when the other run goes on, is extended or removed.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mar.answers.tokenizer import copy_tokenizer, load_tokenizer, stop_ids
from mar.config import RUN_PIN, Config, ModelOptions, run_of_path
from mar.errors import UserError
from mar.files import cache_folder
from mar.policy.lora import adapted, merge
from mar.policy.sources import RECORD, read_record, resolve_model, weight_hashes
from mar.policy.weights import load_model, save_model
from mar.run import checkpoint
from mar.run.checkpoint import Found
from mar.run.compose import load_config


def pin_source(config: Config, say: Callable[[str], object]) -> Config:
    """The same config; where it starts from a run, with the checkpoint in its `model.path`.

    Raises UserError where that run has no checkpoint, or is the one that is to be written.
    """
    options = config.model
    if options.source != "run" or re.search(RUN_PIN, str(options.path)):
        return config
    folder = run_of_path(str(options.path))
    if folder.resolve() == Path(config.run_dir).resolve():
        raise UserError(
            f"model.path={options.path} is the folder that this run writes to: choose another "
            "name= or seed="
        )
    saved = load_config(folder / "config.yaml")
    found = checkpoint.require_newest(folder, saved)
    if found.step < saved.train.steps:
        say(f"{folder} is unfinished: starting from step {found.step} of {saved.train.steps}")
    pinned = f"{str(options.path).rstrip('/')}@{_pin_of(found)}"
    return replace(config, model=replace(options, path=pinned))


def model_of(options: ModelOptions) -> tuple[Path, dict[str, Any]]:
    """(checkpoint folder, its record) of a config's model, wherever it comes from."""
    if options.source != "run":
        return resolve_model(options.source, options.name, options.path)
    path = str(options.path)
    run = run_of_path(path)
    pin = re.search(RUN_PIN, path)
    if pin is None:
        found = checkpoint.require_newest(run, load_config(run / "config.yaml"))
        name = _pin_of(found)
    else:
        name = pin[0].removeprefix("@")
    folder = cache_folder() / "models" / f"run--{name}"
    record = read_record(folder)
    if record:
        return folder, record
    if pin is not None:
        found = _checkpoint_of(run, name)
    return _fill(folder, run, found)


def _pin_of(found: Found) -> str:
    """A checkpoint's name that no other one has: its step, and the hash of its files' hashes."""
    files = json.loads((found.path / checkpoint.MANIFEST).read_text())["files"]
    text = json.dumps(files, sort_keys=True)
    return f"{found.step}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _checkpoint_of(run: Path, name: str) -> Found:
    """The checkpoint of that name. Raises UserError where the run no longer has it."""
    step = int(name.partition("-")[0])
    found = checkpoint.of_step(run / "checkpoints", step)
    if found is None or _pin_of(found) != name:
        raise UserError(
            f"model.path={run}@{name}: this checkpoint is neither in the cache nor in the run any "
            f"more: start from what the run has now, model.path={run}"
        )
    return found


def _fill(folder: Path, run: Path, found: Found) -> tuple[Path, dict[str, Any]]:
    """Write the policy of a checkpoint into a new folder of the cache, whole or not at all."""
    config = load_config(run / "config.yaml")
    source, _ = model_of(config.model)
    stored = torch.promote_types(getattr(torch, config.scale.dtype), torch.float32)
    policy = adapted(load_model(source, dtype=stored), config.model)
    checkpoint.restore_weights(found, policy)
    tokenizer = load_tokenizer(source)
    ends = {
        "eos_token_id": list(stop_ids(tokenizer, source)),
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".run-", dir=folder.parent) as scratch:
            half = Path(scratch) / "model"
            copy_tokenizer(source, half)
            save_model(merge(policy), half, extra=ends)
            origin = f"{run} after step {found.step}"
            record = {"source": "run", "origin": origin, "sha256": weight_hashes(half)}
            (half / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            theirs = read_record(folder)
            if theirs:  # another process was faster
                return folder, theirs
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            half.rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error}): set MAR_CACHE to a folder with room"
        ) from None
    return folder, record

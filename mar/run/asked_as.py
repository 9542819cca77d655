"""How a checkpoint's policy was asked in training: `mar.json`, a small file beside its weights.

Asked in other words it writes nonsense. `mar.export` and `mar.sft` write the file; `mar.ask` and
`mar.evaluate` take its settings where the command line says nothing of them, and whatever starts
from the folder says where it asks otherwise. A folder may come from anywhere: only known settings
with values that they can have are taken.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mar.config import Config
from mar.errors import UserError
from mar.files import write_json
from mar.run.folder import flatten
from mar.tasks.registry import TASKS

FILE = "mar.json"
LARGEST = 10_000  # bytes; ours has about 300
OBJECTIVES = ("multi_rlcr", "multi_rlvr", "rlcr_single", "rlvr_single")
MOST_ANSWERS = 10


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_ANSWERS


# Each setting of the file -> whether a value is one of its own.
OF_WORDS: dict[str, Callable[[Any], bool]] = {
    "data.task": lambda value: isinstance(value, str) and value in TASKS,
    "data.request_first": _is_bool,
    "model.thinking": _is_bool,
    "model.explain_decimals": _is_bool,
}
OF_FORM: dict[str, Callable[[Any], bool]] = {
    "reward.objective": lambda value: value in OBJECTIVES,
    "reward.num_answers": _is_size,
    "reward.layout": lambda value: value in ("interleaved", "split"),
    "reward.analysis": _is_bool,
    "reward.other": _is_bool,
}
KNOWN = OF_WORDS | OF_FORM


def write_asked_as(folder: Path, config: Config, one_form: bool = True) -> None:
    """`one_form`: the policy was trained to answer in the config's form alone."""
    settings = flatten(config.to_dict())
    keys = KNOWN if one_form else OF_WORDS
    write_json(folder / FILE, {key: settings[key] for key in keys})


def asked_as(folder: Path, settings: Sequence[str]) -> list[str]:
    """The words of the folder's file for what `settings` do not choose; stderr names them.

    Raises UserError for a file that is damaged.
    """
    keys = {word.lstrip("+").partition("=")[0] for word in settings}
    chosen = set(keys)
    if "reward" in keys or any(key.startswith("reward.") for key in keys):
        chosen |= OF_FORM.keys()
    if keys & {"experiment", "data"}:
        chosen.add("data.task")
    words = []
    for key, value in _read(folder / FILE).items():
        if key not in chosen:
            words.append(f"{key}={str(value).lower()}")
    if words:
        print(f"as {folder / FILE} says: {' '.join(words)}", file=sys.stderr)
    return words


def asked_otherwise(config: Config) -> str | None:
    """What to say where a config asks the policy of its model folder in other words than before.

    Raises UserError for a file that is damaged.
    """
    if config.model.source != "folder" or config.model.path is None:
        return None
    file = Path(config.model.path) / FILE
    settings = flatten(config.to_dict())
    before = {key: value for key, value in _read(file).items() if key in OF_WORDS}
    # Another task may be what one wants of it.
    before.pop("data.task", None)
    others = [f"{key}={str(before[key]).lower()}" for key in before if before[key] != settings[key]]
    if not others:
        return None
    return f"{file}: this policy was asked with {' '.join(others)} before, and is not now"


def _read(file: Path) -> dict[str, Any]:
    """Its settings; none where there is no file."""
    if not file.is_file():
        return {}
    remedy = (
        "remove it, and say how the model is asked (model.thinking=..., reward.num_answers=...)"
    )
    try:
        with file.open("rb") as opened:
            found = json.loads(opened.read(LARGEST).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{file} cannot be read: {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is no JSON object: {remedy}")
    for key, value in found.items():
        if key not in KNOWN:
            raise UserError(f"{file} has {key!r}, which mar does not write: {remedy}")
        if isinstance(value, list | dict) or not KNOWN[key](value):
            raise UserError(f"{file} says {key}={value!r}, which cannot be: {remedy}")
    return found

"""The folder that `mar.evaluate` writes to: what an earlier evaluation left there is never lost.

`eval_items.jsonl` begins with the protocol of its evaluation. The same protocol goes on in the
folder; the files of another one move to `evaluation~1`, `evaluation~2`, ... in it, and come back
when their protocol is asked for again.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from mar.errors import UserError
from mar.files import jsonable
from mar.run.folder import lock

ITEMS_FILE = "eval_items.jsonl"
RESULT_FILE = "evaluation.json"


def require_writable(folder: Path) -> None:
    """Raises UserError where nothing can be written into a folder; makes nothing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"out={folder}: nothing can be written into {nearest}; choose another out=")


def make_folder(folder: Path) -> None:
    """Make a folder with all above it. Raises UserError where that is not possible."""
    require_writable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={folder} cannot be made ({error}): choose another out=") from None


@contextmanager
def claimed(
    folder: Path, protocol: Mapping[str, Any], say: Callable[[str], object]
) -> Iterator[None]:
    """The folder, made if need be, for this process and this protocol alone.

    Raises UserError while another process measures into it.
    """
    make_folder(folder)
    with lock(folder / "evaluation", remedy="wait for it, or choose another out="):
        make_current(folder, protocol, say)
        yield


def make_current(folder: Path, protocol: Mapping[str, Any], say: Callable[[str], object]) -> None:
    """Move the files of an evaluation with another protocol out of the way, and bring those with
    this one back where an earlier command moved them."""
    if read_protocol(folder) == jsonable(protocol):
        return
    step_aside(folder, say)
    earlier = find_earlier(folder, protocol)
    if earlier is not None:
        # The items first: without the result they are an evaluation that goes on.
        for name in (ITEMS_FILE, RESULT_FILE):
            if (earlier / name).exists():
                (earlier / name).rename(folder / name)
        say(f"{earlier} held an evaluation with these settings: it is back in {folder}")
        if not any(earlier.iterdir()):
            earlier.rmdir()


def step_aside(folder: Path, say: Callable[[str], object]) -> None:
    """Move the folder's files to the first of `evaluation~1`, `evaluation~2`, ... that is free."""
    # The items last: a move that was cut off between the two is finished by the next command.
    files = [name for name in (RESULT_FILE, ITEMS_FILE) if (folder / name).exists()]
    if not files:
        return
    candidates = (folder / f"evaluation~{number}" for number in count(1))
    archive = next(path for path in candidates if not any((path / name).exists() for name in files))
    archive.mkdir(exist_ok=True)
    for name in files:
        (folder / name).rename(archive / name)
    say(f"{folder} holds an evaluation with other settings: it is {archive} now")


def find_earlier(folder: Path, protocol: Mapping[str, Any]) -> Path | None:
    """Where the folder keeps an evaluation with this protocol that has moved aside; one that has
    come to its end, if there are several."""
    wanted = jsonable(protocol)
    found = [path for path in folder.glob("evaluation~*") if read_protocol(path) == wanted]
    return max(found, key=lambda path: (path / RESULT_FILE).exists(), default=None)


def read_protocol(folder: Path) -> dict[str, Any] | None:
    """What the folder's items were measured by; None where it has none, or none can be read."""
    path = folder / ITEMS_FILE
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    try:
        row = json.loads(first)
    except ValueError:
        return None
    return row.get("protocol") if isinstance(row, dict) else None


def earlier_pairs(folder: Path) -> dict[str, Any]:
    """The paired comparisons that an earlier command with the same protocol has written."""
    path = folder / RESULT_FILE
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))["paired"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(pairs) if isinstance(pairs, dict) else {}

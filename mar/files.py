"""Files: jsonl, atomic writes, hashes, the cache folder.."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mar.errors import one_line

BLOCK_BYTES = 1 << 20  # that are read at once from the end of a file


def plain(value: Any) -> Any:
    """A value as JSON can hold it: no nan, no numpy, floats to six significant digits."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file, and `file:line` of every line that is no JSON object (a crash, a full disk): these are skipped."""
    rows, broken = [], []
    for number, line in enumerate(
        path.read_text(encoding="utf-8", errors="replace").split("\n"), 1
    ):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError:
            row = line
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            broken.append(f"{path}:{number}")
    return rows, broken


def append_jsonl(
    path: Path, rows: Iterable[Mapping[str, Any]], mode: str = "a", indent: int | None = None
) -> None:
    """Append rows, one JSON document a line, and wait until they are on the disk."""
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(
            json.dumps(plain(row), ensure_ascii=False, indent=indent) + "\n" for row in rows
        )
        file.flush()
        os.fsync(file.fileno())


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]], indent: int | None = None) -> None:
    """Write a file of rows so that a reader never sees half of it."""
    append_jsonl(path.with_suffix(".tmp"), rows, "w", indent)
    path.with_suffix(".tmp").replace(path)


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Forget what a run wrote after the checkpoint it resumes from, and any half line.

    Rows stand in the order of their steps, so the file is cut from its end: the cost is that of
    what goes, not of what stays.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        for start, line in _lines_from_the_end(file):
            if line.endswith(b"\n") and _step_of(line) <= last_step:
                break
            end = start
        file.truncate(end)
        os.fsync(file.fileno())


def _step_of(line: bytes) -> float:
    """The step of a row; infinite where the line is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return math.inf
    return row.get("step", 0) if isinstance(row, dict) else math.inf


def _lines_from_the_end(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line, the last one first. A last line may lack its line feed."""
    block_start = file.seek(0, os.SEEK_END)
    pending = b""  # the beginning of its first line may stand in the block before
    while block_start > 0:
        size = min(BLOCK_BYTES, block_start)
        block_start -= size
        file.seek(block_start)
        pending = file.read(size) + pending
        end = len(pending)
        while (cut := pending.rfind(b"\n", 0, end - 1)) >= 0:
            yield block_start + cut + 1, pending[cut + 1 : end]
            end = cut + 1
        pending = pending[:end]
    if pending:
        yield 0, pending


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write one JSON document so that a reader never sees half of it."""
    write_jsonl(path, [document], indent=2)


def stable_hash(text: str) -> int:
    """64 bits that depend on the text alone: the same on every machine and in every process."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


def hub_fault(kind: str, hub_id: str) -> str:
    """Why the hub does not show a `model` or `dataset`, "" where it does. Without it this process reads the hub's caches alone from here on: its
    libraries would try again for half a minute, or wait for ever."""
    from huggingface_hub import HfApi, constants

    try:
        HfApi().repo_info(hub_id, repo_type=kind, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # many kinds: connection, missing repository, no permission
        constants.HF_HUB_OFFLINE = True
        return one_line(error)
    return ""


def cache() -> Path:
    return Path(os.environ.get("MAR_CACHE") or "~/.cache/mar").expanduser()

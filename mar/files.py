"""Files: jsonl, writes that are whole or not there, stable hashes, and the cache folder."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mar.errors import UserError, one_line

BLOCK_BYTES = 1 << 20  # that are read at once from the end of a file
NUM_NAMED_LINES = 5  # broken lines that a message names


def jsonable(value: Any) -> Any:
    """The value as JSON can hold it.

    numpy and torch scalars become Python numbers, floats keep six significant digits, and nan and
    infinity, which JSON does not have, become None.
    """
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file that `append_jsonl` wrote, and `file:line` of every broken line.

    A crash or a full disk may leave a line that is no JSON object: it is skipped and named, so
    that a reader can say so (`skipped_lines`). Empty lines are skipped silently.
    """
    broken: list[str] = []
    return list(rows_of_jsonl(path, broken)), broken


def rows_of_jsonl(path: Path, broken: list[str]) -> Iterator[dict[str, Any]]:
    """`read_jsonl` row by row, for files that are larger than what is wanted of them.

    `file:line` of the broken lines is added to `broken`.
    """
    # in bytes: text would also end a line at other separators, such as U+2028 in a JSON string
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.decode("utf-8", errors="replace")
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError:
                broken.append(f"{path}:{number}")
                continue
            if isinstance(row, dict):
                yield row
            elif row is not None:
                broken.append(f"{path}:{number}")


def read_json_object(path: Path) -> dict[str, Any]:
    """One JSON object of a checkpoint folder. Raises UserError naming the file."""
    if path.exists() and not path.is_file():
        # a pipe would be waited for
        raise UserError(f"{path} cannot be read (it is no file)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: give a folder with config.json and safetensors files"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def skipped_lines(broken: Sequence[str]) -> str:
    """The sentence about the broken lines that `read_jsonl` found."""
    return f"Skipped {len(broken)} broken line(s): {', '.join(broken[:NUM_NAMED_LINES])}"


def _write_rows(
    path: Path, mode: str, rows: Iterable[Mapping[str, Any]], indent: int | None = None
) -> None:
    """Write JSON documents, each with a line end, and wait until they are on the disk."""
    with path.open(mode, encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(jsonable(row), ensure_ascii=False, indent=indent) + "\n")
        file.flush()
        os.fsync(file.fileno())


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows, one JSON document a line, and wait until they are on the disk."""
    _write_rows(path, "a", rows)


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


def last_row(path: Path) -> dict[str, Any]:
    """The last whole row of a file that `append_jsonl` wrote, {} where there is none. What a crash
    left behind it is passed over."""
    with path.open("rb") as file:
        for _, line in _lines_from_the_end(file):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                return row
    return {}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of rows so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_suffix(".tmp")
    _write_rows(temporary, "w", rows)
    temporary.replace(path)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write one JSON document, likewise."""
    temporary = path.with_suffix(".tmp")
    _write_rows(temporary, "w", [document], indent=2)
    temporary.replace(path)


def stable_hash(text: str) -> int:
    """64 bits that depend on the text alone: the same on every machine and in every process."""
    encoded = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")


def at_home(path: str) -> Path:
    """The path, with `~` and `~somebody` replaced by that home; of nobody known, as it is."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Where downloaded models and a judge's verdicts are kept: MAR_CACHE, or ~/.cache/mar."""
    return at_home(os.environ.get("MAR_CACHE") or "~/.cache/mar")


def hub_fault(kind: str, hub_id: str) -> str:
    """Why the Hugging Face hub does not show a `model` or `dataset`; "" where it does.

    After a fault this process reads the hub's local caches alone: its libraries would otherwise
    try again for half a minute, or wait for ever.
    """
    from huggingface_hub import HfApi, constants

    try:
        HfApi().repo_info(hub_id, repo_type=kind, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # many kinds: connection, missing repository, no permission
        constants.HF_HUB_OFFLINE = True
        return one_line(error)
    return ""

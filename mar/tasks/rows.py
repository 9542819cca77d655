"""Rows that are read in order once, and again by their number: none of them is kept in memory.

A class of rows for each kind of source: lines of a file, elements of a list (a JSON array, or what
`datasets` keeps on the disk), and what has to be put aside (packed files, tables). `where` is the
position of a row for error messages, such as `file.jsonl:17`.
"""

import json
import os
import pickle
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mar.errors import UserError, one_line

Row = Mapping[str, Any]

BLOCK_BYTES = 1 << 20  # that are read at once

READ = "jsonl, .json, .csv, .tsv (each also as .gz) or .parquet"


class Rows(Protocol):
    """The rows of a source. Those that the iteration has passed can be had again."""

    name: str

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        """(where, row) of every row, in order."""

    def again(self, number: int) -> Row:
        """One row, by its number from 0."""

    def where(self, number: int) -> str:
        """Its position."""


class RowsOfList:
    """The rows of a JSON array, which is in memory, or of a table of `datasets`, which is not."""

    def __init__(self, rows: Sequence[Row], name: str, from_json: bool = False) -> None:
        self.rows = rows
        self.name = name
        self.from_json = from_json

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for number, row in enumerate(self.rows):
            if self.from_json:
                require_whole_characters(row, self.where(number))
            yield self.where(number), row

    def again(self, number: int) -> Row:
        return self.rows[number]

    def where(self, number: int) -> str:
        return f"{self.name}[{number}]"


class _Aside:
    """Bytes at known places of a file without a name, or of one that stays open."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        # the byte at which each row begins, and the end of the last one
        self.starts = array("q")
        weakref.finalize(self, os.close, descriptor)

    def bytes_of(self, number: int) -> bytes:
        start = self.starts[number]
        return os.pread(self.descriptor, self.starts[number + 1] - start, start)


class RowsOfLines:
    """The rows of a jsonl file. It stays open: another file in its place changes nothing."""

    def __init__(self, file: Path, path: str) -> None:
        self.file = file
        self.name = path
        self.aside: _Aside

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        position = 0
        try:
            with self.file.open("rb") as lines:
                self.aside = _Aside(os.dup(lines.fileno()))
                for number, line in enumerate(lines, 1):
                    if not is_blank(line):
                        self.aside.starts.append(position)
                        yield f"{self.name}:{number}", row_of_line(line, self.name, number)
                    position += len(line)
        except OSError as error:
            raise UserError(
                f"{self.name} cannot be read ({one_line(error)}): copy it again"
            ) from None
        self.aside.starts.append(position)

    def again(self, number: int) -> Row:
        return row_of_line(self.aside.bytes_of(number), self.name, number + 1)

    def where(self, number: int) -> str:
        position = 0
        num_lines = 1
        end = self.aside.starts[number]
        while position < end:
            size = min(BLOCK_BYTES, end - position)
            block = os.pread(self.aside.descriptor, size, position)
            num_lines += block.count(b"\n")
            position += len(block)
        return f"{self.name}:{num_lines}"


class RowsPutAside:
    """Rows that can only be read in order (of a packed file, of a table): each is put aside in a
    temporary file without a name."""

    def __init__(self, read: Callable[[], Iterator[tuple[str, Row]]], name: str) -> None:
        self.read = read
        self.name = name
        self.aside: _Aside

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        self.aside = self._new()
        position = 0
        self.aside.starts.append(position)
        try:
            for where, row in self.read():
                position += self._put(pickle.dumps((where, row), pickle.HIGHEST_PROTOCOL))
                self.aside.starts.append(position)
                yield where, row
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(
                f"{self.name} cannot be read ({one_line(error)}): copy it again"
            ) from None

    def _new(self) -> _Aside:
        try:
            descriptor, name = tempfile.mkstemp()
            os.unlink(name)
        except OSError as error:
            raise self._no_room(error) from None
        return _Aside(descriptor)

    def _put(self, content: bytes) -> int:
        written = 0
        try:
            while written < len(content):
                written += os.write(self.aside.descriptor, content[written:])
        except OSError as error:
            raise self._no_room(error) from None
        return written

    def _no_room(self, error: OSError) -> UserError:
        return UserError(
            f"the rows of {self.name} find no room in a temporary folder ({one_line(error)}): let "
            "TMPDIR name a folder with room, or give them as jsonl"
        )

    def _pair(self, number: int) -> tuple[str, Row]:
        pair: tuple[str, Row] = pickle.loads(self.aside.bytes_of(number))
        return pair

    def again(self, number: int) -> Row:
        return self._pair(number)[1]

    def where(self, number: int) -> str:
        return self._pair(number)[0]


def is_blank(line: bytes) -> bool:
    """Whether a line of jsonl holds only what JSON skips."""
    return not line.strip(b" \t\r\n")


def row_of_line(line: bytes, path: str, number: int) -> Row:
    """The object in a line of jsonl, counted from 1. Raises UserError where there is none."""
    where = f"{path}:{number}"
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if number == 1 and line.lstrip()[:1] not in (b"{", b"["):
            raise UserError(
                f"{path} holds no JSON: a table wants a name that ends in .csv, .tsv or .parquet, "
                'and of jsonl each line is one row, {"question": ...}'
            ) from None
        if number == 1:
            raise UserError(
                f"{where} is not valid JSON ({error}): mend the line, or give {READ}, in UTF-8"
            ) from None
        raise UserError(f"{where} is not valid JSON ({error}): mend or remove the line") from None
    if not isinstance(row, dict):
        kind = type(row).__name__
        hint = "; an array of rows wants a name that ends in .json" if kind == "list" else ""
        raise UserError(f"{where} is {kind}, not an object: each line is one row{hint}")
    if b"\\u" in line:
        require_whole_characters(row, where)
    return row


def require_whole_characters(row: Row, where: str) -> None:
    """JSON can write half of a surrogate pair, which is no character: no tokenizer takes it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start]).strip("'")
        raise UserError(
            f"{where} holds half a character ({half}, one of two surrogates): mend or remove the row"
        ) from None

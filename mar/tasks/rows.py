"""Rows that are read in order once, and again by their number: none of them is kept in memory.

A class of rows for each kind of source: lines of a file, elements of a JSON array, rows of a table
(`datasets` keeps those on the disk). `where` is the position of a row for error messages, such as
`file.jsonl:17`.
"""

import gzip
import json
import os
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mar.errors import UserError, one_line

Row = Mapping[str, Any]

BLOCK_BYTES = 1 << 20  # that are read at once


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


class RowsOfLines:
    """The rows of a jsonl file, also as .gz. It stays open: another file in its place changes nothing.

    Where the file is packed, its lines are kept unpacked in a temporary file without a name.
    """

    def __init__(self, file: Path, path: str, packed: bool) -> None:
        self.file = file
        self.name = path
        self.packed = packed
        # the byte at which each row begins, and the end of the last one
        self.starts = array("q")
        self.descriptor = -1

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        self.starts = array("q")
        position = 0
        try:
            with gzip.open(self.file) if self.packed else self.file.open("rb") as lines:
                self._stay_open(lines)
                for number, line in enumerate(lines, 1):
                    if self.packed:
                        _put_aside(self.descriptor, line, self.name)
                    if line.strip():
                        self.starts.append(position)
                        where = f"{self.name}:{number}"
                        yield where, row_of_line(line, where)
                    position += len(line)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(
                f"{self.name} cannot be read ({one_line(error)}): copy it again"
            ) from None
        self.starts.append(position)

    def _stay_open(self, lines: Any) -> None:
        """Keep open what `again` reads: the file, or one for its unpacked lines."""
        if self.packed:
            self.descriptor, name = tempfile.mkstemp()
            os.unlink(name)
        else:
            self.descriptor = os.dup(lines.fileno())
        weakref.finalize(self, os.close, self.descriptor)

    def again(self, number: int) -> Row:
        start = self.starts[number]
        line = os.pread(self.descriptor, self.starts[number + 1] - start, start)
        return row_of_line(line, f"{self.name} (row {number + 1})")

    def where(self, number: int) -> str:
        position = 0
        num_lines = 1
        while position < self.starts[number]:
            room = self.starts[number] - position
            block = os.pread(self.descriptor, min(BLOCK_BYTES, room), position)
            num_lines += block.count(b"\n")
            position += len(block)
        return f"{self.name}:{num_lines}"


def _put_aside(descriptor: int, line: bytes, name: str) -> None:
    try:
        os.write(descriptor, line)
    except OSError as error:
        raise UserError(
            f"{name} cannot be unpacked into {tempfile.gettempdir()} ({one_line(error)}): let "
            "TMPDIR name a folder with room, or unpack it yourself"
        ) from None


def row_of_line(line: bytes, where: str) -> Row:
    """The object in a line of jsonl. Raises UserError naming the line where there is none."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error}): mend or remove the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is {type(row).__name__}, not an object: each line is one row")
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

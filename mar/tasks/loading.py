"""What all loaders share: the request, rows with good errors, splits and samples by a stable hash.

A loader reads rows one by one. Each becomes a `Candidate`: an example, or a counted reason why it
cannot be used. Nothing of a row stays in memory but numbers: an example is read again from its row
when it is asked for, so that a million rows cost as little as a thousand. `where` is always the
position of a row for error messages, such as `file.jsonl:17`.
"""

import ast
import csv
import gzip
import io
import json
import re
import unicodedata
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mar.answers.tokenizer import most_tokens
from mar.errors import UserError, one_line
from mar.files import at_home, hub_fault, stable_hash
from mar.records import Example, Gold
from mar.tasks.examples import LazyExamples, truths_of
from mar.tasks.rows import (
    READ,
    Row,
    Rows,
    RowsOfLines,
    RowsOfList,
    RowsPutAside,
    is_blank,
    row_of_line,
)


class Cells(dict[str, Any]):
    """The row of a csv or tsv file, in which everything is written as text.

    The values are what `_cell` makes of these texts.
    """

    def __init__(self, header: Sequence[str], texts: Sequence[str]) -> None:
        super().__init__(zip(header, map(_cell, texts), strict=True))
        self.texts = dict(zip(header, texts, strict=True))


# The per cent of ids below which a split ends: 10 % test, 20 % validation, 70 % train.
SPLIT_ENDS = (("test", 10), ("validation", 30), ("train", 100))

# Tables in text: the end of a file's name, also before .gz -> what stands between two cells.
SEPARATORS = {".csv": ",", ".tsv": "\t"}

# The first bytes of files that are no plain text.
GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf \t\r\n"
NUM_FIRST_BYTES = 64
FIRST_BYTES = {
    GZIP: "a packed file again",
    b"PAR1": "parquet",
    b"\xff\xfe\0\0": "text in UTF-32",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\x28\xb5\x2f\xfd": "compressed by zstandard",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"ARROW1": "an arrow file",
    b"%PDF": "a PDF",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"SQLite": "a database",
    b"\x80": "a pickle",
    b"\x93NUMPY": "an array of numpy",
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself",
    b"<": "a page of HTML or XML",
}

# What a row that is no row of the task can raise; the last two are of tests nested too deeply.
MALFORMED = (AttributeError, TypeError, ValueError, LookupError, RecursionError, MemoryError)

# What the hub's data sets call a split for validation.
VALIDATION_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Source:
    """Where examples come from and which of them; the fields after `hub_id` are those of `data`."""

    # embedded, hub or path
    kind: str
    split: str
    # None: all
    num: int | None = None
    seed: int = 0
    path: str | None = None
    # The setting that named the file, for messages.
    path_key: str = "data.path"
    # All rows of the file belong to the split: it is not cut.
    whole_file: bool = False
    # A file whose questions are left out (of training: those of the evaluation).
    without_path: str | None = None
    hub_id: str | None = None
    max_gold_words: int = 3
    show_options: bool = False
    max_sentences: int | None = None
    min_prob: float = 0.1
    target: str = "auto"
    data_seed: int = 0
    findings: str = "questions"
    num_asked: Sequence[int] = (8, 12, 20)


@dataclass(frozen=True)
class Loaded:
    """The examples of a split, and how many of its rows were dropped for which reason."""

    examples: Sequence[Example]
    dropped: Counter[str]
    # How many options each question shows, where it shows them.
    num_options: int | None = None
    # Columns of a file that the task does not read.
    unread: tuple[str, ...] = ()
    # What was read, where other splits can be had from it (`load_split`).
    reading: "Reading | None" = None


class Candidate(NamedTuple):
    """A row that could be read."""

    example: Example
    # The question as the file has it: two rows with the same one are duplicates.
    question: str
    # Why it cannot be used; None: it can.
    drop_reason: str | None = None


# ---------------------------------------------------------------------- parts of a row


def required_text(row: Row, key: str, where: str) -> str:
    """The text of a row's key, stripped.

    Raises UserError with position and key where it is missing, empty or no string.
    """
    value = row.texts.get(key) if isinstance(row, Cells) else row.get(key)
    if isinstance(value, str) and value.strip():
        return value.strip()
    if value is None:
        known = ", ".join(str(name) for name in row)
        fault = f"missing (it has {known or 'nothing'})"
    elif isinstance(value, str):
        fault = "empty"
    else:
        fault = f"{type(value).__name__}, not a string"
    raise UserError(f"{where}: {key!r} is {fault}: give a text or remove the row")


def example_id(row: Row, key: str, prefix: str, question: str) -> str:
    """The row's own id, else one from the question's words: it does not move with the row.

    Raises TypeError for an id that is neither a text nor a number.
    """
    given = row.get(key)
    if given not in (None, ""):  # an empty cell of a table is none
        if not isinstance(given, str | int | float) or isinstance(given, bool) or given != given:
            raise TypeError(f"{key} is {given!r}, neither a text nor a number")
        return f"{prefix}-{given}"
    words = " ".join(question.split())
    return f"{prefix}-{stable_hash(words):016x}"


def draw_label(id: str, golds: Sequence[Gold]) -> int:
    """The index of the gold that is this item's label, drawn by the id from the probabilities."""
    edges = list(accumulate(gold.probability or 0.0 for gold in golds))
    point = stable_hash(f"drawn {id}") / 2**64 * edges[-1]
    return next(index for index, edge in enumerate(edges) if point < edge)


# ---------------------------------------------------------------------- rows of files and the hub


def read_json(file: Path) -> Any:
    """The value in a JSON file. Raises UserError for a missing or malformed one."""
    if not file.is_file():
        raise UserError(f"{file}: there is no such file: check data.path")
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): mend it") from None


def rows_of_file(path: str, key: str = "data.path") -> Rows:
    """(`file:line`, row) of a jsonl file, or (`file[n]`, row) of a table or the array in a .json.

    Raises UserError for what cannot be read. key: the setting that named the file.
    """
    file = at_home(path)
    if file.is_dir():
        raise UserError(f"{key}={path} is a folder: name a file in it")
    if not file.is_file():
        near = get_close_matches(file.name, [other.name for other in file.parent.glob("*")], n=1)
        meant = f"did you mean {Path(path).parent / near[0]}?" if near else "name one file"
        raise UserError(f"{key}={path} is not there: {meant}")
    try:
        return _rows_by_kind(file, path)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): copy it again") from None


def _rows_by_kind(file: Path, path: str) -> Rows:
    packed = _first_bytes(file, packed=False).startswith(GZIP)
    _require_readable(_first_bytes(file, packed), file, path, packed)
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix == ".parquet":
        return RowsPutAside(partial(_rows_of_parquet, file, path), path)
    if suffix in SEPARATORS:
        separator = SEPARATORS[suffix]
        return RowsPutAside(partial(_rows_of_table, file, packed, path, separator), path)
    if suffix == ".json":
        with _opened(file, packed) as content:
            rows = _array(content.read(), path)
        if rows is not None:
            return RowsOfList(rows, path, from_json=True)
    if packed:
        return RowsPutAside(partial(_rows_of_packed_lines, file, path), path)
    return RowsOfLines(file, path)


def _rows_of_packed_lines(file: Path, path: str) -> Iterator[tuple[str, Row]]:
    with gzip.open(file) as lines:
        for number, line in enumerate(lines, 1):
            if not is_blank(line):
                yield f"{path}:{number}", row_of_line(line, path, number)


def _opened(file: Path, packed: bool) -> IO[bytes]:
    return gzip.open(file) if packed else file.open("rb")  # type: ignore[return-value]


def _first_bytes(file: Path, packed: bool) -> bytes:
    with _opened(file, packed) as content:
        return content.read(NUM_FIRST_BYTES)


def _require_readable(start: bytes, file: Path, path: str, packed: bool) -> None:
    """Raises UserError for contents that are neither text in UTF-8 nor parquet."""
    kind = next((kind for first, kind in FIRST_BYTES.items() if start.startswith(first)), None)
    if kind is None and b"\0" in start[:4]:
        kind = "text in UTF-16, or no text"
    inside = "holds" if packed else "is"
    if kind == "parquet" and packed:
        raise UserError(f"{path} holds a packed parquet file: unpack it")
    if kind == "parquet" and file.suffix.lower() != ".parquet":
        raise UserError(f"{path} is a parquet file: let its name end in .parquet")
    if kind not in (None, "parquet"):
        raise UserError(f"{path} {inside} {kind}, which is not read: give {READ}, in UTF-8")


def _array(content: bytes, path: str) -> list[Row] | None:
    """The rows in the array of a .json file. None: it has a row a line, as jsonl has."""
    try:
        array = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data") and content.lstrip(BOM)[:1] == b"{":
            return None
        raise UserError(f"{path} is not valid JSON ({error}): mend it") from None
    if not isinstance(array, list) or not all(isinstance(row, dict) for row in array):
        raise UserError(f"{path} is no array of objects: give one row an element, or jsonl")
    return array


def _rows_of_parquet(file: Path, path: str) -> Iterator[tuple[str, Row]]:
    # what `datasets` itself reads it with
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}[{number}]", row
                    number += 1
    except (ArrowException, ValueError) as error:
        raise UserError(
            f"{path} is no readable parquet table ({one_line(error)}): write it again"
        ) from None


def _rows_of_table(
    file: Path, packed: bool, path: str, separator: str
) -> Iterator[tuple[str, Row]]:
    """(`file[n]`, row) of a table in text, from 0, without its header. Cells are texts, whatever
    they look like."""
    with _opened(file, packed) as content:
        yield from _rows_of_text(content, path, separator)


def _rows_of_text(content: IO[bytes], path: str, separator: str) -> Iterator[tuple[str, Row]]:
    text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    rows = csv.reader(text, delimiter=separator, strict=True)
    try:
        header = next(rows, [])
        _require_columns(header, path)
        number = 0
        for cells in rows:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}[{number}] has {len(cells)} cells for {len(header)} columns (it ends "
                    f"in line {rows.line_num}): mend or remove the row"
                )
            yield f"{path}[{number}]", Cells(header, cells)
            number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8 ({one_line(error)}): save it in UTF-8") from None
    except csv.Error as error:
        raise UserError(
            f"{path} is no readable table ({one_line(error)}, near line {rows.line_num + 1}): mend "
            "it"
        ) from None


def _require_columns(header: list[str], path: str) -> None:
    if not header:
        raise UserError(f"{path} is an empty table: give its columns names and rows")
    if len(header) == 1 and re.search(r"[;\t|,]", header[0]):
        raise UserError(
            f"{path} has one column, {header[0]!r}: separate columns by commas in .csv and by tabs "
            "in .tsv"
        )
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise UserError(f"{path} has two columns {twice[0]!r}: give each a name of its own")


def _cell(text: str) -> Any:
    """A text, or the list or object of texts and lists that it spells, in JSON or Python."""
    if text[:1] + text[-1:] not in ("[]", "{}"):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
            json.dumps(value, ensure_ascii=False).encode()  # no bytes, no half characters
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        items = value.values() if isinstance(value, dict) else value
        if value and all(isinstance(item, str | list | tuple | dict) for item in items):
            return value
    return text


def split_of(id: str) -> str:
    """train, validation or test, from the id alone: whatever else is in the file."""
    percent = stable_hash(id) % 100
    return next(split for split, end in SPLIT_ENDS if percent < end)


class SourceRows(NamedTuple):
    """The rows of a source, and the split that each id belongs to."""

    rows: Rows
    split_of_id: Callable[[str], str]
    # the splits that are in these rows; None: all that `split_of_id` knows
    splits: tuple[str, ...] | None = None


def rows_of_hub(hub_id: str, split: str) -> SourceRows:
    """The rows (`id[split][row]`, row) of a hub data set that the split is in.

    A data set without a split for validation has its train split cut in two by `split_of`.
    """
    import datasets

    name, *configuration = hub_id.split(":")  # "owner/name:configuration"
    fault = hub_fault("dataset", name)
    try:
        splits = datasets.load_dataset(name, *configuration)
    except Exception as error:  # many kinds: not in the cache, bad files
        raise UserError(
            f"cannot load data set {hub_id} from the hub ({fault or one_line(error)}): check "
            "data.hub_id and the network; offline, use data.source=path data.path=<file.jsonl>, "
            "or scale=laptop data.source=embedded for the rehearsal"
        ) from None
    has_validation = any(name in splits for name in VALIDATION_NAMES)
    cut = split in ("train", "validation") and "train" in splits and not has_validation
    if split not in splits and not cut:
        raise UserError(
            f"data set {hub_id} has no split {split!r}: set data.train_split and data.eval_split "
            f"to {', '.join(splits)}"
        )
    if not cut:
        return SourceRows(
            RowsOfList(splits[split], f"{hub_id}[{split}]"), lambda id: split, (split,)
        )

    def half(id: str) -> str:
        return "validation" if split_of(id) == "validation" else "train"

    rows = RowsOfList(splits["train"], f"{hub_id}[train]")
    return SourceRows(rows, half, ("train", "validation"))


def rows_of_source(source: Source) -> SourceRows:
    """The rows of a source, each with its position, and the split that an id is in.

    A file is cut by `split_of(id)`. The hub has splits of its own; only where none is for
    validation, `validation` is the share of its train that `split_of` says, and `train` the rest.
    """
    if source.kind == "path":
        rows = rows_of_file(str(source.path), source.path_key)
        if source.whole_file:
            return SourceRows(rows, lambda id: source.split, (source.split,))
        return SourceRows(rows, split_of)
    if source.kind == "hub":
        return rows_of_hub(str(source.hub_id), source.split)
    raise UserError(
        f"data.source={source.kind} has no rows of this task: use data.source=path or hub"
    )


# ---------------------------------------------------------------------- from rows to examples

ReadRow = Callable[[Row, str], Candidate]


@dataclass
class Reading:
    """What is known of a source's rows after they have been read once: which can be used, and some
    numbers of each.
    """

    source: Source
    rows: Rows
    read: ReadRow
    splits: tuple[str, ...] | None
    num_rows: int = 0  # with different ids
    columns: set[str] = field(default_factory=set)  # of any row
    # of each row that can be used: its number, id, split, kind of truth, and how long it can get
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    ids: list[str] = field(default_factory=list)
    split_names: list[str] = field(default_factory=list)
    truths: list[str] = field(default_factory=list)
    question_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    # of each split
    dropped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, number: int, example: Example, split: str) -> None:
        """A row that can be used."""
        self.numbers.append(number)
        self.ids.append(example.id)
        self.split_names.append(split)
        self.truths.append(example.truth)
        self.question_tokens.append(most_tokens(example.question))

    def has(self, source: Source) -> bool:
        """Whether the split of another source is in these rows, read in the same way."""
        same_but_split = replace(source, split="", num=None, seed=0)
        same_rows = same_but_split == replace(self.source, split="", num=None, seed=0)
        return same_rows and (self.splits is None or source.split in self.splits)

    def take(self, source: Source) -> Loaded:
        """The examples of a source's split. Raises UserError where there are none.

        `num` takes those with the smallest hash of seed and id: a random sample, not the head of
        the file.
        """
        dropped = self.dropped[source.split]
        chosen = [i for i, split in enumerate(self.split_names) if split == source.split]
        if not chosen:
            raise UserError(_empty_split(source, num_rows=self.num_rows, dropped=dropped))
        if source.num is not None and source.num < len(chosen):
            chosen.sort(key=lambda i: stable_hash(f"{source.seed} {self.ids[i]}"))
            del chosen[source.num :]
        read = self.read
        examples = LazyExamples(
            rows=self.rows,
            read=lambda row, where: _read_row(read, row, where).example,
            numbers=np.array(self.numbers)[chosen],
            id_hashes=np.fromiter((hash(self.ids[i]) for i in chosen), np.int64),
            truths=frozenset(self.truths[i] for i in chosen),
            question_tokens=np.array(self.question_tokens)[chosen],
        )
        return Loaded(examples, dropped, reading=self)


def plain_words(text: str) -> str:
    """Its words in lower case, one space between them: two questions with the same are duplicates,
    whichever way their accents are encoded."""
    if text.isascii():
        text = text.casefold().replace("\n", " ")
        if text.isprintable() and "  " not in text:
            return text.strip()  # the same, five times as fast
    else:
        text = unicodedata.normalize("NFC", text).casefold()
    return " ".join(text.split())


def _digest_of_words(question: str) -> bytes:
    """Of its words: a million texts would be a gigabyte."""
    words = plain_words(question).encode("utf-8", "surrogatepass")
    return blake2b(words, digest_size=16).digest()


def _questions_left_out(source: Source, read: ReadRow) -> set[bytes]:
    """The questions of the other file, by their words: what is measured must not be trained."""
    if source.without_path is None:
        return set()
    rows = rows_of_file(source.without_path, "data.eval_path")
    return {_digest_of_words(_read_row(read, row, where).question) for where, row in rows}


def read_rows(source: Source, read: ReadRow) -> Reading:
    """Every row of a source once. Raises UserError on a row that is malformed or has another's id.

    A question that stood before is dropped, whatever its split, and so is one of the file that the
    source goes without.
    """
    rows, split_of_id, splits = rows_of_source(source)
    reading = Reading(source, rows, read, splits)
    number_of_id: dict[str, int] = {}
    questions: set[bytes] = set()
    left_out = _questions_left_out(source, read)
    for number, (where, row) in enumerate(rows):
        example, question, drop_reason = _read_row(read, row, where)
        reading.columns.update(row)
        digest = _digest_of_words(question)
        if digest in left_out:
            drop_reason = f"also in {source.without_path}"
        elif digest in questions:
            drop_reason = "duplicate question"
        elif example.id in number_of_id:
            earlier = rows.where(number_of_id[example.id])
            raise UserError(
                f"{where}: the id {example.id!r} is also that of {earlier}: ids must differ"
            )
        questions.add(digest)
        number_of_id[example.id] = number
        split = split_of_id(example.id)
        if drop_reason:
            reading.dropped[split][drop_reason] += 1
        else:
            reading.add(number, example, split)
    reading.num_rows = len(number_of_id)
    return reading


def load_rows(source: Source, read: ReadRow) -> Loaded:
    """The examples of a split. `read` raises UserError on a malformed row, in whichever split it is.

    A question that stood before is dropped, whatever its split; an id that stood before with
    another question is an error. `num` takes a random sample (`Reading.take`).
    """
    return read_rows(source, read).take(source)


def load_split(loaded: Loaded, source: Source) -> Loaded | None:
    """Another split of what was loaded, without reading the rows again; None: it is not in them."""
    if loaded.reading is None or not loaded.reading.has(source):
        return None
    return replace(loaded.reading.take(source), num_options=loaded.num_options)


def _read_row(read: Callable[[Row, str], Candidate], row: Row, where: str) -> Candidate:
    try:
        return read(row, where)
    except MALFORMED as error:
        raise UserError(
            f"{where} has another form than this task's rows ({one_line(error)}): mend or remove "
            "the row"
        ) from None


def _empty_split(source: Source, num_rows: int, dropped: Counter[str]) -> str:
    origin = source.path if source.kind == "path" else source.hub_id
    reasons = [f"{number} {reason}" for reason, number in dropped.items()]
    if not num_rows:
        return f"{origin} holds no rows: use another file"
    if source.whole_file:
        return f"{origin}: no row is left of {num_rows} ({', '.join(reasons)}): use another file"
    splits = [name for name, _ in reversed(SPLIT_ENDS)]
    if source.kind == "path" and source.split not in splits:
        return f"{origin}: a file has no split {source.split!r}: it has {', '.join(splits)}"
    why = ", ".join(reasons) or "none of them falls into it"
    remedy = "use another split or file"
    if source.kind == "path":
        remedy += ", or two files that are not cut, data.train_path and data.eval_path"
    return f"{origin}: split {source.split!r} is empty ({num_rows} rows; {why}): {remedy}"


# ---------------------------------------------------------------------- of loaded examples


def apply_target(examples: Sequence[Example], target: str) -> Sequence[Example]:
    """The examples with what the reward pays for: data.target.

    Where the golds form a distribution, that is a drawn label, or with `probabilities` each gold's
    probability. Both agree in expectation.
    """
    if target != "probabilities":
        return examples
    if not truths_of(examples) <= {"exact", "survey"}:
        raise UserError(
            "data.target=probabilities: not all golds have a probability; use data.target=auto"
        )
    if isinstance(examples, LazyExamples):
        return examples.changed(_without_label)
    return [_without_label(example) for example in examples]


def _without_label(example: Example) -> Example:
    return replace(example, label=None)


def chance_line(num_answers: int, num_options: int) -> str:
    """What guessing is worth: of n options shown, K different ones hold the gold with chance K/n."""
    coverage = min(1.0, num_answers / num_options)
    top1 = 1 / num_options
    return (
        f"chance, {num_options} options shown: coverage@{num_answers} {coverage:.3f}, "
        f"top-1 {top1:.3f}"
    )

"""What all loaders share: the request, rows with good errors, splits and samples by a stable hash.

A loader reads rows one by one. Each becomes a `Candidate`: an example, or a counted reason why it
cannot be used. `where` is always the position of a row for error messages, such as `file.jsonl:17`.
"""

import ast
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple

from mar.errors import UserError, one_line
from mar.files import hub_fault, stable_hash
from mar.records import Example, Gold

Row = Mapping[str, Any]


class Cells(dict[str, Any]):
    """The row of a csv or tsv file: whatever is in it had to be written as text."""


# The per cent of ids below which a split ends: 10 % test, 20 % validation, 70 % train.
SPLIT_ENDS = (("test", 10), ("validation", 30), ("train", 100))

# Tables in text: the end of a file's name, also before .gz -> what stands between two cells.
SEPARATORS = {".csv": ",", ".tsv": "\t"}

READ = "jsonl, .json, .csv, .tsv (each also as .gz) or .parquet"

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

    examples: list[Example]
    dropped: Counter[str]
    # How many options each question shows, where it shows them.
    num_options: int | None = None


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
    value = row.get(key)
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
    """The row's own id, else one from the question's words: it does not move with the row."""
    given = row.get(key)
    if given not in (None, ""):  # an empty cell of a table is none
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


def rows_of_file(path: str, key: str = "data.path") -> Iterator[tuple[str, Row]]:
    """(`file:line`, row) of a jsonl file, or (`file[n]`, row) of a table or the array in a .json.

    Raises UserError for what cannot be read. key: the setting that named the file.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{key}={path} is a folder: name a file in it")
    if not file.is_file():
        near = get_close_matches(file.name, [other.name for other in file.parent.glob("*")], n=1)
        meant = f"did you mean {Path(path).parent / near[0]}?" if near else "name one file"
        raise UserError(f"{key}={path} is not there: {meant}")
    try:
        yield from _rows_by_kind(file, path)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): copy it again") from None


def _rows_by_kind(file: Path, path: str) -> Iterator[tuple[str, Row]]:
    packed = _first_bytes(file, packed=False).startswith(GZIP)
    _require_readable(_first_bytes(file, packed), file, path, packed)
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix == ".parquet":
        yield from _rows_of_parquet(file, path)
    elif suffix in SEPARATORS:
        with _opened(file, packed) as content:
            yield from _rows_of_table(content, path, SEPARATORS[suffix])
    else:
        array = None
        if suffix == ".json":
            with _opened(file, packed) as content:
                array = _array(content.read(), path)
        if array is not None:
            for number, row in enumerate(array):
                _require_whole_characters(row, f"{path}[{number}]")
                yield f"{path}[{number}]", row
            return
        with _opened(file, packed) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _row_of_line(line, path, number)


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


def _rows_of_table(content: IO[bytes], path: str, separator: str) -> Iterator[tuple[str, Row]]:
    """(`file[n]`, row) of a table in text, from 0, without its header. Cells are texts, whatever they look like."""
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
            yield f"{path}[{number}]", Cells(zip(header, map(_cell, cells), strict=True))
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
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        items = value.values() if isinstance(value, dict) else value
        if value and all(isinstance(item, str | list | tuple | dict) for item in items):
            return value
    return text


def _row_of_line(line: bytes, path: str, number: int) -> Row:
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
        _require_whole_characters(row, where)
    return row


def _require_whole_characters(row: Row, where: str) -> None:
    """JSON can write half of a surrogate pair, which is no character: no tokenizer takes it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start]).strip("'")
        raise UserError(
            f"{where} holds half a character ({half}, one of two surrogates): mend or remove the row"
        ) from None


def split_of(id: str) -> str:
    """train, validation or test, from the id alone: whatever else is in the file."""
    percent = stable_hash(id) % 100
    return next(split for split, end in SPLIT_ENDS if percent < end)


def rows_of_hub(hub_id: str, split: str) -> tuple[Iterator[tuple[str, Row]], Callable[[str], bool]]:
    """The rows (`id[split][row]`, row) of a hub data set, and which of their ids are in the split.

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

    stored = "train" if cut else split
    rows = ((f"{hub_id}[{stored}][{number}]", row) for number, row in enumerate(splits[stored]))

    def belongs(id: str) -> bool:
        if not cut:
            return True
        in_validation = split_of(id) == "validation"
        return in_validation == (split == "validation")

    return rows, belongs


def rows_of_source(source: Source) -> tuple[Iterable[tuple[str, Row]], Callable[[str], bool]]:
    """The rows of a source, each with its position, and the test whether an id is in the split.

    A file is cut by `split_of(id)`. The hub has splits of its own; only where none is for
    validation, `validation` is the share of its train that `split_of` says, and `train` the rest.
    """
    if source.kind == "path":
        rows = rows_of_file(str(source.path), source.path_key)
        if source.whole_file:
            return rows, lambda id: True
        return rows, lambda id: split_of(id) == source.split
    if source.kind == "hub":
        return rows_of_hub(str(source.hub_id), source.split)
    raise UserError(
        f"data.source={source.kind} has no rows of this task: use data.source=path or hub"
    )


# ---------------------------------------------------------------------- from rows to examples


def load_rows(source: Source, read: Callable[[Row, str], Candidate]) -> Loaded:
    """The examples of a split. `read` raises UserError on a malformed row, in whichever split it is.

    A question that stood before is dropped, whatever its split; an id that stood before with
    another question is an error. `num` takes the examples with the smallest hash of seed and id: a
    random sample, not the head of the file.
    """
    rows, belongs = rows_of_source(source)
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    position_of_id: dict[str, str] = {}
    questions: set[str] = set()
    left_out = _questions_left_out(source, read)
    for where, row in rows:
        example, question, drop_reason = _read_row(read, row, where)
        same_words = _same_words(question)
        if same_words in left_out:
            drop_reason = f"also in {source.without_path}"
        elif same_words in questions:
            drop_reason = "duplicate question"
        elif example.id in position_of_id:
            raise UserError(
                f"{where}: the id {example.id!r} is also that of {position_of_id[example.id]}: "
                "ids must differ"
            )
        questions.add(same_words)
        position_of_id[example.id] = where
        if not belongs(example.id):
            continue
        if drop_reason:
            dropped[drop_reason] += 1
        else:
            examples.append(example)
    if not examples:
        raise UserError(_empty_split(source, num_rows=len(position_of_id), dropped=dropped))
    if source.num is not None and source.num < len(examples):
        examples.sort(key=lambda example: stable_hash(f"{source.seed} {example.id}"))
        del examples[source.num :]
    return Loaded(examples, dropped)


def _same_words(question: str) -> str:
    """Equal for questions that differ in nothing but case and spaces."""
    return " ".join(question.casefold().split())


def _questions_left_out(source: Source, read: Callable[[Row, str], Candidate]) -> set[str]:
    """The questions of the other file: what is measured must not be trained."""
    if source.without_path is None:
        return set()
    rows = rows_of_file(source.without_path, "data.eval_path")
    return {_same_words(_read_row(read, row, where).question) for where, row in rows}


def _read_row(read: Callable[[Row, str], Candidate], row: Row, where: str) -> Candidate:
    try:
        return read(row, where)
    except (AttributeError, TypeError, ValueError, LookupError) as error:
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
    why = ", ".join(reasons) or "none of them falls into it"
    remedy = "use another split or file"
    if source.kind == "path":
        remedy += ", or two files that are not cut, data.train_path and data.eval_path"
    return f"{origin}: split {source.split!r} is empty ({num_rows} rows; {why}): {remedy}"


# ---------------------------------------------------------------------- of loaded examples


def apply_target(examples: list[Example], target: str) -> list[Example]:
    """The examples with what the reward pays for: data.target.

    Where the golds form a distribution, that is a drawn label, or with `probabilities` each gold's
    probability. Both agree in expectation.
    """
    if target != "probabilities":
        return examples
    if not all(example.truth in ("exact", "survey") for example in examples):
        raise UserError(
            "data.target=probabilities: not all golds have a probability; use data.target=auto"
        )
    return [replace(example, label=None) for example in examples]


def chance_line(num_answers: int, num_options: int) -> str:
    """What guessing is worth: of n options shown, K different ones hold the gold with chance K/n."""
    coverage = min(1.0, num_answers / num_options)
    top1 = 1 / num_options
    return (
        f"chance, {num_options} options shown: coverage@{num_answers} {coverage:.3f}, "
        f"top-1 {top1:.3f}"
    )

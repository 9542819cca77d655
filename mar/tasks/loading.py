"""What every loader shares: the request, rows with good errors, splits and samples by a stable hash, duplicates dropped."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from mar.errors import UserError, one_line
from mar.files import hub_fault, stable_hash
from mar.records import Example, Gold

Row = Mapping[str, Any]

SPLIT_SHARES = (
    ("test", 10),
    ("validation", 30),
    ("train", 100),
)  # the per cent of ids below which a split ends

VALIDATION_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Source:
    """Where examples come from and which of them. `kind`: embedded, hub or path; `num` None takes all."""

    kind: str
    split: str
    num: int | None = None
    seed: int = 0
    path: str | None = None
    hub_id: str | None = None
    max_gold_words: int = 3
    show_options: bool = False
    max_sentences: int | None = None
    min_prob: float = 0.1
    target: str = "auto"
    data_seed: int = 0


@dataclass(frozen=True)
class Loaded:
    """Examples, how many rows of the split were dropped for which reason, and how many options a question shows."""

    examples: list[Example]
    dropped: Counter[str]
    num_options: int | None = None


class Candidate(NamedTuple):
    """A row that could be read: the example, the question as the file has it, why it cannot be used (None: it can)."""

    example: Example
    question: str
    reason: str | None = None


def split_of(id: str) -> str:
    """train, validation or test, from the id alone: whatever else is in the file."""
    point = stable_hash(id) % 100
    return next(split for split, below in SPLIT_SHARES if point < below)


def text_of(row: Row, key: str, place: str) -> str:
    """The text of a row's key, stripped. UserError names place and key where it is missing, empty or no string."""
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        return value.strip()
    wrong = (
        "missing"
        if value is None
        else "empty"
        if isinstance(value, str)
        else f"{type(value).__name__}, not a string"
    )
    raise UserError(f"{place}: {key!r} is {wrong}: give a text or remove the row")


def id_of(row: Row, key: str, prefix: str, question: str) -> str:
    """The row's own id, else one from the question's words, so that it does not move with the row."""
    given = row.get(key)
    return (
        f"{prefix}-{stable_hash(' '.join(question.split())):016x}"
        if given is None
        else f"{prefix}-{given}"
    )


def read_json(file: Path) -> Any:
    """The value in a JSON file; a missing or malformed one is named."""
    if not file.is_file():
        raise UserError(f"{file}: there is no such file: check data.path")
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}): mend it") from None


def draw_label(id: str, golds: Sequence[Gold]) -> int:
    """The index of the gold that is this item's label, drawn by the probabilities, once and for all, from the id."""
    edges = list(accumulate(gold.probability or 0.0 for gold in golds))
    point = stable_hash(f"drawn {id}") / 2**64 * edges[-1]
    return next(index for index, edge in enumerate(edges) if point < edge)


def aim(examples: list[Example], target: str) -> list[Example]:
    """The examples with what the reward pays for: a drawn label, or where the golds form a distribution and `target` says so its
    probabilities. Both agree in expectation."""
    known = all(example.truth in ("exact", "survey") for example in examples)
    if target == "probabilities" and not known:
        raise UserError(
            "data.target=probabilities: not all golds have a probability; use data.target=auto"
        )
    return [replace(e, label=None) for e in examples] if target == "probabilities" else examples


def read_jsonl(path: str) -> Iterator[tuple[str, Row]]:
    """(`file:line`, row) for every line, or (`file[n]`, row) of one array in a .json file; what cannot be read is named."""
    file = Path(path).expanduser()
    if file.suffix == ".json":
        array = read_json(file)
        if not isinstance(array, list) or not all(isinstance(row, dict) for row in array):
            raise UserError(f"{path} is no array of objects: give one row an element, or jsonl")
        yield from ((f"{path}[{number}]", row) for number, row in enumerate(array))
        return
    if not file.is_file():
        raise UserError(
            f"data.path={path} is {'a folder: name a file in it' if file.is_dir() else 'not there'}"
        )
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise UserError(
                    f"{path}:{number} is not valid JSON ({error}): mend or remove the line"
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}:{number} is {type(row).__name__}, not an object: each line is one row"
                )
            yield f"{path}:{number}", row


def read_hub(hub_id: str, split: str) -> tuple[Iterator[tuple[str, Row]], Callable[[str], bool]]:
    """The rows (`id[split][row]`, row) of a data set on the Hugging Face hub, and which ids of them are in the split."""
    import datasets

    name, *configuration = hub_id.split(":")  # "owner/name:configuration"
    fault = hub_fault("dataset", name)
    try:
        splits = datasets.load_dataset(name, *configuration)
    except Exception as error:  # many kinds: not in the cache, bad files
        raise UserError(
            f"cannot load data set {hub_id} from the hub ({fault or one_line(error)}): "
            "check data.hub_id and the network; offline, use data.source=path data.path=<file.jsonl>, or scale=laptop "
            "data.source=embedded for the rehearsal"
        ) from None
    carved = (
        split in ("train", "validation")
        and "train" in splits
        and not set(splits) & set(VALIDATION_NAMES)
    )
    if split not in splits and not carved:
        raise UserError(
            f"data set {hub_id} has no split {split!r}: set data.train_split and data.eval_split to {', '.join(splits)}"
        )
    name = "train" if carved else split
    rows = ((f"{hub_id}[{name}][{number}]", row) for number, row in enumerate(splits[name]))
    return rows, lambda id: not carved or (split_of(id) == "validation") == (split == "validation")


def rows_of(source: Source) -> tuple[Iterable[tuple[str, Row]], Callable[[str], bool]]:
    """The rows of a source, each with its place for error messages, and the test whether an id belongs to the split.

    A file is cut by `split_of(id)`. The hub has splits of its own; only where none is for validation, `validation` is
    the share of its train that `split_of` says, and `train` the rest.
    """
    if source.kind == "path":
        return read_jsonl(str(source.path)), lambda id: split_of(id) == source.split
    if source.kind == "hub":
        return read_hub(str(source.hub_id), source.split)
    raise UserError(
        f"data.source={source.kind} has no rows of this task: use data.source=path or hub"
    )


def load_rows(source: Source, read: Callable[[Row, str], Candidate]) -> Loaded:
    """The examples of a split. `read` raises UserError on a malformed row, in whichever split it stands.

    A question that stood before is dropped, whatever its split; an id that stood before with another question is an
    error. `num` takes those with the smallest hash of seed and id: a random sample, not the head of the file.
    """
    rows, belongs = rows_of(source)
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    places: dict[str, str] = {}
    questions: set[str] = set()
    for place, row in rows:
        try:
            example, question, reason = read(row, place)
        except (AttributeError, TypeError, ValueError, LookupError) as error:
            raise UserError(
                f"{place} has another form than this task's rows ({one_line(error)}): mend or remove the row"
            ) from None
        key = " ".join(question.casefold().split())
        if key in questions:
            reason = "duplicate question"
        elif example.id in places:
            raise UserError(
                f"{place}: the id {example.id!r} is also that of {places[example.id]}: ids must differ"
            )
        questions.add(key)
        places[example.id] = place
        if not belongs(example.id):
            continue
        if reason:
            dropped[reason] += 1
        else:
            examples.append(example)
    if not examples:
        origin = source.path if source.kind == "path" else source.hub_id
        why = (
            ", ".join(f"{number} {reason}" for reason, number in dropped.items())
            or "none of them falls into it"
        )
        raise UserError(
            f"{origin}: split {source.split!r} is empty ({len(places)} rows; {why}): use another split or file"
        )
    if source.num is not None and source.num < len(examples):
        examples.sort(key=lambda example: stable_hash(f"{source.seed} {example.id}"))
        del examples[source.num :]
    return Loaded(examples, dropped)


def chance_line(num_answers: int, num_options: int) -> str:
    """What guessing is worth: of n options shown, K different ones hold the right one with chance K/n."""
    coverage, top1 = min(1.0, num_answers / num_options), 1 / num_options
    return f"chance, {num_options} options shown: coverage@{num_answers} {coverage:.3f}, top-1 {top1:.3f}"

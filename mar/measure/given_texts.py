"""Texts that were written elsewhere, measured like our own: rows of {id, text}."""

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mar.answers.grammar import Grammar
from mar.errors import UserError
from mar.files import NUM_NAMED_LINES, read_jsonl, skipped_lines
from mar.measure.answer_sets import Item, item_of_texts
from mar.records import Prompt
from mar.verify.verifiers import WordChecker

ROWS = "it takes one JSON object a line"


def items_of_file(
    file: Path,
    prompts: Sequence[Prompt],
    grammar: Grammar,
    verifier: WordChecker,
    tokenizer: Any,
    task: str,
    say: Callable[[str], None],
) -> list[Item]:
    """The items of all prompts that the file has texts for.

    Several rows of one id are several sets; every item keeps as many as the one with the fewest. A
    row may give its `num_tokens`, else the tokens of its text and one stop token are counted, as
    those of our own completions are. `say` hears what is left out. Raises UserError for a file that
    does not fit the questions.
    """
    example = prompts[0].id
    rows, broken = read_jsonl(file)
    if broken:
        say(skipped_lines(broken))
    if not rows:
        raise UserError(f"{file} holds no rows: {ROWS}, {_row_like(example)}")
    texts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        texts[str(row.get("id"))].append(row)
    incomplete = [row for row in rows if not _is_complete(row)]
    if incomplete:
        where = _lines_of(file, incomplete)
        raise UserError(f"{where} without the keys id and text: {ROWS}, {_row_like(example)}")
    answered = [prompt for prompt in prompts if prompt.id in texts]
    if not answered:
        raise UserError(f"no id of {file} is a question of {task}: ids look like {example}")
    asked = {prompt.id for prompt in prompts}
    unknown = [row for row in rows if str(row["id"]) not in asked]
    if unknown:
        say(f"{_lines_of(file, unknown)} with ids that are not asked for: left out")
    num_sets = min(len(texts[prompt.id]) for prompt in answered)
    say(
        f"{file}: {num_sets * len(answered)} of {len(rows)} texts: "
        f"{num_sets} for each of {len(answered)} of {len(prompts)} questions"
    )
    items = []
    for prompt in answered:
        kept = texts[prompt.id][:num_sets]
        counted = [(row["text"], _num_tokens(row, tokenizer)) for row in kept]
        items.append(item_of_texts(prompt, counted, grammar, verifier))
    return items


def _row_like(example: str) -> str:
    return json.dumps({"id": example, "text": "..."})


def _lines_of(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """`file:3, file:7, ... (12 rows)` of rows that were read from it."""
    wanted = {json.dumps(row) for row in rows}
    numbers = []
    text = file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):
        with contextlib.suppress(ValueError):
            if line.strip() and json.dumps(json.loads(line)) in wanted:
                numbers.append(number)
    named = ", ".join(f"{file}:{number}" for number in numbers[:NUM_NAMED_LINES])
    more = ", ..." if len(numbers) > NUM_NAMED_LINES else ""
    return f"{named}{more} ({len(rows)} of the rows)"


def _is_complete(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("text"), str) and "id" in row


def _num_tokens(row: Mapping[str, Any], tokenizer: Any) -> int:
    given = row.get("num_tokens")
    if type(given) is int and given > 0:
        return given
    if given is not None:
        raise UserError(
            f"the text of {row['id']!r} has num_tokens={given!r}: give a whole number above 0, or "
            "leave the key out"
        )
    ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
    return len(ids) + 1  # the stop token, which the text does not show

"""Texts that were written elsewhere, measured like our own: rows of {id, text}."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mar.answers.grammar import Grammar
from mar.errors import UserError
from mar.files import read_jsonl, skipped_lines
from mar.measure.answer_sets import Item, item_of_texts
from mar.records import Prompt
from mar.verify.verifiers import WordChecker


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
    row may give its `num_tokens`, else its text is tokenised. `say` hears what is left out. Raises
    UserError for a file that does not fit the questions.
    """
    rows, broken = read_jsonl(file)
    if broken:
        say(skipped_lines(broken))
    if not rows or not all(_is_complete(row) for row in rows):
        raise UserError(
            f"{file} needs the keys id and text in every row: "
            f"id is that of the question, e.g. {prompts[0].id}"
        )
    texts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        texts[str(row["id"])].append(row)
    answered = [prompt for prompt in prompts if prompt.id in texts]
    if not answered:
        raise UserError(f"no id of {file} is a question of {task}: ids look like {prompts[0].id}")
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


def _is_complete(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("text"), str) and "id" in row


def _num_tokens(row: Mapping[str, Any], tokenizer: Any) -> int:
    given = row.get("num_tokens")
    return given if isinstance(given, int) else len(tokenizer.tokenize(row["text"]))

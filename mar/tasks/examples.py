"""Examples that are read from their rows when they are asked for, and what is known of all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from mar.answers.tokenizer import most_tokens
from mar.errors import UserError
from mar.records import Example
from mar.tasks.rows import Row, Rows


@dataclass(frozen=True)
class LazyExamples(Sequence[Example]):
    """The examples of some rows, in this order. None of them is kept."""

    rows: Rows
    read: Callable[[Row, str], Example]
    numbers: np.ndarray  # [n] int64: which rows
    id_hashes: np.ndarray  # [n] int64: `hash` of the ids, which differs between processes
    truths: frozenset[str]  # those that occur
    question_tokens: np.ndarray  # [n] int64: `most_tokens` of each question
    change: Callable[[Example], Example] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._example(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._example(index)

    def _example(self, index: int) -> Example:
        number = int(self.numbers[index])
        try:
            example = self.read(self.rows.again(number), f"row {number + 1}")
            unchanged = hash(example.id) == self.id_hashes[index]
        except UserError:
            unchanged = False
        if not unchanged:
            raise UserError(
                f"{self.rows.name} was changed while it was in use (row {number + 1} is another "
                "one now): give the same command again"
            )
        return self.change(example) if self.change else example

    def changed(self, change: Callable[[Example], Example]) -> "LazyExamples":
        """The same examples, each changed in something but its question and its truth."""
        return replace(self, change=change)


def truths_of(examples: Sequence[Example]) -> set[str]:
    """The kinds of truth that occur among examples."""
    if isinstance(examples, LazyExamples):
        return set(examples.truths)
    return {example.truth for example in examples}


def tokens_of_questions(examples: Sequence[Example]) -> np.ndarray:
    """[n] the most tokens that each question can have, whatever the tokenizer."""
    if isinstance(examples, LazyExamples):
        return examples.question_tokens
    return np.array([most_tokens(example.question) for example in examples], dtype=np.int64)

"""The prompts of many examples, made when they are asked for.

A prompt over the limit is dropped, and the order in which the others are asked depends on how many
are left. So their lengths must be known, but hardly ever by making them: a text has no more tokens
than bytes (`tokenizer.most_tokens`), and most are far from the limit. Only those that could be over
it are made at once.
"""

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from mar.errors import UserError
from mar.records import Example, Prompt

# Prompts that were made to know their length are kept, but not without end (about 7 kB each).
MOST_KEPT = 1 << 15


class PromptTable(Sequence[Prompt]):
    """The prompts of `examples` with at most `limit` tokens, in order.

    `make` turns an example into its prompt. `most_tokens` [n] are bounds on the lengths, and `known`
    is a length (at most `limit`) up to which nothing depends on how long a prompt is exactly:
    prompts that are bounded by it are not made here.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        make: Callable[[Example], Prompt],
        most_tokens: np.ndarray,
        limit: int,
        known: int,
        most_kept: int = MOST_KEPT,
    ) -> None:
        self.examples = examples
        self.make = make
        self.limit = limit
        self.kept: dict[int, Prompt] = {}
        # in tokens: the longest prompt, and the longest that is not dropped, of those made here
        self.longest = 0
        self.longest_asked = 0
        dropped = []
        for index in np.flatnonzero(most_tokens > known).tolist():
            prompt = make(examples[index])
            length = len(prompt.ids)
            self.longest = max(self.longest, length)
            if length > limit:
                dropped.append(index)
                continue
            self.longest_asked = max(self.longest_asked, length)
            if len(self.kept) < most_kept:
                self.kept[index] = prompt
        self.num_dropped = len(dropped)
        # [n - num_dropped] which examples are asked
        self.indices = np.delete(np.arange(len(examples)), dropped)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...

    @overload
    def __getitem__(self, place: slice) -> list[Prompt]: ...

    def __getitem__(self, place: int | slice) -> Prompt | list[Prompt]:
        if isinstance(place, slice):
            return [self._prompt(index) for index in self.indices[place].tolist()]
        return self._prompt(int(self.indices[place]))

    def _prompt(self, index: int) -> Prompt:
        if index in self.kept:
            return self.kept[index]
        prompt = self.make(self.examples[index])
        if len(prompt.ids) > self.limit:
            raise UserError(
                f"the tokenizer makes {len(prompt.ids)} tokens of {prompt.id}, more than its text "
                f"has bytes, and model.max_prompt_tokens is {self.limit}: raise it"
            )
        return prompt

"""The layout of the tokens: groups of completions packed without padding, and the token shift.

Each prompt stands once, before all completions of its group. `attention.py` computes over it.

Letters: N packed tokens, M trained tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

Tokens = Sequence[int]
Item = TypeVar("Item")


class PromptSpan(NamedTuple):
    """The packed tokens of one prompt."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class RowSpan(NamedTuple):
    """The packed tokens of one row: a completion without its last token, so it may be empty.

    `prompt` is the index of its prompt.
    """

    start: int
    length: int
    prompt: int

    @property
    def end(self) -> int:
        return self.start + self.length


Span = PromptSpan | RowSpan


@dataclass(frozen=True)
class PackedGroups:
    """N input tokens of whole groups, without padding, and the M completion tokens they predict.

    One group with the prompt `a b c` and the completions `x y z`, `u v` and `w`:

                      prompt   row 0  row 1 row 2
        ids          [a  b  c] [x  y] [u]   []     without the last token of each completion
        positions     0  1  2   3  4   3           each row continues its prompt
        index         0  1  2   3  4   5           (of the line; the next group starts at 6)

                      row 0     row 1   row 2
        targets       x  y  z   u  v    w          every token of each completion
        predict_from  2  3  4   2  5    2          index of the hidden state that predicts it

    `predict_from` is the token shift: a completion's first token is predicted from the last token
    of its prompt, each other token from the one before it. A completion's last token predicts
    nothing, so it is a target but not an input.
    """

    ids: Int64[Tensor, " n"]
    positions: Int64[Tensor, " n"]
    prompts: tuple[PromptSpan, ...]
    rows: tuple[RowSpan, ...]
    predict_from: Int64[Tensor, " m"]
    targets: Int64[Tensor, " m"]


def pack_groups(
    prompts: Sequence[Tokens],
    completions: Sequence[Sequence[Tokens]],
    device: torch.device | str = "cpu",
) -> PackedGroups:
    """Lay out the token ids of each prompt and of its completions as `PackedGroups` draws it.

    No prompt and no completion may be empty (ValueError); a prompt may have no completions.
    """
    ids: list[int] = []
    positions: list[int] = []
    predict_from: list[int] = []
    targets: list[int] = []
    prompt_spans: list[PromptSpan] = []
    row_spans: list[RowSpan] = []

    for index, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        if min(len(tokens) for tokens in (prompt, *group)) == 0:
            raise ValueError(f"group {index} has an empty prompt or an empty completion")
        prompt_spans.append(PromptSpan(len(ids), len(prompt)))
        ids.extend(prompt)
        positions.extend(range(len(prompt)))
        last_of_prompt = len(ids) - 1

        for completion in group:
            row = RowSpan(start=len(ids), length=len(completion) - 1, prompt=index)
            row_spans.append(row)
            ids.extend(completion[:-1])
            positions.extend(range(len(prompt), len(prompt) + row.length))
            # the token shift, once and for all
            predict_from.append(last_of_prompt)
            predict_from.extend(range(row.start, row.end))
            targets.extend(completion)

    integers = partial(torch.tensor, dtype=torch.int64, device=device)
    return PackedGroups(
        ids=integers(ids),
        positions=integers(positions),
        prompts=tuple(prompt_spans),
        rows=tuple(row_spans),
        predict_from=integers(predict_from),
        targets=integers(targets),
    )


def chunks(items: Sequence[Item], sizes: Sequence[int], max_size: int) -> list[list[Item]]:
    """Cut into runs of consecutive items whose sizes add up to at most `max_size`.

    An item larger than that is a run of its own.
    """
    out: list[list[Item]] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if not out or total + size > max_size:
            out.append([])
            total = 0
        out[-1].append(item)
        total += size
    return out

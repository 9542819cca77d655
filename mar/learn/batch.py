"""Rollouts to the tensors of one optimizer step, and that step cut into micro-batches.

Tokens are shifted once, in `pack_groups` (policy/packing.py); denominators are counted once, over
the whole step.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mar.policy.packing import PackedGroups, chunks, pack_groups
from mar.records import Rollout

Rollouts = Sequence[Rollout]


@dataclass(frozen=True)
class Batch:
    """One step: B rows of all groups, T tokens of the longest completion, C components, S segments.

    `first_open[b, s]` is the first reward component that a token of segment s can still change
    (rewards.py).
    """

    groups: tuple[tuple[Rollout, ...], ...]
    group_ids: Tensor  # [B]
    components: Tensor  # [B, C] float64, weighted
    terms: Tensor  # [B, terms, C] float64: the components of each term, per unit of its weight
    term_weights: Tensor  # [B, terms] float64
    first_open: Tensor  # [B, S]
    confidence_components: Tensor  # [B, C] bool: decided where a confidence closes
    confidence_segments: Tensor  # [B, S] bool: writes a confidence, or thinks about them
    segment_ids: Tensor  # [B, T]
    completion_mask: Tensor  # [B, T] bool
    loss_mask: Tensor  # [B, T] bool: drawn tokens only, without those that the sampler put in
    sampler_logprobs: Tensor  # [B, T] of the distribution that was drawn from
    full_logprobs: Tensor  # [B, T] of temperature alone
    # [B, T] float64: what single tokens cost beside the components (k1 in the reward), 0 outside
    # loss_mask; None: nothing
    token_costs: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.completion_mask.sum())

    @property
    def totals(self) -> Tensor:
        """What each completion earned [B], less what its tokens cost."""
        earned = self.components.sum(1)
        if self.token_costs is None:
            return earned
        return earned - self.token_costs.sum(1)

    def take(self, chosen: Sequence[int]) -> tuple["Batch", Tensor]:
        """The batch of some of its groups, in this order, and which rows they are [b]."""
        ends = np.cumsum([len(group) for group in self.groups])
        rows: list[int] = []
        for i in chosen:
            rows += range(ends[i] - len(self.groups[i]), ends[i])
        index = torch.tensor(rows, device=self.group_ids.device)
        tensors = {}
        for field in fields(self):
            column = getattr(self, field.name)
            if isinstance(column, Tensor):
                tensors[field.name] = column[index]
        groups = tuple(self.groups[i] for i in chosen)
        return replace(self, groups=groups, **tensors), index


def make_batch(
    groups: Sequence[Rollouts],
    first_open: np.ndarray,
    device: torch.device | str = "cpu",
    of_confidence: tuple[np.ndarray, np.ndarray] | None = None,
) -> Batch:
    """The tensors of a step; what is per token is padded to [B, T].

    first_open [S] and of_confidence [C], [S] are those of the grammar and the reward (`Scorer`).
    Without the latter no component and no segment is of a confidence.
    """
    rows = [rollout for group in groups for rollout in group]
    if of_confidence is None:
        num_components = len(rows[0].components)
        of_confidence = (np.zeros(num_components, np.bool_), np.zeros(len(first_open), np.bool_))
    completions = [rollout.completion for rollout in rows]
    lengths = torch.tensor([len(completion.ids) for completion in completions])
    positions = torch.arange(int(lengths.max()))
    completion_mask = positions < lengths[:, None]
    inserted = torch.tensor([completion.inserted for completion in completions])
    start, end = inserted[:, :1], inserted[:, 1:]
    put_in_by_sampler = (positions >= start) & (positions < end)
    group_sizes = torch.tensor([len(group) for group in groups])

    def padded(columns: list[np.ndarray]) -> Tensor:
        tensors = [torch.from_numpy(np.ascontiguousarray(column)) for column in columns]
        return pad_sequence(tensors, batch_first=True).to(device)

    def in_each_row(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).expand(len(rows), -1).to(device)

    return Batch(
        groups=tuple(tuple(group) for group in groups),
        group_ids=torch.repeat_interleave(torch.arange(len(groups)), group_sizes).to(device),
        components=torch.from_numpy(np.stack([r.components for r in rows])).to(device),
        terms=torch.from_numpy(np.stack([r.terms for r in rows])).to(device),
        term_weights=torch.from_numpy(np.stack([r.term_weights for r in rows])).to(device),
        first_open=in_each_row(first_open),
        confidence_components=in_each_row(of_confidence[0]),
        confidence_segments=in_each_row(of_confidence[1]),
        segment_ids=padded([rollout.segment_ids for rollout in rows]),
        completion_mask=completion_mask.to(device),
        loss_mask=(completion_mask & ~put_in_by_sampler).to(device),
        sampler_logprobs=padded([completion.sampler_logprobs for completion in completions]),
        full_logprobs=padded([completion.full_logprobs for completion in completions]),
    )


@dataclass(frozen=True)
class MicroBatch:
    """Some whole groups, or a slice of one: packed tokens for the model, and their batch rows."""

    packed: PackedGroups
    rows: slice

    def flat(self, column: Tensor, mask: Tensor) -> Tensor:
        """The completion tokens of a [B, T] column, in the order of the model's output [M]."""
        return column[self.rows][mask[self.rows]]


def micro_batches(batch: Batch, max_tokens: int, ranks: int = 1) -> Iterator[MicroBatch]:
    """The groups in order, as many at a time as fit `max_tokens` computed positions; at least one.

    A group that does not fit is cut into slices, each with the prompt. For several ranks there are
    as many micro-batches for each, and the largest is as small as that allows.
    """
    pieces = _pieces(batch.groups, max_tokens)
    sizes = [_num_positions(piece) for piece in pieces]
    if ranks > 1:
        max_tokens = _smallest_limit(pieces, sizes, max_tokens, ranks)
    row = 0
    for chosen in chunks(pieces, sizes, max_tokens):
        prompts = [piece[0].prompt.ids.tolist() for piece in chosen]
        completions = []
        for piece in chosen:
            completions.append([rollout.completion.ids.tolist() for rollout in piece])
        num_rows = sum(len(piece) for piece in chosen)
        packed = pack_groups(prompts, completions, batch.group_ids.device)
        yield MicroBatch(packed, slice(row, row + num_rows))
        row += num_rows


def _pieces(groups: Sequence[Rollouts], max_tokens: int) -> list[Rollouts]:
    """Whole groups, or slices of a group that does not fit."""
    pieces: list[Rollouts] = []
    for group in groups:
        lengths = [len(rollout.completion.ids) for rollout in group]
        room = max_tokens - len(group[0].prompt.ids)
        pieces += chunks(group, lengths, room)
    return pieces


def _num_positions(piece: Rollouts) -> int:
    """Computed positions: the prompt once, and every completion."""
    return len(piece[0].prompt.ids) + sum(len(rollout.completion.ids) for rollout in piece)


def _smallest_limit(
    pieces: Sequence[Rollouts], sizes: Sequence[int], max_tokens: int, ranks: int
) -> int:
    """The smallest limit that needs no more rounds of `ranks` micro-batches than `max_tokens`."""
    rounds = -(-len(chunks(pieces, sizes, max_tokens)) // ranks)

    def fits(limit: int) -> bool:
        return len(chunks(pieces, sizes, limit)) <= rounds * ranks

    return bisect_left(range(max_tokens), True, key=fits)

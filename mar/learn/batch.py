"""Rollouts to the tensors of one optimizer step, and that step cut into micro-batches of whole groups.

Tokens are shifted once, in `pack_groups`; denominators are counted once, here, over the whole step.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from mar.policy.attention import PackedGroups, chunks, pack_groups
from mar.records import Rollout


@dataclass(frozen=True)
class Batch:
    """One step: B = all rows of all groups, T = the longest completion, C components, S segments."""

    groups: tuple[tuple[Rollout, ...], ...]
    group_ids: Tensor  # [B]
    components: Tensor  # [B, C] float64, weighted
    first_open: Tensor  # [B, S]
    segment_ids: Tensor  # [B, T]
    completion_mask: Tensor  # [B, T] bool
    loss_mask: Tensor  # [B, T] bool: drawn tokens only, without those that the sampler put in
    sampler_logprobs: Tensor  # [B, T]
    full_logprobs: Tensor  # [B, T]

    @property
    def num_tokens(self) -> int:
        return int(self.completion_mask.sum())

    @property
    def totals(self) -> Tensor:
        """Reward of each completion [B]."""
        return self.components.sum(1)

    def take(self, chosen: Sequence[int]) -> tuple["Batch", Tensor]:
        """The batch of some of its groups, in this order, and which rows they are [b]."""
        ends = np.cumsum([len(group) for group in self.groups])
        rows = [row for i in chosen for row in range(ends[i] - len(self.groups[i]), ends[i])]
        index = torch.tensor(rows, device=self.group_ids.device)
        tensors = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "groups"}
        return replace(self, groups=tuple(self.groups[i] for i in chosen), **tensors), index


def make_batch(
    groups: Sequence[Sequence[Rollout]], first_open: np.ndarray, device: torch.device | str = "cpu"
) -> Batch:
    """Pad the per-token columns of all rollouts to [B, T]; `first_open` [S] is the grammar's (rewards.first_open)."""
    rows = [rollout for group in groups for rollout in group]
    lengths = torch.tensor([len(r.completion.ids) for r in rows])
    positions = torch.arange(int(lengths.max()))
    mask = positions < lengths[:, None]
    start, end = torch.tensor([r.completion.inserted for r in rows]).T[..., None]

    def padded(columns: list[np.ndarray]) -> Tensor:
        tensors = [torch.from_numpy(np.ascontiguousarray(c)) for c in columns]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)

    return Batch(
        groups=tuple(tuple(group) for group in groups),
        group_ids=torch.repeat_interleave(
            torch.arange(len(groups)), torch.tensor([len(g) for g in groups])
        ).to(device),
        components=torch.from_numpy(np.stack([r.components for r in rows])).to(device),
        first_open=torch.from_numpy(first_open).expand(len(rows), -1).to(device),
        segment_ids=padded([r.segment_ids for r in rows]),
        completion_mask=mask.to(device),
        loss_mask=(mask & ~((positions >= start) & (positions < end))).to(device),
        sampler_logprobs=padded([r.completion.sampler_logprobs for r in rows]),
        full_logprobs=padded([r.completion.full_logprobs for r in rows]),
    )


@dataclass(frozen=True)
class MicroBatch:
    """Some whole groups: packed tokens for the model, and which rows of the batch they are."""

    packed: PackedGroups
    rows: slice

    def flat(self, column: Tensor, mask: Tensor) -> Tensor:
        """The completion tokens of a [B, T] column in the order of the model's output [M]."""
        return column[self.rows][mask[self.rows]]


def micro_batches(batch: Batch, max_tokens: int, ranks: int = 1) -> Iterator[MicroBatch]:
    """Groups in order, as many at a time as fit `max_tokens` computed positions (at least one), or slices of a group that does not fit. For several
    ranks as many for each, and the largest as small as that allows."""
    pieces: list[Sequence[Rollout]] = []
    for group in batch.groups:
        pieces += chunks(
            group, [len(r.completion.ids) for r in group], max_tokens - len(group[0].prompt.ids)
        )
    row, sizes = 0, [len(p[0].prompt.ids) + sum(len(r.completion.ids) for r in p) for p in pieces]
    if ranks > 1:
        most = -(-len(chunks(pieces, sizes, max_tokens)) // ranks) * ranks
        max_tokens = bisect_left(
            range(max_tokens), True, key=lambda limit: len(chunks(pieces, sizes, limit)) <= most
        )
    for chosen in chunks(pieces, sizes, max_tokens):
        completions = [[r.completion.ids.tolist() for r in p] for p in chosen]
        packed = pack_groups([p[0].prompt.ids for p in chosen], completions, batch.group_ids.device)
        count = sum(len(p) for p in chosen)
        yield MicroBatch(packed, slice(row, row + count))
        row += count

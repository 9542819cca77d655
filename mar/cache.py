"""Key/value memory of the sampler: each prompt's once per group, each row's own beside it, and decode attention over both."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mar.model import ModelConfig


@dataclass
class KVCache:
    """Shapes: prompt_* [L, groups, Hkv, P, D], own_* [L, rows, Hkv, R, D]; `prompt_lengths` [groups]; `row_group` [rows].

    The G rows of a group read the same prompt entries; they are never copied per row.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    own_keys: Tensor
    own_values: Tensor
    prompt_lengths: Tensor
    row_group: Tensor

    @classmethod
    def allocate(
        cls, config: ModelConfig, prompt_lengths: list[int], rows_per_group: list[int], max_tokens: int, like: Tensor
    ) -> "KVCache":
        """Room for these prompts and `max_tokens` of every row, in the dtype and on the device of `like`."""

        def empty(count: int, tokens: int) -> Tensor:
            return like.new_zeros(config.num_layers, count, config.num_kv_heads, tokens, config.head_dim)

        groups, rows, longest = len(prompt_lengths), sum(rows_per_group), max(prompt_lengths)
        row_group = torch.repeat_interleave(torch.arange(groups), torch.tensor(rows_per_group)).to(like.device)
        lengths = torch.tensor(prompt_lengths, device=like.device)
        return cls(
            empty(groups, longest),
            empty(groups, longest),
            empty(rows, max_tokens),
            empty(rows, max_tokens),
            lengths,
            row_group,
        )

    def prefill_attend(self, prompts: list[tuple[int, int]]):  # type: ignore[no-untyped-def]
        """An `attend` for `Decoder.hidden` over packed prompts ((start, length) each) that also fills the prompt cache."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)
            for group, (start, length) in enumerate(prompts):
                own = slice(start, start + length)
                keys, values = (rearrange(x[own], "t h d -> 1 h t d") for x in (k, v))
                self.prompt_keys[layer, group, :, :length] = keys[0]
                self.prompt_values[layer, group, :, :length] = values[0]
                queries = rearrange(q[own], "t h d -> 1 h t d")
                mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
                out[own] = rearrange(mixed, "1 h t d -> t h d")
            return out

        return attend

    def decode_attend(self, step: int):  # type: ignore[no-untyped-def]
        """An `attend` for one new token per row, the row's token number `step`: one product per group over its prompt, one per row over its
        own tokens, joined by their log-sum-exps."""
        members, place = _members(self.row_group, len(self.prompt_lengths))
        positions = torch.arange(self.prompt_keys.shape[3], device=self.prompt_lengths.device)
        padding = (positions >= self.prompt_lengths[:, None])[:, None, None, :]  # [groups, 1, 1, P]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kv_heads = k.shape[1]
            q = rearrange(q, "b (h r) d -> b h r d", h=kv_heads) * q.shape[-1] ** -0.5
            self.own_keys[layer, :, :, step] = k
            self.own_values[layer, :, :, step] = v
            scores = q @ self.own_keys[layer, :, :, : step + 1].mT  # [B, Hkv, r, t]
            own_lse = scores.logsumexp(-1, keepdim=True)
            own = (scores - own_lse).exp() @ self.own_values[layer, :, :, : step + 1]

            grouped = rearrange(q[members], "g m h r d -> g h (m r) d")
            scores = (grouped @ self.prompt_keys[layer].mT).masked_fill(padding, -torch.inf)  # [groups, Hkv, m r, P]
            lse = scores.logsumexp(-1, keepdim=True)
            shared = (scores - lse).exp() @ self.prompt_values[layer]
            shared, lse = (rearrange(x, "g h (m r) d -> (g m) h r d", m=members.shape[1])[place] for x in (shared, lse))
            share = torch.sigmoid(lse - own_lse)  # the prompt's part of the softmax mass
            return rearrange(own + share * (shared - own), "b h r d -> b (h r) d")

        return attend

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these [n], and the prompts that no row reads any more."""
        groups, self.row_group = torch.unique(self.row_group[rows], return_inverse=True)
        self.own_keys, self.own_values = self.own_keys[:, rows], self.own_values[:, rows]
        if len(groups) < len(self.prompt_lengths):
            self.prompt_keys, self.prompt_values = self.prompt_keys[:, groups], self.prompt_values[:, groups]
            self.prompt_lengths = self.prompt_lengths[groups]


def _members(row_group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The rows of each group [groups, M] (padded with row 0) and each row's place in that table, flattened [rows]. Rows are in group order."""
    counts = torch.bincount(row_group, minlength=num_groups)
    within = torch.arange(len(row_group), device=row_group.device) - (counts.cumsum(0) - counts)[row_group]
    width = int(counts.max())
    members = torch.zeros(num_groups, width, dtype=torch.int64, device=row_group.device)
    members[row_group, within] = torch.arange(len(row_group), device=row_group.device)
    return members, row_group * width + within

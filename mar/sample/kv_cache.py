"""Key/value memory of the sampler, in fixed slots: each prompt's once, each row's own beside it, and decode attention over both."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mar.errors import UserError
from mar.policy.attention import cpu_attention
from mar.policy.model import ModelConfig


def capacity(
    prompt_lengths: Sequence[int],
    group_sizes: Sequence[int],
    max_tokens: int,
    kv_budget_tokens: int,
) -> tuple[int, int]:
    """(prompt slots, row slots) within the budget; a prompt slot is as long as the longest prompt.

    Beside the prompts whose rows fill the row slots there is room for as many again, of which only slow rows are left. Raises UserError where
    the largest group with the longest prompt does not fit.
    """
    num_prompts, longest, largest = len(prompt_lengths), max(prompt_lengths), max(group_sizes)
    if (need := longest + largest * max_tokens) > kv_budget_tokens:
        raise UserError(
            f"one group needs {need} tokens of KV memory (prompt {longest} + {largest} x {max_tokens}): raise "
            f"scale.kv_budget_tokens from {kv_budget_tokens}, or lower algo.group_size or model.max_completion_tokens"
        )

    def prompts_for(rows: int) -> int:
        return min(num_prompts, rows, 2 * -(-rows // largest) + 1)

    rows = sum(group_sizes)
    if num_prompts * longest + rows * max_tokens > kv_budget_tokens:
        rows = min(rows, kv_budget_tokens // max_tokens)
        while rows > largest and prompts_for(rows) * longest + rows * max_tokens > kv_budget_tokens:
            rows -= 1
    return min(num_prompts, rows, (kv_budget_tokens - rows * max_tokens) // longest), rows


@dataclass
class KVCache:
    """Q prompt slots of P tokens and S row slots of R tokens. The rows of a group read the same prompt entries; they are never copied per row.

    All of it is allocated once; rows and prompts come and go in their slots.
    """

    prompt_keys: Tensor  # [L, Q, Hkv, P, D]
    prompt_values: Tensor
    own_keys: Tensor  # [L, S, Hkv, R, D]
    own_values: Tensor
    prompt_lengths: Tensor  # [Q]
    own_lengths: Tensor  # [S] tokens of its own that a row has read
    row_prompt: Tensor  # [S] the prompt slot that a row reads
    members: Tensor  # [Q, M] the rows that read each prompt, padded with row 0
    place: Tensor  # [S] where a row stands in its line of `members`

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_prompts: int,
        prompt_tokens: int,
        num_rows: int,
        row_tokens: int,
        like: Tensor,
    ) -> "KVCache":
        """Empty slots, in the dtype and on the device of `like`."""

        def empty(count: int, tokens: int) -> Tensor:
            return like.new_zeros(
                config.num_layers, count, config.num_kv_heads, tokens, config.head_dim
            )

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=like.device)

        return cls(
            prompt_keys=empty(num_prompts, prompt_tokens),
            prompt_values=empty(num_prompts, prompt_tokens),
            own_keys=empty(num_rows, row_tokens),
            own_values=empty(num_rows, row_tokens),
            prompt_lengths=integers(num_prompts),
            own_lengths=integers(num_rows),
            row_prompt=integers(num_rows),
            members=integers(num_prompts, 1),
            place=integers(num_rows),
        )

    @property
    def num_bytes(self) -> int:
        """What the keys and values take."""
        tensors = (self.prompt_keys, self.prompt_values, self.own_keys, self.own_values)
        return sum(x.numel() * x.element_size() for x in tensors)

    def prefill_attend(self, prompts: Sequence[tuple[int, int, int]]):  # type: ignore[no-untyped-def]
        """An `attend` for `Decoder.hidden` over packed prompts, each (start, length, slot), that also fills their slots."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)
            for start, length, slot in prompts:
                own = slice(start, start + length)
                keys, values = (rearrange(x[own], "t h d -> 1 h t d") for x in (k, v))
                self.prompt_keys[layer, slot, :, :length] = keys[0]
                self.prompt_values[layer, slot, :, :length] = values[0]
                queries = rearrange(q[own], "t h d -> 1 h t d")
                mixed = F.scaled_dot_product_attention(
                    queries, keys, values, is_causal=True, enable_gqa=True
                )
                out[own] = rearrange(mixed, "1 h t d -> t h d")
            return out

        return attend

    def decode_attend(self, width: int):  # type: ignore[no-untyped-def]
        """An `attend` for one new token per row, at its `own_lengths`, all below `width`: one product per prompt over its slot, one per row
        over its own tokens, joined by their log-sum-exps."""
        device, rows = (
            self.own_lengths.device,
            torch.arange(len(self.own_lengths), device=self.own_lengths.device),
        )
        positions = torch.arange(max(width, self.prompt_keys.shape[3]), device=device)

        def hide(
            ends: Tensor, count: int
        ) -> Tensor:  # [len(ends), 1, 1, count]: 0, and -inf from `ends` on
            return torch.where(positions[:count] < ends[:, None], 0.0, -torch.inf).to(
                self.own_keys
            )[:, None, None]

        mix = _mix_cpu if device.type == "cpu" else _mix
        unread, padding = (
            hide(self.own_lengths + 1, width),
            hide(self.prompt_lengths, self.prompt_keys.shape[3]),
        )

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = rearrange(q, "s (h r) d -> s h r d", h=k.shape[1])
            own_keys, own_values = self.own_keys[layer], self.own_values[layer]
            own_keys[rows, :, self.own_lengths], own_values[rows, :, self.own_lengths] = k, v
            own, own_lse = mix(q, own_keys[:, :, :width], own_values[:, :, :width], unread)
            grouped = rearrange(
                q.transpose(0, 1)[:, self.members], "h g m r d -> g h (m r) d"
            )  # one gather, no copy
            parts = mix(grouped, self.prompt_keys[layer], self.prompt_values[layer], padding)
            split = "g h (m r) d -> g m h r d"
            shared, lse = (
                rearrange(x, split, m=self.members.shape[1])[self.row_prompt, self.place]
                for x in parts
            )
            share = torch.sigmoid(lse - own_lse)  # the prompt's part of the softmax mass
            return rearrange(own + share * (shared - own), "s h r d -> s (h r) d").to(q.dtype)

        return attend

    def assign(self, row_prompt: Sequence[int], most: int) -> None:
        """Say which prompt slot each row reads (-1: the row is free); at most `most` rows read one prompt."""
        members: list[list[int]] = [[] for _ in range(self.members.shape[0])]
        place = [0] * len(row_prompt)
        for row, slot in enumerate(row_prompt):
            if slot >= 0:
                place[row] = len(members[slot])
                members[slot].append(row)
        table = [rows + [0] * (most - len(rows)) for rows in members]
        for name, line in {
            "members": table,
            "place": place,
            "row_prompt": [max(slot, 0) for slot in row_prompt],
        }.items():
            old, new = getattr(self, name), torch.tensor(line, device=self.own_lengths.device)
            setattr(
                self, name, old.copy_(new) if old.shape == new.shape else new
            )  # a CUDA graph reads the address

    def keep(self, rows: Tensor, prompts: Tensor) -> None:
        """Drop all row slots and prompt slots but these, in ascending order; `assign` follows. The memory is not given back, and none is asked
        for: entries move to the front layer by layer."""
        for name, chosen in (("own", rows), ("prompt", prompts)):
            for kind in ("keys", "values"):
                whole = getattr(self, f"{name}_{kind}")
                for layer in whole:
                    layer[: len(chosen)] = layer[chosen]
                setattr(self, f"{name}_{kind}", whole[:, : len(chosen)])
        self.own_lengths, self.prompt_lengths = self.own_lengths[rows], self.prompt_lengths[prompts]
        self.members = self.members[prompts]


def _mix_cpu(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`_mix` in one operator."""
    mixed, lse = cpu_attention(q, keys, values, False, bias)
    return mixed, lse[..., None]


def _mix(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, M, D] over N entries with `bias` [B, 1, 1, N] on their scores, and its log-sum-exp [B, H, M, 1] in float32 or wider."""
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = ((q @ keys.mT).to(precise) * q.shape[-1] ** -0.5).add_(bias)
    lse = scores.logsumexp(-1, keepdim=True)
    return (scores.sub_(lse).exp_().to(q.dtype) @ values).to(precise), lse

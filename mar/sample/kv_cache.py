"""Key/value memory of the sampler, and decode attention over it.

Prompts and rows live in fixed slots: each prompt's keys and values are kept once, each row's own
beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import mar_kernels
from mar.errors import UserError
from mar.policy.attention import Attend, cpu_attention
from mar.policy.model import ModelConfig, precise_product


def capacity(
    prompt_lengths: Sequence[int],
    group_sizes: Sequence[int],
    max_tokens: int,
    kv_budget_tokens: int,
) -> tuple[int, int]:
    """How many prompt slots and row slots fit into the budget.

    A prompt slot is as long as the longest prompt, a row slot has `max_tokens`. There are prompt
    slots for twice the groups that fill the row slots, and one more: a prompt whose last slow rows
    still run keeps its slot while the next groups enter.

    Raises UserError where the largest group with the longest prompt does not fit.
    """
    num_prompts = len(prompt_lengths)
    longest = max(prompt_lengths)
    largest = max(group_sizes)
    one_group = longest + largest * max_tokens
    if one_group > kv_budget_tokens:
        raise UserError(
            f"one group needs {one_group} tokens of KV memory "
            f"(prompt {longest} + {largest} x {max_tokens}): "
            f"raise scale.kv_budget_tokens from {kv_budget_tokens}, "
            f"or lower algo.group_size or model.max_completion_tokens"
        )

    def fits(num_prompt_slots: int, num_rows: int) -> bool:
        return num_prompt_slots * longest + num_rows * max_tokens <= kv_budget_tokens

    def prompt_slots_for(num_rows: int) -> int:
        groups_at_once = -(-num_rows // largest)
        return min(num_prompts, num_rows, 2 * groups_at_once + 1)

    num_rows = sum(group_sizes)
    if not fits(num_prompts, num_rows):
        num_rows = min(num_rows, kv_budget_tokens // max_tokens)
        while num_rows > largest and not fits(prompt_slots_for(num_rows), num_rows):
            num_rows -= 1
    room_for_prompts = (kv_budget_tokens - num_rows * max_tokens) // longest
    return min(num_prompts, num_rows, room_for_prompts), num_rows


@dataclass(frozen=True)
class PackedPrompt:
    """A prompt in one line of packed tokens, and the prompt slot that it goes into."""

    start: int
    length: int
    slot: int


@dataclass
class KVCache:
    """P prompt slots of T_prompt tokens and B row slots of T tokens, allocated once.

    The rows of a group read the same prompt entries, which are never copied per row. KV is the
    number of key and value heads, G the most rows that read one prompt.
    """

    prompt_keys: Tensor  # [L, P, KV, T_prompt, head_dim]
    prompt_values: Tensor
    own_keys: Tensor  # [L, B, KV, T, head_dim]
    own_values: Tensor
    prompt_lengths: Tensor  # [P]
    own_lengths: Tensor  # [B]: tokens of its own that a row has fed to the model
    row_prompt: Tensor  # [B]: the prompt slot that a row reads
    members: Tensor  # [P, G]: the rows that read a prompt, padded with row 0
    member_index: Tensor  # [B]: the column of `members` in which a row stands

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

        def entries(num_slots: int, num_tokens: int) -> Tensor:
            return like.new_zeros(
                config.num_layers, num_slots, config.num_kv_heads, num_tokens, config.head_dim
            )

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=like.device)

        return cls(
            prompt_keys=entries(num_prompts, prompt_tokens),
            prompt_values=entries(num_prompts, prompt_tokens),
            own_keys=entries(num_rows, row_tokens),
            own_values=entries(num_rows, row_tokens),
            prompt_lengths=integers(num_prompts),
            own_lengths=integers(num_rows),
            row_prompt=integers(num_rows),
            members=integers(num_prompts, 1),
            member_index=integers(num_rows),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values."""
        tensors = (self.prompt_keys, self.prompt_values, self.own_keys, self.own_values)
        return sum(x.numel() * x.element_size() for x in tensors)

    def prefill_attend(self, prompts: Sequence[PackedPrompt]) -> Attend:
        """An `attend` for `Decoder.hidden` over packed prompts, which also fills their slots."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)
            for prompt in prompts:
                span = slice(prompt.start, prompt.start + prompt.length)
                queries = rearrange(q[span], "t h d -> 1 h t d")
                keys = rearrange(k[span], "t h d -> 1 h t d")
                values = rearrange(v[span], "t h d -> 1 h t d")
                self.prompt_keys[layer, prompt.slot, :, : prompt.length] = keys[0]
                self.prompt_values[layer, prompt.slot, :, : prompt.length] = values[0]
                mixed = F.scaled_dot_product_attention(
                    queries, keys, values, is_causal=True, enable_gqa=True
                )
                out[span] = rearrange(mixed, "1 h t d -> t h d")
            return out

        return attend

    def decode_attend(self, width: int, backend: str = "auto") -> Attend:
        """An `attend` for `Decoder.hidden` over one new token per row, which also stores it.

        Each row's token goes to its `own_lengths`, all of them below `width`. `backend` is that of
        mar_kernels: its two Triton kernels a layer, which need no `width`, or the operators here.
        """
        if mar_kernels.has_kernels("triton_decode", backend, self.own_keys):
            return self._attend_in_kernels
        return self._attend_in_operators(width)

    def _attend_in_kernels(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = mar_kernels.LayerCache(
            prompt_keys=self.prompt_keys[layer],
            prompt_values=self.prompt_values[layer],
            own_keys=self.own_keys[layer],
            own_values=self.own_values[layer],
            prompt_lengths=self.prompt_lengths,
            own_lengths=self.own_lengths,
            row_prompt=self.row_prompt,
            members=self.members,
            member_index=self.member_index,
        )
        return mar_kernels.decode_attention(q, k, v, cache, backend="triton")

    def _attend_in_operators(self, width: int) -> Attend:
        """A row attends to its own tokens in one product and, together with the other rows of its
        group, to its prompt in another. With the log-sum-exps z of both, the softmax over all is

            own + sigmoid(z_prompt - z_own) * (prompt - own)
        """
        device = self.own_lengths.device
        mix = _mix_cpu if device.type == "cpu" else _mix
        rows = torch.arange(len(self.own_lengths), device=device)
        prompt_tokens = self.prompt_keys.shape[3]
        own_bias = self._hide_from(self.own_lengths + 1, width)
        prompt_bias = self._hide_from(self.prompt_lengths, prompt_tokens)

        def attend_to_own(layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
            keys = self.own_keys[layer, :, :, :width]
            values = self.own_values[layer, :, :, :width]
            return mix(q, keys, values, own_bias)

        def attend_to_prompt(layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
            """The queries of a prompt's rows go side by side, so that its keys are not repeated."""
            # one gather, no copy
            by_prompt = rearrange(q.transpose(0, 1)[:, self.members], "h p g r d -> p h (g r) d")
            mixed, lse = mix(
                by_prompt, self.prompt_keys[layer], self.prompt_values[layer], prompt_bias
            )
            return by_row(mixed), by_row(lse)

        def by_row(x: Tensor) -> Tensor:
            by_member = rearrange(x, "p h (g r) d -> p g h r d", g=self.members.shape[1])
            return by_member[self.row_prompt, self.member_index]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.own_keys[layer][rows, :, self.own_lengths] = k
            self.own_values[layer][rows, :, self.own_lengths] = v
            # query heads by the key head that they share
            q = rearrange(q, "b (h r) d -> b h r d", h=k.shape[1])
            own, own_lse = attend_to_own(layer, q)
            prompt, prompt_lse = attend_to_prompt(layer, q)
            prompt_share = torch.sigmoid(prompt_lse - own_lse)
            mixed = own + prompt_share * (prompt - own)
            return rearrange(mixed, "b h r d -> b (h r) d").to(q.dtype)

        return attend

    def _hide_from(self, ends: Tensor, num_tokens: int) -> Tensor:
        """A bias on scores [len(ends), 1, 1, num_tokens]: 0 before each end, -inf from it on."""
        positions = torch.arange(num_tokens, device=ends.device)
        bias = torch.where(positions < ends[:, None], 0.0, -torch.inf)
        return bias.to(self.own_keys)[:, None, None]

    def assign(self, row_prompt: Sequence[int], largest_group: int) -> None:
        """Say which prompt slot each row reads, -1 for a free row.

        At most `largest_group` rows read one prompt.
        """
        members: list[list[int]] = [[] for _ in range(self.members.shape[0])]
        member_index = [0] * len(row_prompt)
        for row, slot in enumerate(row_prompt):
            if slot >= 0:
                member_index[row] = len(members[slot])
                members[slot].append(row)
        padded = [rows + [0] * (largest_group - len(rows)) for rows in members]
        self.members = _refilled(self.members, padded)
        self.member_index = _refilled(self.member_index, member_index)
        self.row_prompt = _refilled(self.row_prompt, [max(slot, 0) for slot in row_prompt])

    def keep(self, rows: Tensor, prompts: Tensor) -> None:
        """Drop all row slots and prompt slots but these, in ascending order; `assign` follows.

        Entries move to the front layer by layer. No memory is given back, and none is asked for.
        """
        self.own_keys = _moved_to_front(self.own_keys, rows)
        self.own_values = _moved_to_front(self.own_values, rows)
        self.prompt_keys = _moved_to_front(self.prompt_keys, prompts)
        self.prompt_values = _moved_to_front(self.prompt_values, prompts)
        self.own_lengths = self.own_lengths[rows]
        self.prompt_lengths = self.prompt_lengths[prompts]
        self.members = self.members[prompts]


def _refilled(buffer: Tensor, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """The buffer with new values: CUDA graphs read its address. A new one if the shape changed."""
    new = torch.tensor(values, device=buffer.device)
    if new.shape != buffer.shape:
        return new
    return buffer.copy_(new)


def _moved_to_front(entries: Tensor, slots: Tensor) -> Tensor:
    """A view of the first len(slots) slots, after the entries of `slots` were moved there."""
    for layer in entries:
        layer[: len(slots)] = layer[slots]
    return entries[:, : len(slots)]


def _mix_cpu(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`_mix` in one operator.

    The operator rounds what it returns to the type of its operands. Two parts of bfloat16, merged
    and rounded again, would be rounded twice, so they are computed in float32.
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    mixed, lse = cpu_attention(
        q.to(precise), keys.to(precise), values.to(precise), False, bias.to(precise)
    )
    return mixed, lse[..., None]


def _mix(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [N, H, M, head_dim] over T entries, with `bias` [N, 1, 1, T] on their scores.

    Returns the mixed values, and the log-sum-exp of the scores [N, H, M, 1]; both in float32 or
    wider, and so are the scores: the trainer's fused attention rounds none of them either.
    """
    scores = (precise_product(q, keys.mT) * q.shape[-1] ** -0.5).add_(bias)
    log_weights = scores.log_softmax(-1)
    # log_weights = scores - lse at every entry, and the first is hidden from no row. A GPU takes
    # nine kernels for `logsumexp`, and log_softmax one.
    lse = scores[..., :1] - log_weights[..., :1]
    del scores  # as large as the weights, whose copy comes next
    weights = log_weights.exp_().to(q.dtype)
    return precise_product(weights, values), lse

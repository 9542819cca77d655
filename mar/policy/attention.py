"""Attention over shared prompts: a group's prompt is one segment, each of its rows another; no prompt is repeated.

A token attends causally inside its own segment; a row's token also attends to its whole prompt. On a CPU the two parts are separate calls, merged
by their log-sum-exps; on CUDA they are one FlexAttention call with a BlockMask. No tensor has T^2 elements for T packed tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import TypeVar

import torch
from einops import rearrange
from jaxtyping import Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# (layer, q [N, H, D], k [N, Hkv, D], v [N, Hkv, D]) -> [N, H, D]; q and k are rotated, the scale is 1 / sqrt(D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

Tokens = Sequence[int]

Item = TypeVar("Item")

# the query heads of one key head go to the token axis, so that a prompt's keys are not repeated
FOLD, UNFOLD = "n (h r) ... -> 1 h (n r) ...", "1 h (n r) ... -> n (h r) ..."

_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_compile: Callable = cache(torch.compile)  # one compiled function per process


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PyTorch's own CPU attention with its log-sum-exp, which the public function does not return. q [B, H, M, D], k and v [B, Hkv, N, D].

    The operator takes it for granted that channels lie side by side, and returns rubbish where they do not (in a transposed product): copies then.
    """
    q, k, v = map(_side_by_side, (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias
    )


@dataclass(frozen=True)
class PackedGroups:
    """N input tokens of whole groups in one line, and the M completion tokens that they predict.

    `prompts` are (start, length); `rows` are (start, length, index of the prompt), each prompt's rows contiguous and right after it. A completion of
    R tokens is a row of R - 1 (its last token is a target only), so a row may be empty. `predict_from[m]` is the index of the input token whose
    hidden state predicts `targets[m]`: for a completion's first token the prompt's last. The M tokens are in the order of the rows.
    """

    ids: Int64[Tensor, " n"]
    positions: Int64[Tensor, " n"]
    prompts: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int, int], ...]
    predict_from: Int64[Tensor, " m"]
    targets: Int64[Tensor, " m"]


def pack_groups(
    prompts: Sequence[Tokens],
    completions: Sequence[Sequence[Tokens]],
    device: torch.device | str = "cpu",
) -> PackedGroups:
    """Token ids of each prompt and of its completions, none of them empty. A prompt may have no completions."""
    lines: list[list[int]] = [[], [], [], []]
    ids, positions, predict_from, targets = lines
    spans, rows = [], []
    for index, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        if not all(map(len, (prompt, *group))):
            raise ValueError(f"group {index} has an empty prompt or an empty completion")
        spans.append((len(ids), len(prompt)))
        positions.extend(range(len(prompt)))
        ids.extend(prompt)
        last = len(ids) - 1
        for completion in group:
            start, length = len(ids), len(completion) - 1
            rows.append((start, length, index))
            positions.extend(range(len(prompt), len(prompt) + length))
            ids.extend(completion[:-1])
            predict_from.extend((last, *range(start, start + length)))
            targets.extend(completion)
    tensors = [torch.tensor(line, dtype=torch.int64, device=device) for line in lines]
    return PackedGroups(tensors[0], tensors[1], tuple(spans), tuple(rows), tensors[2], tensors[3])


def chunks(items: Sequence[Item], sizes: Sequence[int], most: int) -> list[list[Item]]:
    """Consecutive items whose sizes add up to at most `most` (or one larger item)."""
    out: list[list[Item]] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if not out or total + size > most:
            out.append([])
            total = 0
        out[-1].append(item)
        total += size
    return out


def group_attention(packed: PackedGroups) -> Attend:
    """The `attend` of `Decoder.hidden` for these groups; the gradient of a prompt sums what all its rows send back."""
    if packed.ids.device.type == "cuda":
        return _flex_attend(packed)
    plan = _plan(packed)
    return lambda layer, q, k, v: _GroupAttention.apply(q, k, v, plan)


@dataclass(frozen=True)
class _Block:
    """Segments of similar length. Token `tokens[i]` of the line sits at `slots[i]` of the flattened [rows, length]."""

    rows: int
    length: int
    tokens: Tensor
    slots: Tensor

    def pad(self, x: Tensor, repeat: int = 1) -> Tensor:
        """[N, H, ...] -> [rows, H * repeat, length, ...], zero where there is no token."""
        flat = x.new_zeros(self.rows * self.length, *x.shape[1:])
        flat[self.slots] = x[self.tokens]
        padded = flat.unflatten(0, (self.rows, self.length)).transpose(1, 2)
        return padded.repeat_interleave(repeat, 1) if repeat > 1 else padded

    def unpad(self, x: Tensor) -> Tensor:
        """[rows, H, length, ...] -> one entry per token of `tokens`."""
        return x.transpose(1, 2).flatten(0, 1)[self.slots]


def _plan(packed: PackedGroups) -> tuple[list[_Block], list[tuple[slice, slice]]]:
    """Blocks of segments, and (a prompt's tokens, the tokens of all its rows). Lengths alone decide: once per pass."""
    segments = [
        (start, length) for start, length, *_ in chain(packed.prompts, packed.rows) if length
    ]
    similar: list[list[tuple[int, int]]] = []
    for start, length in sorted(segments, key=lambda segment: -segment[1]):
        if (
            not similar or length < 0.75 * similar[-1][0][1]
        ):  # at most a quarter of a block is padding
            similar.append([])
        similar[-1].append((start, length))
    blocks = []
    for members in similar:
        longest = members[0][1]
        tokens = [token for start, n in members for token in range(start, start + n)]
        slots = [
            slot for i, (_, n) in enumerate(members) for slot in range(i * longest, i * longest + n)
        ]
        index = (torch.tensor(line, device=packed.ids.device) for line in (tokens, slots))
        blocks.append(_Block(len(members), longest, *index))
    ends = [start for start, _ in packed.prompts[1:]] + [packed.ids.shape[0]]  # of each group
    shared = [
        (slice(s, s + n), slice(s + n, end))
        for (s, n), end in zip(packed.prompts, ends, strict=True)
    ]
    return blocks, [(prompt, rows) for prompt, rows in shared if rows.stop > rows.start]


class _GroupAttention(torch.autograd.Function):
    """Own part and prompt part. The backward of each takes the MERGED output and log-sum-exp, as in ring attention
    (arXiv:2310.01889): its probabilities are then those of the whole softmax, and the parts' gradients add up."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, plan):  # type: ignore[no-untyped-def]
        (blocks, shared), kv_heads, repeat = plan, k.shape[1], q.shape[1] // k.shape[1]
        q, k, v = map(_side_by_side, (q, k, v))  # the backward operator wants that too
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for block in blocks:
            own = cpu_attention(block.pad(q), block.pad(k, repeat), block.pad(v, repeat), True)
            out[block.tokens], lse[block.tokens] = block.unpad(own[0]), block.unpad(own[1])
        for prompt, rows in shared:
            keys, values = (x[prompt].transpose(0, 1)[None] for x in (k, v))
            parts = cpu_attention(rearrange(q[rows], FOLD, h=kv_heads), keys, values, False)
            shared_out, shared_lse = (rearrange(part, UNFOLD, r=repeat) for part in parts)
            own_lse, lse[rows] = lse[rows].clone(), torch.logaddexp(lse[rows], shared_lse)
            own_share, shared_share = (own_lse - lse[rows]).exp_(), (shared_lse - lse[rows]).exp_()
            out[rows] = (
                out[rows] * own_share[..., None] + shared_out * shared_share[..., None]
            ).to(out.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        (blocks, shared), kv_heads, repeat = ctx.plan, k.shape[1], q.shape[1] // k.shape[1]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for block in blocks:  # a padded query has grad_out = out = 0: it sends nothing back
            inputs = (
                block.pad(q),
                block.pad(k, repeat),
                block.pad(v, repeat),
                block.pad(out),
                block.pad(lse),
            )
            grads = [
                block.unpad(x) for x in _attention_backward(block.pad(grad_out), *inputs, 0.0, True)
            ]
            dq[block.tokens] = grads[0]
            for total, grad in zip((dk, dv), grads[1:], strict=True):
                total[block.tokens] = grad.unflatten(1, (kv_heads, repeat)).sum(2)
        for prompt, rows in shared:
            keys, values = (x[prompt].transpose(0, 1)[None] for x in (k, v))
            grad, queries, merged, merged_lse = (
                rearrange(x[rows], FOLD, h=kv_heads) for x in (grad_out, q, out, lse)
            )
            grads = _attention_backward(grad, queries, keys, values, merged, merged_lse, 0.0, False)
            dq[rows] += rearrange(grads[0], UNFOLD, r=repeat)
            dk[prompt] += grads[1][0].transpose(0, 1)
            dv[prompt] += grads[2][0].transpose(0, 1)
        return dq, dk, dv, None


def _block_mask(packed: PackedGroups, size: int = 128) -> BlockMask:
    """FlexAttention's mask: for each block of `size` queries the key blocks it sees in part, and those it sees whole."""
    segments = [
        (s, n, s, s) for s, n in packed.prompts
    ]  # (start, length, first shared key, end of the shared keys)
    segments += [
        (s, n, packed.prompts[i][0], sum(packed.prompts[i])) for s, n, i in packed.rows if n
    ]
    bounds = [
        (start, low, high) for start, length, low, high in sorted(segments) for _ in range(length)
    ]
    num_blocks = -(-len(bounds) // size)
    seen: list[set[int]] = [set() for _ in range(num_blocks)]
    whole = [set(range(num_blocks)) for _ in range(num_blocks)]
    for start, length, low, high in segments:
        for block in range(start // size, (start + length - 1) // size + 1):
            first, end = (
                max(start, block * size),
                min(start + length, (block + 1) * size),
            )  # its queries in this block
            seen[block] |= {
                *range(start // size, -(-end // size)),
                *range(low // size, -(-high // size)),
            }
            whole[block] &= {
                *range(-(-start // size), (first + 1) // size),
                *range(-(-low // size), high // size),
            }
    index = partial(torch.tensor, dtype=torch.int32, device=packed.ids.device)
    starts, lows, highs = index(bounds).T.contiguous()

    def counts_and_keys(keys: list[set[int]]) -> tuple[Tensor, Tensor]:
        return index([[[*map(len, keys)]]]), index(
            [[[sorted(row) + [0] * (num_blocks - len(row)) for row in keys]]]
        )

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((key >= starts[query]) & (key <= query)) | (
            (key >= lows[query]) & (key < highs[query])
        )

    part = counts_and_keys([s - w for s, w in zip(seen, whole, strict=True)])
    lengths = (len(bounds), len(bounds))
    return BlockMask.from_kv_blocks(
        *part, *counts_and_keys(whole), size, allowed, seq_lengths=lengths
    )


def _flex_attend(packed: PackedGroups) -> Attend:
    mask = _block_mask(packed)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(x, "n h d -> 1 h n d") for x in (q, k, v))
        flex = _compile(flex_attention) if q.is_cuda else flex_attention
        return rearrange(flex(q, k, v, block_mask=mask, enable_gqa=True), "1 h n d -> n h d")

    return attend

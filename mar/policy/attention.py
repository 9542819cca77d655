"""Attention over shared prompts: each is computed once, and all rows of its group attend to it.

A prompt is one segment of the packed tokens and each of its rows another. A token attends causally
inside its own segment; a row's token also attends to its whole prompt. `packing.py` lays
the tokens out (start there), `group_attention` computes the attention: on a CPU in two parts that
are merged, on CUDA in one FlexAttention call. No tensor has N^2 elements for N packed tokens.

Letters: N packed tokens, M trained tokens, H query heads, Hkv key heads, d = head_dim.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mar.policy.packing import PackedGroups, Span

# (layer, q [N, H, d], k [N, Hkv, d], v [N, Hkv, d]) -> [N, H, d].
# q and k are rotated already; the scale is 1 / sqrt(d).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def group_attention(packed: PackedGroups) -> Attend:
    """The `attend` of `Decoder.hidden` for these groups.

    The keys and values of a prompt receive the gradients of all its rows.
    """
    if packed.ids.device.type == "cuda":
        return _flex_attend(packed)
    plan = _cpu_plan(packed)
    return lambda layer, q, k, v: _GroupAttention.apply(q, k, v, plan)


# --- CPU: own part and prompt part, merged by their log-sum-exps ----------------------------------


def _with_contiguous_channels(x: Tensor) -> Tensor:
    """`x`, or a copy of it where its last axis is strided (as after a transposed product).

    The CPU operators below take contiguous channels for granted, forward and backward, and return
    wrong numbers for others.
    """
    if x.stride(-1) == 1:
        return x
    return x.contiguous()


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PyTorch's own CPU attention with its log-sum-exp, which the public function does not return.

    q [batch, H, queries, d]; k, v [batch, Hkv, keys, d]
    -> output like q, log-sum-exp [batch, H, queries].
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _with_contiguous_channels(q),
        _with_contiguous_channels(k),
        _with_contiguous_channels(v),
        dropout_p=0.0,
        is_causal=causal,
        attn_mask=bias,
    )


def _cpu_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. `out` and `lse` are what the forward pass returned.

    The operator computes p = exp(score - lse), and from it the gradient of the scores:
    p (grad_out . v - grad_out . out).
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, dropout_p=0.0, is_causal=causal
    )


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class _PaddedSegments:
    """Segments of similar length, padded to [segments, length], so that one call serves them all.

    Packed token `tokens[i]` sits at `slots[i]` of the flattened [segments * length].
    """

    num_segments: int
    length: int
    tokens: Tensor
    slots: Tensor

    def pad(self, x: Tensor, repeat: int = 1) -> Tensor:
        """[N, H, ...] -> [segments, H * repeat, length, ...], zero where there is no token."""
        tokens = _precise(x[self.tokens])
        flat = tokens.new_zeros(self.num_segments * self.length, *x.shape[1:])
        flat[self.slots] = tokens
        padded = flat.unflatten(0, (self.num_segments, self.length)).transpose(1, 2)
        if repeat == 1:
            return padded
        return padded.repeat_interleave(repeat, 1)

    def unpad(self, x: Tensor) -> Tensor:
        """[segments, H, length, ...] -> [len(tokens), H, ...]."""
        return x.transpose(1, 2).flatten(0, 1)[self.slots]


@dataclass(frozen=True)
class _SharedPrompt:
    """The packed tokens of a prompt, and those of all its rows, which lie right behind it."""

    prompt: slice
    rows: slice


@dataclass(frozen=True)
class _CpuPlan:
    """The calls of cpu_attention for some groups: one per entry of `own` and of `shared`."""

    own: list[_PaddedSegments]
    shared: list[_SharedPrompt]


def _cpu_plan(packed: PackedGroups) -> _CpuPlan:
    """Lengths alone decide it, so it is made once and serves every layer, forward and backward."""
    segments: list[Span] = [*packed.prompts, *packed.rows]
    spans = [span for span in segments if span.length > 0]
    device = packed.ids.device
    own = [_pad_together(similar, device) for similar in _by_similar_length(spans)]
    return _CpuPlan(own, _shared_prompts(packed))


def _by_similar_length(spans: Sequence[Span]) -> list[list[Span]]:
    """Longest first; the shortest of a list has three quarters of its longest, so at most a quarter
    is padding.
    """
    lists: list[list[Span]] = []
    longest = 0
    for span in sorted(spans, key=lambda span: -span.length):
        if not lists or span.length < 0.75 * longest:
            lists.append([])
            longest = span.length
        lists[-1].append(span)
    return lists


def _pad_together(spans: Sequence[Span], device: torch.device) -> _PaddedSegments:
    """The longest comes first."""
    longest = spans[0].length
    tokens: list[int] = []
    slots: list[int] = []
    for i, span in enumerate(spans):
        tokens.extend(range(span.start, span.end))
        slots.extend(range(i * longest, i * longest + span.length))
    return _PaddedSegments(
        num_segments=len(spans),
        length=longest,
        tokens=torch.tensor(tokens, device=device),
        slots=torch.tensor(slots, device=device),
    )


def _shared_prompts(packed: PackedGroups) -> list[_SharedPrompt]:
    """Each prompt with its rows, if these have any tokens; a group ends where the next begins."""
    group_ends = [prompt.start for prompt in packed.prompts[1:]]
    group_ends.append(len(packed.ids))
    shared = []
    for prompt, group_end in zip(packed.prompts, group_ends, strict=True):
        if group_end > prompt.end:
            tokens = slice(prompt.start, prompt.end)
            shared.append(_SharedPrompt(tokens, rows=slice(prompt.end, group_end)))
    return shared


# For the prompt part, the query heads that read one key head move to the token axis, so that the
# prompt's keys and values are read as they are instead of being repeated for every query head.
FOLD = "n (h r) ... -> 1 h (n r) ..."
UNFOLD = "1 h (n r) ... -> n (h r) ..."


def _fold(x: Tensor, num_kv_heads: int) -> Tensor:
    return rearrange(_precise(x), FOLD, h=num_kv_heads)


def _as_batch_of_one(x: Tensor) -> Tensor:
    """[tokens, Hkv, d] -> [1, Hkv, tokens, d]."""
    return _precise(x).transpose(0, 1)[None]


def _merge(
    own_out: Tensor, own_lse: Tensor, prompt_out: Tensor, prompt_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both parts, from the attention over each.

        lse = log(exp(own_lse) + exp(prompt_lse))
        out = exp(own_lse - lse) own_out + exp(prompt_lse - lse) prompt_out

    exp(part_lse - lse) is the share of the whole softmax that falls on the keys of that part.
    Outputs are [tokens, H, d], log-sum-exps [tokens, H].
    """
    lse = torch.logaddexp(own_lse, prompt_lse)
    own_share = (own_lse - lse).exp_()[..., None]
    prompt_share = (prompt_lse - lse).exp_()[..., None]
    return own_out * own_share + prompt_out * prompt_share, lse


class _GroupAttention(torch.autograd.Function):
    """Attention of packed groups on a CPU, in parts whose keys do not overlap.

    Own part: each segment attends causally to itself. Prompt part: the rows of a group attend to
    their prompt, all together in one call. Where a token has both, `_merge` joins them. The
    operator rounds what it returns to the type of its operands: parts of bfloat16 would be rounded
    once more by the merge, so each part is computed in float32. What backward needs is kept in the
    type that it came in.

    Backward takes each part again, but hands the operator the MERGED output and log-sum-exp (as in
    ring attention, arXiv:2310.01889). The probabilities that it computes from them are then those
    of the softmax over all keys, and so is grad_out . out. Each part gives the exact gradient of
    its keys and values and a summand of the gradient of the queries: the parts add up.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _CpuPlan) -> Tensor:
        q = _with_contiguous_channels(q)
        k = _with_contiguous_channels(k)
        v = _with_contiguous_channels(v)
        num_kv_heads = k.shape[1]
        heads_per_key = q.shape[1] // num_kv_heads
        precise = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(q, dtype=precise)
        lse = q.new_empty(q.shape[:2], dtype=precise)

        for segments in plan.own:
            own_out, own_lse = cpu_attention(
                segments.pad(q),
                segments.pad(k, heads_per_key),
                segments.pad(v, heads_per_key),
                causal=True,
            )
            out[segments.tokens] = segments.unpad(own_out)
            lse[segments.tokens] = segments.unpad(own_lse)

        for group in plan.shared:
            prompt_out, prompt_lse = cpu_attention(
                _fold(q[group.rows], num_kv_heads),
                _as_batch_of_one(k[group.prompt]),
                _as_batch_of_one(v[group.prompt]),
                causal=False,
            )
            out[group.rows], lse[group.rows] = _merge(
                out[group.rows],
                lse[group.rows],
                rearrange(prompt_out, UNFOLD, r=heads_per_key),
                rearrange(prompt_lse, UNFOLD, r=heads_per_key),
            )

        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        return out.to(q.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        plan: _CpuPlan = ctx.plan
        num_kv_heads = k.shape[1]
        heads_per_key = q.shape[1] // num_kv_heads
        dq = torch.empty_like(q, dtype=lse.dtype)
        dk = torch.empty_like(k, dtype=lse.dtype)
        dv = torch.empty_like(v, dtype=lse.dtype)

        # every token is in exactly one segment, so this fills dq, dk and dv;
        # a padded query has grad_out = out = 0 and sends nothing back
        for segments in plan.own:
            own_dq, own_dk, own_dv = _cpu_attention_backward(
                segments.pad(grad_out),
                segments.pad(q),
                segments.pad(k, heads_per_key),
                segments.pad(v, heads_per_key),
                segments.pad(out),
                segments.pad(lse),
                causal=True,
            )
            # `pad` repeated each key head for its query heads: their gradients sum to its own
            per_key = (num_kv_heads, heads_per_key)
            dq[segments.tokens] = segments.unpad(own_dq)
            dk[segments.tokens] = segments.unpad(own_dk).unflatten(1, per_key).sum(2)
            dv[segments.tokens] = segments.unpad(own_dv).unflatten(1, per_key).sum(2)

        for group in plan.shared:
            prompt_dq, prompt_dk, prompt_dv = _cpu_attention_backward(
                _fold(grad_out[group.rows], num_kv_heads),
                _fold(q[group.rows], num_kv_heads),
                _as_batch_of_one(k[group.prompt]),
                _as_batch_of_one(v[group.prompt]),
                _fold(out[group.rows], num_kv_heads),
                _fold(lse[group.rows], num_kv_heads),
                causal=False,
            )
            dq[group.rows] += rearrange(prompt_dq, UNFOLD, r=heads_per_key)
            dk[group.prompt] += prompt_dk[0].transpose(0, 1)
            dv[group.prompt] += prompt_dv[0].transpose(0, 1)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


# --- CUDA: one FlexAttention call with a block mask -----------------------------------------------

# one compiled function per process
_compile: Callable = cache(torch.compile)


class _Visible(NamedTuple):
    """The tokens [start, end) of one segment, and the keys of the prompt that all of them see.

    For the tokens of a prompt itself that range is empty.
    """

    start: int
    end: int
    prompt_start: int
    prompt_end: int


def _visible_segments(packed: PackedGroups) -> list[_Visible]:
    """All segments with tokens, in the order of the tokens."""
    segments = [_Visible(prompt.start, prompt.end, 0, 0) for prompt in packed.prompts]
    for row in packed.rows:
        if row.length > 0:
            prompt = packed.prompts[row.prompt]
            segments.append(_Visible(row.start, row.end, prompt.start, prompt.end))
    return sorted(segments)


def _blocks_touched(start: int, end: int, size: int) -> Iterable[int]:
    """The blocks of `size` tokens that hold some token of [start, end)."""
    if start == end:
        return ()
    return range(start // size, -(-end // size))


def _blocks_inside(start: int, end: int, size: int) -> Iterable[int]:
    """The blocks of `size` tokens all of whose tokens are in [start, end)."""
    return range(-(-start // size), end // size)


def _key_blocks(
    segments: Sequence[_Visible], num_blocks: int, size: int
) -> tuple[list[set[int]], list[set[int]]]:
    """For each block of queries: the key blocks that it sees in part, and those it sees whole.

    Whole: every query of the block sees every key. In part: some query sees some key.
    """
    seen: list[set[int]] = [set() for _ in range(num_blocks)]
    whole = [set(range(num_blocks)) for _ in range(num_blocks)]
    for segment in segments:
        of_prompt = _blocks_inside(segment.prompt_start, segment.prompt_end, size)
        for block in _blocks_touched(segment.start, segment.end, size):
            # of the queries in this block, the last one sees most of the segment, the first least
            first_query = max(segment.start, block * size)
            last_query = min(segment.end, (block + 1) * size) - 1
            seen[block].update(_blocks_touched(segment.start, last_query + 1, size))
            seen[block].update(_blocks_touched(segment.prompt_start, segment.prompt_end, size))
            of_own = _blocks_inside(segment.start, first_query + 1, size)
            whole[block] &= {*of_own, *of_prompt}
    partial_blocks = [some - every for some, every in zip(seen, whole, strict=True)]
    return partial_blocks, whole


def _block_mask(packed: PackedGroups, size: int = 128) -> BlockMask:
    """FlexAttention's mask: the key blocks that each block of `size` queries reads, and the rule.

    A query sees a key in its own segment  if own_start <= key <= query,
                       in its prompt       if prompt_start <= key < prompt_end.
    """
    segments = _visible_segments(packed)
    num_tokens = len(packed.ids)
    num_blocks = -(-num_tokens // size)
    integers = partial(torch.tensor, dtype=torch.int32, device=packed.ids.device)

    # the bounds of each token, [3, N]
    bounds: list[tuple[int, int, int]] = []
    for segment in segments:
        of_segment = (segment.start, segment.prompt_start, segment.prompt_end)
        bounds.extend([of_segment] * (segment.end - segment.start))
    own_start, prompt_start, prompt_end = integers(bounds).T.contiguous()

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_own_segment = (key >= own_start[query]) & (key <= query)
        in_prompt = (key >= prompt_start[query]) & (key < prompt_end[query])
        return in_own_segment | in_prompt

    def table(blocks: list[set[int]]) -> tuple[Tensor, Tensor]:
        """Counts of key blocks [1, 1, blocks], and which, padded with 0 [1, 1, blocks, blocks]."""
        counts = [len(keys) for keys in blocks]
        padded = [sorted(keys) + [0] * (num_blocks - len(keys)) for keys in blocks]
        return integers([[counts]]), integers([[padded]])

    partial_blocks, whole_blocks = _key_blocks(segments, num_blocks, size)
    kv_num_blocks, kv_indices = table(partial_blocks)
    full_kv_num_blocks, full_kv_indices = table(whole_blocks)
    return BlockMask.from_kv_blocks(
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        BLOCK_SIZE=size,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
    )


def _flex_attend(packed: PackedGroups) -> Attend:
    mask = _block_mask(packed)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flex = _compile(flex_attention) if q.is_cuda else flex_attention
        queries, keys, values = (rearrange(x, "n h d -> 1 h n d") for x in (q, k, v))
        out = flex(queries, keys, values, block_mask=mask, enable_gqa=True)
        return rearrange(out, "1 h n d -> n h d")

    return attend

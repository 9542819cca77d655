"""Attention of a decode step in two kernels, and what prepares its queries and keys in one, as
`reference.py` defines them. Without gradients.

The rows of a prompt stand side by side, so that its keys are read once for all of them. The prompt
is cut into spans, each a program's; a row's own tokens are one program's, whose online softmax
(arXiv:1805.02867) goes on from what the spans have left. So prompt and own part are never merged
by a kernel of their own.

No launch depends on a value on the device, and nothing is read back: fit for a CUDA graph. What a
row gets does not depend on the rows beside it, to the last bit: spans have one length, and every
sum its order.

Letters: B rows, P prompt slots, G members of a prompt at most, S spans, H query heads, KV key
heads, d = head_dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import DECODE_SPAN as SPAN
from .interpreter import INTERPRETED
from .reference import LayerCache

# keys of that many bytes are held at a time, and values
TILE_BYTES = 1 << 14

# (members x query heads of a key head) that a program of the prompt part takes, by type. With
# twice as many of float32, or 4 warps, it spills on Hopper (kernels/compile_report.py)
ROWS = {torch.bfloat16: 64, torch.float32: 16}
PROMPT_WARPS = 8

# tiles of keys and values that are on their way at once, by type
STAGES = {torch.bfloat16: 3, torch.float32: 2}

# tl.dot takes no fewer
LEAST_ROWS = 16

# (heads x channels) that a program of the rotation takes
HEAD_ELEMENTS = 1024

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def tile_tokens(dtype: torch.dtype, channels: int) -> int:
    """Tokens whose keys are held at a time."""
    return min(max(TILE_BYTES // (channels * dtype.itemsize), 16), 64)


@triton.jit
def _attended(
    q, keys, values, begin, end, top, total, mixed, scale,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The online softmax of q [rows, CHANNELS] over the tokens [begin, end), from where it stands.

    Its state, of each row: the largest score, the sum of e = exp(score - largest), the sum of
    e values.
    """
    channels = tl.arange(0, CHANNELS)
    for start in range(begin, end, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        at = tokens[:, None] * WIDTH + channels[None, :]
        inside = (tokens < end)[:, None] & (channels < WIDTH)[None, :]
        k = tl.load(keys + at, mask=inside, other=0.0)
        v = tl.load(values + at, mask=inside, other=0.0)
        # the interpreter is wrong for bfloat16 (triton issue 11584)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        scores = tl.where((tokens < end)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        e = tl.exp(scores - new_top[:, None])
        # the sums so far are brought from the old top to the new one
        fall = tl.exp(top - new_top)
        total = total * fall + tl.sum(e, 1)
        # the weights take the type of the values, as those of the plain operators do
        mixed = tl.dot(e.to(v.dtype), v, mixed * fall[:, None], input_precision="tf32x3")
        top = new_top
    return top, total, mixed


# not specialised for what changes while rows leave: one compilation
@triton.jit(do_not_specialize=["B", "G", "S"])
def prompt_kernel(
    q, keys, values, prompt_lengths, row_prompt, members, member_index, mixed, lse,
    B, G, S, KV, q_stride, slot_stride, head_stride, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention of a prompt's rows to one span of it -> mixed [S, B, H, d], lse [S, B, H].

    Of one key head, whose HEADS query heads stand beside each other for each member. A span past
    the end of the prompt and a place without a member are not written.
    """
    prompt = tl.program_id(2)
    span = tl.program_id(1) // KV
    key_head = tl.program_id(1) % KV
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    member = place // HEADS
    head = key_head * HEADS + place % HEADS

    # places that pad `members` name row 0, which stands elsewhere
    inside = member < G
    row = tl.load(members + prompt.to(tl.int64) * G + member, mask=inside, other=0)
    inside = inside & (tl.load(row_prompt + row) == prompt)
    inside = inside & (tl.load(member_index + row) == member)
    begin = span * SPAN
    end = tl.minimum(begin + SPAN, tl.load(prompt_lengths + prompt).to(tl.int32))
    # nothing to go through where nobody reads
    end = tl.where(tl.max(inside.to(tl.int32), 0) > 0, end, begin)

    channels = tl.arange(0, CHANNELS)
    stored = inside[:, None] & (channels < WIDTH)[None, :]
    at = row[:, None] * q_stride + head[:, None] * WIDTH + channels[None, :]
    queries = tl.load(q + at, mask=stored, other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    slot = prompt.to(tl.int64) * slot_stride + key_head * head_stride
    top, total, sums = _attended(
        queries, keys + slot, values + slot, begin, end,
        tl.full([ROWS], LOWEST, tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, CHANNELS], tl.float32),
        scale, WIDTH, CHANNELS, TOKENS, UPCAST,
    )  # fmt: skip

    inside = inside & (begin < end)
    stored = stored & (begin < end)
    to = (span * B + row) * (KV * HEADS) + head
    tl.store(lse + to, top + tl.log(total), mask=inside)
    to = to[:, None] * WIDTH + channels[None, :]
    tl.store(mixed + to, sums / total[:, None], mask=stored)


@triton.jit(do_not_specialize=["B", "G"])
def own_kernel(
    q, k, v, keys, values, own_lengths, prompt_lengths, row_prompt, members, member_index,
    mixed, lse, out,
    B, G, KV, q_stride, k_stride, v_stride, slot_stride, head_stride, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One row's attention for one key head: to its new token, to the spans of its prompt, and to
    its own tokens before -> out [B, H, d]. The new token's key and value are stored.

    ROWS is at least the HEADS query heads of the key head.
    """
    row = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1)
    channels = tl.arange(0, CHANNELS)
    in_width = channels < WIDTH
    member = tl.arange(0, ROWS)
    inside = member < HEADS
    both = inside[:, None] & in_width[None, :]
    head = key_head * HEADS + member
    at = head[:, None] * WIDTH + channels[None, :]
    queries = tl.load(q + row * q_stride + at, mask=both, other=0.0)
    new_at = key_head * WIDTH + channels
    new_key = tl.load(k + row * k_stride + new_at, mask=in_width, other=0.0)
    new_value = tl.load(v + row * v_stride + new_at, mask=in_width, other=0.0)
    end = tl.load(own_lengths + row).to(tl.int32)
    slot = row * slot_stride + key_head * head_stride
    keys += slot
    values += slot
    tl.store(keys + end * WIDTH + channels, new_key, mask=in_width)
    tl.store(values + end * WIDTH + channels, new_value, mask=in_width)
    if UPCAST:
        queries = queries.to(tl.float32)

    # The new token comes first, from registers, and every later maximum is a number.
    products = queries.to(tl.float32) * new_key.to(tl.float32)[None, :]
    top = tl.sum(products, 1) * scale
    total = tl.full([ROWS], 1.0, tl.float32)
    sums = tl.zeros([ROWS, CHANNELS], tl.float32) + new_value.to(tl.float32)[None, :]

    # a free row reads no prompt
    prompt = tl.load(row_prompt + row)
    place = tl.load(member_index + row)
    reads = tl.load(members + prompt * G + place) == row
    length = tl.where(reads, tl.load(prompt_lengths + prompt).to(tl.int32), 0)
    for span in range(0, tl.cdiv(length, SPAN)):
        part = (span * B + row) * (KV * HEADS)
        of_span = tl.load(lse + part + head, mask=inside, other=0.0)
        found = tl.load(mixed + part * WIDTH + at, mask=both, other=0.0)
        new_top = tl.maximum(top, of_span)
        fall = tl.exp(top - new_top)
        share = tl.exp(of_span - new_top)
        total = total * fall + share
        sums = sums * fall[:, None] + found * share[:, None]
        top = new_top

    top, total, sums = _attended(
        queries, keys, values, 0, end, top, total, sums,
        scale, WIDTH, CHANNELS, TOKENS, UPCAST,
    )  # fmt: skip
    result = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * (KV * HEADS * WIDTH) + at, result, mask=both)


@triton.jit
def _as_stored(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """`x` rounded to a type, in float32: what the next operator would read. The interpreter cuts
    numbers short instead of rounding them.
    """
    if UPCAST:
        return x
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def rotate_kernel(
    heads, q_weight, k_weight, cos, sin, out,
    H, ALL, stride, eps,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ROWS of the ALL heads of one token: RMSNorm where there are weights, then rotation.

    A channel needs its partner too, which is read a second time rather than moved.
    """
    dtype = heads.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    partner = (channel + WIDTH // 2) % WIDTH
    inside = (head < ALL)[:, None] & (channel < WIDTH)[None, :]
    heads += token * stride + head[:, None] * WIDTH
    x = tl.load(heads + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(heads + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    in_width = channel < WIDTH
    if q_weight is not None:
        rms = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None]
        is_query = (head < H)[:, None]
        of_query = tl.load(q_weight + channel, mask=in_width, other=0.0).to(tl.float32)[None, :]
        of_key = tl.load(k_weight + channel, mask=in_width, other=0.0).to(tl.float32)[None, :]
        gain = tl.where(is_query, of_query, of_key)
        of_query = tl.load(q_weight + partner, mask=in_width, other=0.0).to(tl.float32)[None, :]
        of_key = tl.load(k_weight + partner, mask=in_width, other=0.0).to(tl.float32)[None, :]
        partner_gain = tl.where(is_query, of_query, of_key)
        x = _as_stored(_as_stored(x * rms, dtype, UPCAST) * gain, dtype, UPCAST)
        y = _as_stored(_as_stored(y * rms, dtype, UPCAST) * partner_gain, dtype, UPCAST)
    c = tl.load(cos + token * WIDTH + channel, mask=in_width, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * WIDTH + channel, mask=in_width, other=0.0).to(tl.float32)[None, :]
    rotated = _as_stored(x * c, dtype, UPCAST) + y * s
    out += token * (ALL * WIDTH) + head[:, None] * WIDTH + channel[None, :]
    tl.store(out, rotated.to(out.dtype.element_ty), mask=inside)


def rotated_heads(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_queries: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """See reference.rotated_heads."""
    heads = _with_dense_heads(heads)
    N, num_heads, width = heads.shape
    channels = triton.next_power_of_2(width)
    rows = max(HEAD_ELEMENTS // channels, 1)
    dtype = torch.float32 if INTERPRETED else heads.dtype
    out = torch.empty(N, num_heads, width, dtype=dtype, device=heads.device)
    rotate_kernel[N, triton.cdiv(num_heads, rows)](
        heads,
        q_weight,
        k_weight,
        cos.contiguous(),
        sin.contiguous(),
        out,
        num_queries,
        num_heads,
        heads.stride(0),
        eps,
        WIDTH=width,
        CHANNELS=channels,
        ROWS=rows,
        UPCAST=INTERPRETED,
    )
    return out.to(heads.dtype)


def _with_dense_heads(x: Tensor) -> Tensor:
    """`x` [B, heads, d] whose heads stand one behind the other, as the parts of qkv's rows do."""
    if x.stride(2) == 1 and x.stride(1) == x.shape[2]:
        return x
    return x.contiguous()


def decode_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    """See reference.decode_attention.

    Memory beyond the result: for each span of the longest prompt, 4 bytes for each number of q.
    """
    q = _with_dense_heads(q)
    k = _with_dense_heads(k)
    v = _with_dense_heads(v)
    B, H, width = q.shape
    KV = k.shape[1]
    heads = H // KV
    P, G = cache.members.shape
    S = triton.cdiv(cache.prompt_keys.shape[2], SPAN)
    channels = max(triton.next_power_of_2(width), LEAST_ROWS)
    # the interpreter cuts a number short where a GPU rounds it to bfloat16
    dtype = torch.float32 if INTERPRETED else q.dtype
    out = torch.empty(B, H, width, dtype=dtype, device=q.device)
    mixed = torch.empty(S, B, H, width, device=q.device)
    lse = torch.empty(S, B, H, device=q.device)
    scale = width**-0.5
    constants = {
        "HEADS": heads,
        "WIDTH": width,
        "CHANNELS": channels,
        "SPAN": SPAN,
        "TOKENS": tile_tokens(q.dtype, channels),
        "UPCAST": INTERPRETED,
    }
    rows = ROWS[q.dtype]
    prompt_kernel[triton.cdiv(G * heads, rows), S * KV, P](
        q,
        cache.prompt_keys,
        cache.prompt_values,
        cache.prompt_lengths,
        cache.row_prompt,
        cache.members,
        cache.member_index,
        mixed,
        lse,
        B,
        G,
        S,
        KV,
        q.stride(0),
        cache.prompt_keys.stride(0),
        cache.prompt_keys.stride(1),
        scale,
        ROWS=rows,
        num_warps=PROMPT_WARPS,
        num_stages=STAGES[q.dtype],
        **constants,
    )
    own_kernel[B, KV](
        q,
        k,
        v,
        cache.own_keys,
        cache.own_values,
        cache.own_lengths,
        cache.prompt_lengths,
        cache.row_prompt,
        cache.members,
        cache.member_index,
        mixed,
        lse,
        out,
        B,
        G,
        KV,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        cache.own_keys.stride(0),
        cache.own_keys.stride(1),
        scale,
        ROWS=max(triton.next_power_of_2(heads), LEAST_ROWS),
        num_warps=4,
        num_stages=STAGES[q.dtype],
        **constants,
    )
    return out.to(q.dtype)

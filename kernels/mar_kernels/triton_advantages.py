"""Advantages per token in one launch, as `reference.answer_advantages` defines them.

The reference starts some twenty kernels on a GPU and waits for it to count the groups. Neither is a
measurable part of a step; this one never waits, and reads like the definition of the estimator.

Letters: B rows, T tokens, C components, S segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import KERNEL_BASELINES, KERNEL_CREDITS, KERNEL_SCALES
from . import interpreter as interpreter  # mends it, where it runs the kernels

# rows or tokens, times components, that a program holds at a time: 16 numbers a thread, and of
# float64 4 (with 8 or 16, triton 3.6 or 3.7 keeps some of them in memory)
TILE_ELEMENTS = 2048
TILE_ELEMENTS_OF_FLOAT64 = 512

CHOICES = {"baseline": KERNEL_BASELINES, "scale": KERNEL_SCALES, "credit": KERNEL_CREDITS}


@triton.jit
def _weighted(components, weights, rows, B, C, COLUMNS: tl.constexpr):
    """Weighted components [rows, COLUMNS] of some completions, 0 past the last row or component."""
    c = tl.arange(0, COLUMNS)
    inside = (rows < B)[:, None] & (c < C)[None, :]
    at = rows.to(tl.int64)[:, None] * C + c[None, :]
    found = tl.load(components + at, mask=inside, other=0)
    weight = tl.load(weights + c, mask=c < C, other=0)[None, :]
    return (found * weight).to(components.dtype.element_ty)


@triton.jit(do_not_specialize=["B", "T"])
def advantages_kernel(
    components, weights, first_open, segment_ids, group_ids, out,
    B, T, C, S,
    CREDIT: tl.constexpr, BASELINE: tl.constexpr, SCALE: tl.constexpr,
    COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """All tokens of one completion b: it, minus its baseline, divided by the scale, to each token.

    Each program sums over the group on its own, so that none waits for another. COLUMNS is the
    power of two that holds all components; HEIGHT rows or tokens are taken at a time.
    """
    dtype = out.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, COLUMNS)[None, :]
    own = _weighted(components, weights, b + tl.zeros([1], tl.int64), B, C, COLUMNS)  # [1, COLUMNS]
    own_total = tl.sum(own, 1)

    # over the group: the sum of each component and the number of completions
    group_sums = tl.zeros([COLUMNS], dtype)
    group_count = tl.zeros([1], dtype)
    # over the pool whose total rewards are to have a standard deviation of 1. Their deviations are
    # from b's own total, so that equal totals give exactly 0.
    pool_count = tl.zeros([1], dtype)
    pool_sum = tl.zeros([1], dtype)
    pool_squares = tl.zeros([1], dtype)
    for start in range(0, B, HEIGHT):
        rows = start + tl.arange(0, HEIGHT)
        group = tl.load(group_ids + rows, mask=rows < B, other=0)
        mates = (rows < B) & (group == tl.load(group_ids + b))
        weighted = _weighted(components, weights, rows, B, C, COLUMNS)
        group_sums += tl.sum(tl.where(mates[:, None], weighted, 0.0), 0)
        group_count += tl.sum(mates.to(dtype), 0)
        pool = rows < B if SCALE == "batch_std" else mates
        deviation = tl.where(pool, tl.sum(weighted, 1) - own_total, 0.0)
        pool_count += tl.sum(pool.to(dtype), 0)
        pool_sum += tl.sum(deviation, 0)
        pool_squares += tl.sum(deviation * deviation, 0)

    if BASELINE == "leave_one_out":
        own -= (group_sums[None, :] - own) / tl.maximum(group_count - 1, 1.0)[:, None]
    elif BASELINE == "mean":
        own -= group_sums[None, :] / group_count[:, None]
    if SCALE != "none":
        squares = pool_squares - pool_sum * pool_sum / pool_count
        variance = squares / tl.maximum(pool_count - 1, 1.0)
        std = tl.sqrt(tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL))
        own /= tl.where(std > 1e-4, std + 1e-4, 1.0)[:, None]

    first_open += b * S
    for start in range(0, T, HEIGHT):
        tokens = start + tl.arange(0, HEIGHT)
        inside = tokens < T
        segment = tl.load(segment_ids + b * T + tokens, mask=inside, other=0)
        begin = tl.load(first_open + segment, mask=inside, other=0)[:, None]
        if CREDIT == "set":
            begin = tl.zeros_like(begin)
        is_open = c >= begin
        if CREDIT == "own":
            has_next = inside & (segment + 1 < S)
            end = tl.load(first_open + segment + 1, mask=has_next, other=C)[:, None]
            decides = (end > begin) & (begin < C - 1)
            is_open = is_open & ((decides == 0) | (c < end) | (c == C - 1))
        advantage = tl.sum(tl.where(is_open, own, 0.0), 1)
        tl.store(out + b * T + tokens, advantage, mask=inside)


def answer_advantages(
    components: Tensor,
    weights: Tensor,
    first_open: Tensor,
    segment_ids: Tensor,
    group_ids: Tensor,
    credit: str = "to_go",
    baseline: str = "leave_one_out",
    scale: str = "none",
    token_costs: Tensor | None = None,
) -> Tensor:
    """See reference.answer_advantages.

    Unlike there, segment ids are not checked against S: that would wait for the GPU. Raises
    ValueError for `token_costs`, which the kernel does not have.
    """
    if token_costs is not None:
        raise ValueError("the kernel has no token_costs: take backend=reference or auto")
    for name, chosen in (("baseline", baseline), ("scale", scale), ("credit", credit)):
        if chosen not in CHOICES[name]:
            raise ValueError(f"unknown {name} {chosen!r}")
    B, C = components.shape
    T = segment_ids.shape[1]
    S = first_open.shape[1]
    out = torch.empty(B, T, dtype=components.dtype, device=components.device)
    columns = triton.next_power_of_2(max(C, 1))
    is_double = components.dtype == torch.float64
    tile_elements = TILE_ELEMENTS_OF_FLOAT64 if is_double else TILE_ELEMENTS
    advantages_kernel[(B,)](
        components.contiguous(),
        weights.contiguous(),
        first_open.contiguous(),
        segment_ids.contiguous(),
        group_ids.contiguous(),
        out,
        B,
        T,
        C,
        S,
        CREDIT=credit,
        BASELINE=baseline,
        SCALE=scale,
        COLUMNS=columns,
        HEIGHT=max(tile_elements // columns, 1),
    )
    return out

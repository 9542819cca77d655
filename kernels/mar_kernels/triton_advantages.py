"""Advantages per token in one launch. What is computed is defined by `reference.answer_advantages`, which starts some twenty kernels for it and
waits for the GPU to count the groups. Neither is a measurable part of a step: this one never waits, and reads like the definition of the estimator.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 2048  # rows or tokens, times components, at a time: 16 numbers a thread
CHOICES = {
    "baseline": ("leave_one_out", "mean", "none"),
    "scale": ("none", "group_std", "batch_std"),
    "credit": ("to_go", "set", "own"),
}


@triton.jit
def _weighted(components, weights, rows, B, C, COLUMNS: tl.constexpr):
    """Weighted components [ROWS, COLUMNS] of some completions, 0 past the last one."""
    c = tl.arange(0, COLUMNS)
    inside = (rows < B)[:, None] & (c < C)[None, :]
    found = tl.load(components + rows.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0)
    return (found * tl.load(weights + c, mask=c < C, other=0)[None, :]).to(
        components.dtype.element_ty
    )


@triton.jit(do_not_specialize=["B", "T"])
def advantages_kernel(
    components, weights, first_open, segment_ids, groups, out, B, T, C, S,
    CREDIT: tl.constexpr, BASELINE: tl.constexpr, SCALE: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """All tokens of one completion. Each program sums over the group on its own, so that none waits for another."""
    dtype = out.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, COLUMNS)[None, :]
    own = _weighted(components, weights, b + tl.zeros([1], tl.int64), B, C, COLUMNS)  # [1, COLUMNS]
    total = tl.sum(own, 1)
    sums = tl.zeros([COLUMNS], dtype)
    count = tl.zeros([1], dtype)
    pool_count = tl.zeros(
        [1], dtype
    )  # the pool: whose totals are to have a standard deviation of 1
    pool_sum = tl.zeros([1], dtype)
    pool_squares = tl.zeros([1], dtype)
    for start in range(0, B, HEIGHT):
        rows = start + tl.arange(0, HEIGHT)
        mates = (rows < B) & (tl.load(groups + rows, mask=rows < B, other=0) == tl.load(groups + b))
        weighted = _weighted(components, weights, rows, B, C, COLUMNS)
        sums += tl.sum(tl.where(mates[:, None], weighted, 0.0), 0)
        count += tl.sum(mates.to(dtype), 0)
        pool = rows < B if SCALE == "batch_std" else mates
        deviation = tl.where(
            pool, tl.sum(weighted, 1) - total, 0.0
        )  # from one of them: equal totals give exactly 0
        pool_count += tl.sum(pool.to(dtype), 0)
        pool_sum += tl.sum(deviation, 0)
        pool_squares += tl.sum(deviation * deviation, 0)
    if BASELINE == "leave_one_out":
        own -= (sums[None, :] - own) / tl.maximum(count - 1, 1.0)[:, None]
    elif BASELINE == "mean":
        own -= sums[None, :] / count[:, None]
    if SCALE != "none":
        variance = (pool_squares - pool_sum * pool_sum / pool_count) / tl.maximum(
            pool_count - 1, 1.0
        )
        std = tl.sqrt(tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL))
        own /= tl.where(std > 1e-4, std + 1e-4, 1.0)[:, None]

    first_open += b * S
    for start in range(0, T, HEIGHT):
        tokens = start + tl.arange(0, HEIGHT)
        here = tokens < T
        segment = tl.load(segment_ids + b * T + tokens, mask=here, other=0)
        begin = tl.load(first_open + segment, mask=here, other=0)[:, None]
        if CREDIT == "set":
            begin = tl.zeros_like(begin)
        is_open = c >= begin
        if CREDIT == "own":
            end = tl.load(first_open + segment + 1, mask=here & (segment + 1 < S), other=C)[:, None]
            decides = (end > begin) & (begin < C - 1)
            is_open = is_open & ((decides == 0) | (c < end) | (c == C - 1))
        tl.store(out + b * T + tokens, tl.sum(tl.where(is_open, own, 0.0), 1), mask=here)


def answer_advantages(
    components: Tensor,
    weights: Tensor,
    first_open: Tensor,
    segment_ids: Tensor,
    groups: Tensor,
    credit: str = "to_go",
    baseline: str = "leave_one_out",
    scale: str = "none",
) -> Tensor:
    """As in the reference, the standard deviation included. Segments are not checked against S: that would wait for the GPU."""
    for name, chosen in (("baseline", baseline), ("scale", scale), ("credit", credit)):
        if chosen not in CHOICES[name]:
            raise ValueError(f"unknown {name} {chosen!r}")
    tensors = [x.contiguous() for x in (components, weights, first_open, segment_ids, groups)]
    (B, C), T, S = components.shape, segment_ids.shape[1], first_open.shape[1]
    out = torch.empty(B, T, dtype=components.dtype, device=components.device)
    columns = triton.next_power_of_2(max(C, 1))
    sizes = {"COLUMNS": columns, "HEIGHT": max(TILE_ELEMENTS // columns, 1)}
    advantages_kernel[(B,)](
        *tensors, out, B, T, C, S, CREDIT=credit, BASELINE=baseline, SCALE=scale, **sizes
    )
    return out

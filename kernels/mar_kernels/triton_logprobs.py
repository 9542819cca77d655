"""The log-probability kernels in Triton, for float32 and bfloat16. What they compute is defined by
`reference.py`.

Logits exist only as tiles in registers, of which online-softmax sums are kept (arXiv:1805.02867).
The backward of `linear_logprobs` also writes one bounded block of the logits' gradient, which
cuBLAS multiplies. Each number is written by one program and summed in a fixed order, without
atomics. Row offsets are 64 bits wide before they are multiplied. A kernel given no weight reads its
logits instead of computing them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = (
    triton.knobs.runtime.interpret
)  # TRITON_INTERPRET=1, as it was when the kernels below were made
BLOCK_ELEMENTS = 1 << 27  # the largest block of logit gradients: 256 MiB in bfloat16
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LEAST = tl.constexpr(
    -1e4
)  # as in the reference: what stands for the log of a probability of exactly 0


class Tiles(NamedTuple):
    """What a program has at a time: rows x columns of logits, `depth` of D in each tl.dot. Forward,
    a program takes `span` such tiles of a row; backward, one, of `grad_columns`.
    """

    rows: int
    columns: int
    grad_columns: int
    depth: int
    span: int
    num_warps: int
    num_stages: int

    def constants(self, columns: int) -> dict[str, int]:
        """The keywords of a launch."""
        sizes = {"ROWS": self.rows, "COLUMNS": columns, "DEPTH": self.depth, "UPCAST": INTERPRETED}
        return {**sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


TILES = {  # none of them spills (kernels/compile_report.py): on Hopper the larger tile does where the gradient is computed
    (torch.bfloat16, 80): Tiles(128, 128, 128, 32, 32, 8, 4),
    (torch.bfloat16, 90): Tiles(128, 256, 128, 64, 16, 8, 3),
    (torch.float32, 80): Tiles(64, 64, 64, 32, 64, 4, 2),
    (torch.float32, 90): Tiles(128, 128, 128, 32, 32, 8, 2),
}
LOADED = Tiles(4, 512, 512, 1, 256, 4, 1)  # where there is nothing to multiply
INTERPRETER = Tiles(
    32, 1 << 14, 1 << 14, 64, 4, 1, 1
)  # an interpreted tile costs milliseconds, whatever its size


def tiles_for(x: Tensor, weight: Tensor | None) -> Tiles:
    if INTERPRETED or weight is None:
        return INTERPRETER if INTERPRETED else LOADED
    major, _ = torch.cuda.get_device_capability(x.device)
    return TILES[x.dtype, 90 if major == 9 else 80]


@triton.jit
def _at_least(z):
    return tl.where(z < LEAST, LEAST, z)  # tl.maximum would lose a NaN


@triton.jit
def _logits(
    hidden, weight, rows, columns, N, V, D, hidden_stride, weight_stride, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The tile [ROWS, COLUMNS] of hidden @ weight.T * scale in float32, -inf past the end of the
    vocabulary.
    """
    hidden += rows.to(tl.int64)[:, None] * hidden_stride
    if weight is None:
        inside = (rows < N)[:, None] & (columns < V)[None, :]
        return tl.load(hidden + columns[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    else:
        depth = tl.arange(0, DEPTH)
        hidden += depth[None, :]
        weight += columns.to(tl.int64)[None, :] * weight_stride + depth[:, None]
        tile = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, D, DEPTH):
            inside = depth < D - start
            h = tl.load(hidden + start, mask=(rows < N)[:, None] & inside[None, :], other=0.0)
            w = tl.load(weight + start, mask=(columns < V)[None, :] & inside[:, None], other=0.0)
            if UPCAST:  # the interpreter is wrong for bfloat16 (triton issue 11584); on a GPU this would lose the bf16 tensor cores
                h, w = h.to(tl.float32), w.to(tl.float32)
            tile = tl.dot(h, w, tile, input_precision="tf32x3")
        return tl.where((columns < V)[None, :], tile * scale, float("-inf"))


@triton.jit(do_not_specialize=["N"])  # one compilation, whatever the number of tokens
def sums_kernel(
    hidden, weight, targets, parts, N, V, D, hidden_stride, weight_stride, scale,
    SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Over one span of the vocabulary: the largest logit, the sums of e = exp(z) and of e z (z =
    logit - largest), the target's logit -> parts [4, spans, N].
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets + rows, mask=rows < N, other=-1)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    chosen = tl.zeros([ROWS], tl.float32)
    left = tl.program_id(1) * SPAN * COLUMNS
    for start in range(left, tl.minimum(left + SPAN * COLUMNS, V), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logits = _logits(
            hidden,
            weight,
            rows,
            columns,
            N,
            V,
            D,
            hidden_stride,
            weight_stride,
            scale,
            ROWS,
            COLUMNS,
            DEPTH,
            UPCAST,
        )
        chosen += tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
        higher = tl.maximum(top, tl.max(logits, 1))
        z = _at_least(logits - higher[:, None])
        e = tl.exp(z)
        fall = _at_least(top - higher)
        moment = (moment + fall * total) * tl.exp(fall) + tl.sum(e * z, 1)
        total = total * tl.exp(fall) + tl.sum(e, 1)
        top = higher
    step = tl.num_programs(1).to(tl.int64) * N
    parts += tl.program_id(1).to(tl.int64) * N + rows
    tl.store(parts, top, mask=rows < N)
    tl.store(parts + step, total, mask=rows < N)
    tl.store(parts + 2 * step, moment, mask=rows < N)
    tl.store(parts + 3 * step, chosen, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def grads_kernel(
    hidden, weight, targets, lse, entropy, of_target, of_probs, of_entropy, block,
    left, N, V, D, hidden_stride, weight_stride, block_stride, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d loss / d (hidden @ weight.T) of one tile -> block [N, columns from `left` on]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = left + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = rows < N
    logits = _logits(
        hidden,
        weight,
        rows,
        columns,
        N,
        V,
        D,
        hidden_stride,
        weight_stride,
        scale,
        ROWS,
        COLUMNS,
        DEPTH,
        UPCAST,
    )
    logprobs = _at_least(logits - tl.load(lse + rows, mask=here, other=0.0)[:, None])
    slope = tl.load(of_probs + rows, mask=here, other=0.0)[:, None]
    if of_entropy is not None:  # dH/dz = -p (log p + H)
        from_entropy = tl.load(of_entropy + rows, mask=here, other=0.0)[:, None]
        slope = slope - from_entropy * (
            logprobs + tl.load(entropy + rows, mask=here, other=0.0)[:, None]
        )
    grads = tl.exp(logprobs) * slope
    if of_target is not None:
        target = tl.load(targets + rows, mask=here, other=-1)
        from_target = tl.load(of_target + rows, mask=here, other=0.0)
        grads += tl.where(columns[None, :] == target[:, None], from_target[:, None], 0.0)
    block += rows.to(tl.int64)[:, None] * block_stride + (columns - left)[None, :]
    tl.store(
        block,
        (grads * scale).to(block.dtype.element_ty),
        mask=here[:, None] & (columns < V)[None, :],
    )


class _LinearLogprobs(torch.autograd.Function):
    """Without a weight, `hidden` is the logits [N, V]."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor | None, targets: Tensor, temperature: float):
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        weight = weight if weight is None or weight.stride(1) == 1 else weight.contiguous()
        targets, tiles = targets.contiguous(), tiles_for(hidden, weight)
        (N, D), V = hidden.shape, len(hidden.T if weight is None else weight)
        grid = triton.cdiv(N, tiles.rows), triton.cdiv(V, tiles.columns * tiles.span)
        parts = torch.empty(4, grid[1], N, device=hidden.device)
        sizes = (
            N,
            V,
            D,
            hidden.stride(0),
            0 if weight is None else weight.stride(0),
            1 / temperature,
        )
        sums_kernel[grid](
            hidden,
            weight,
            targets,
            parts,
            *sizes,
            SPAN=tiles.span,
            **tiles.constants(tiles.columns),
        )
        tops, totals, moments, chosen = parts
        top = tops.amax(0)
        fall = (tops - top).clamp(min=LEAST.value)
        total = (totals * fall.exp()).sum(0)
        lse = top + total.log()
        entropy = total.log() - ((moments + fall * totals) * fall.exp()).sum(0) / total
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.sizes, ctx.tiles = sizes, tiles
        ctx.set_materialize_grads(False)  # an output that nobody uses costs nothing in backward
        return chosen.sum(0) - lse, entropy, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_target: Tensor | None, of_entropy: Tensor | None, of_lse: Tensor | None):
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        (N, V, D, *strides, scale), tiles = ctx.sizes, ctx.tiles
        of_target, of_entropy = (
            None if g is None else g.contiguous() for g in (of_target, of_entropy)
        )
        of_probs = torch.zeros_like(lse) if of_lse is None else of_lse.contiguous()
        of_probs = (
            of_probs if of_target is None else of_probs - of_target
        )  # dlse/dz = p, dlogprob/dz = onehot - p
        width = (
            V
            if weight is None
            else max(BLOCK_ELEMENTS // max(N, 1) // tiles.grad_columns, 1) * tiles.grad_columns
        )
        dtype = torch.float32 if INTERPRETED else hidden.dtype
        buffer = torch.empty(N, min(width, V), dtype=dtype, device=hidden.device)
        grad_hidden = buffer if weight is None else torch.zeros(N, D, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for left in range(0, V, width):
            columns = slice(left, min(left + width, V))
            block = buffer[:, : columns.stop - left]
            grid = triton.cdiv(N, tiles.rows), triton.cdiv(block.shape[1], tiles.grad_columns)
            upstream = (lse, entropy, of_target, of_probs, of_entropy)
            sizes = (left, N, V, D, *strides, block.stride(0), scale)
            grads_kernel[grid](
                hidden,
                weight,
                targets,
                *upstream,
                block,
                *sizes,
                **tiles.constants(tiles.grad_columns),
            )
            if weight is not None and ctx.needs_input_grad[0]:
                grad_hidden += _mm(block, weight[columns])
            if grad_weight is not None:
                grad_weight[columns] = _mm(block.T, hidden)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32; `a` is bfloat16 on a GPU only."""
    return (
        torch.mm(a, b.float())
        if a.dtype == torch.float32
        else torch.mm(a, b, out_dtype=torch.float32)
    )


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """As in the reference. Beyond outputs and gradients: 16 bytes per row and span, and in backward
    one block and two products of it.
    """
    return _LinearLogprobs.apply(hidden, weight, targets, temperature)


def selected_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """As in the reference; the only [N, V] tensor it makes is the gradient."""
    return _LinearLogprobs.apply(logits, None, targets, 1.0)[0].to(logits.dtype)

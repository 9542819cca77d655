"""The log-probability kernels in Triton, for float32 and bfloat16, as `reference.py` defines them.

Logits exist only as tiles in registers, of which the sums of the online softmax are kept
(arXiv:1805.02867). The backward pass of `linear_logprobs` also writes one bounded block of the
gradient of the logits, which cuBLAS multiplies. A kernel that gets no weight reads its logits
instead of computing them.

Each number is written by one program and summed in a fixed order, without atomics, so results
repeat to the last bit. Row offsets are 64 bits wide before they are multiplied.

Letters: M trained tokens (rows), V vocabulary (columns), D width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import INTERPRETED

# the largest block of the gradient of the logits: 256 MiB in bfloat16
BLOCK_ELEMENTS = 1 << 27

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

# what stands for the log of a probability of exactly 0, as in the reference
LEAST = tl.constexpr(-1e4)


class Tiles(NamedTuple):
    """What a program holds at a time: rows x columns of logits, `depth` of D in each tl.dot.

    Forward, a program takes `span` such tiles of a row one after the other; backward, one tile, of
    `grad_columns` columns.
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
        return {
            "ROWS": self.rows,
            "COLUMNS": columns,
            "DEPTH": self.depth,
            "UPCAST": INTERPRETED,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# By type and compute capability. None of them spills (kernels/compile_report.py): on Hopper the
# larger tile would where the gradient is computed, hence its smaller `grad_columns`.
TILES = {
    (torch.bfloat16, 80): Tiles(128, 128, 128, 32, 32, 8, 4),
    (torch.bfloat16, 90): Tiles(128, 256, 128, 64, 16, 8, 3),
    (torch.float32, 80): Tiles(64, 64, 64, 32, 64, 4, 2),
    (torch.float32, 90): Tiles(128, 128, 128, 32, 32, 8, 2),
}

# where logits are read and nothing is multiplied
LOADED = Tiles(4, 512, 512, 1, 256, 4, 1)

# an interpreted tile costs milliseconds, whatever its size
INTERPRETER = Tiles(32, 1 << 14, 1 << 14, 64, 4, 1, 1)


def tiles_for(x: Tensor, weight: Tensor | None) -> Tiles:
    if INTERPRETED:
        return INTERPRETER
    if weight is None:
        return LOADED
    major, _ = torch.cuda.get_device_capability(x.device)
    return TILES[x.dtype, 90 if major == 9 else 80]


@triton.jit
def _at_least(z):
    # tl.maximum would lose a NaN
    return tl.where(z < LEAST, LEAST, z)


@triton.jit
def _logits(
    hidden, weight, rows, columns,
    M, V, D, hidden_stride, weight_stride, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The tile [ROWS, COLUMNS] of hidden @ weight.T * scale in float32.

    It is -inf past the end of the vocabulary.
    """
    hidden += rows.to(tl.int64)[:, None] * hidden_stride
    if weight is None:
        inside = (rows < M)[:, None] & (columns < V)[None, :]
        return tl.load(hidden + columns[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    else:
        depth = tl.arange(0, DEPTH)
        hidden += depth[None, :]
        weight += columns.to(tl.int64)[None, :] * weight_stride + depth[:, None]
        tile = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, D, DEPTH):
            inside = depth < D - start
            h = tl.load(hidden + start, mask=(rows < M)[:, None] & inside[None, :], other=0.0)
            w = tl.load(weight + start, mask=(columns < V)[None, :] & inside[:, None], other=0.0)
            # the interpreter is wrong for bfloat16 (triton issue 11584); on a GPU this would lose
            # the tensor cores for bfloat16
            if UPCAST:
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            tile = tl.dot(h, w, tile, input_precision="tf32x3")
        return tl.where((columns < V)[None, :], tile * scale, float("-inf"))


# not specialised for M: one compilation, whatever the number of tokens
@triton.jit(do_not_specialize=["M"])
def sums_kernel(
    hidden, weight, targets, parts,
    M, V, D, hidden_stride, weight_stride, scale,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The sums of the online softmax over one span of the vocabulary -> parts [4, spans, M].

    In this order: the largest logit; the sum of e = exp(z) with z = logit - largest; the sum of
    e z; the logit of the target, 0 where the span does not hold it.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets + rows, mask=rows < M, other=-1)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    chosen = tl.zeros([ROWS], tl.float32)
    left = tl.program_id(1) * SPAN * COLUMNS
    for start in range(left, tl.minimum(left + SPAN * COLUMNS, V), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logits = _logits(
            hidden, weight, rows, columns,
            M, V, D, hidden_stride, weight_stride, scale,
            ROWS, COLUMNS, DEPTH, UPCAST,
        )  # fmt: skip
        chosen += tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
        new_top = tl.maximum(top, tl.max(logits, 1))
        z = _at_least(logits - new_top[:, None])
        e = tl.exp(z)
        # the sums so far are brought from the old top to the new one
        fall = _at_least(top - new_top)
        moment = (moment + fall * total) * tl.exp(fall) + tl.sum(e * z, 1)
        total = total * tl.exp(fall) + tl.sum(e, 1)
        top = new_top
    step = tl.num_programs(1).to(tl.int64) * M
    parts += tl.program_id(1).to(tl.int64) * M + rows
    tl.store(parts, top, mask=rows < M)
    tl.store(parts + step, total, mask=rows < M)
    tl.store(parts + 2 * step, moment, mask=rows < M)
    tl.store(parts + 3 * step, chosen, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def grads_kernel(
    hidden, weight, targets, lse, entropy, of_target, of_probs, of_entropy, block,
    left, M, V, D, hidden_stride, weight_stride, block_stride, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d loss / d (hidden @ weight.T) of one tile -> block [M, columns from `left` on].

    From above, [M] each: `of_target` multiplies the one-hot vector of the target, `of_probs` the
    probabilities p, and `of_entropy` the gradient of the entropy, -p (log p + entropy).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = left + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = rows < M
    logits = _logits(
        hidden, weight, rows, columns,
        M, V, D, hidden_stride, weight_stride, scale,
        ROWS, COLUMNS, DEPTH, UPCAST,
    )  # fmt: skip
    logprobs = _at_least(logits - tl.load(lse + rows, mask=inside, other=0.0)[:, None])
    slope = tl.load(of_probs + rows, mask=inside, other=0.0)[:, None]
    if of_entropy is not None:
        from_entropy = tl.load(of_entropy + rows, mask=inside, other=0.0)[:, None]
        row_entropy = tl.load(entropy + rows, mask=inside, other=0.0)[:, None]
        slope = slope - from_entropy * (logprobs + row_entropy)
    grads = tl.exp(logprobs) * slope
    if of_target is not None:
        target = tl.load(targets + rows, mask=inside, other=-1)
        from_target = tl.load(of_target + rows, mask=inside, other=0.0)
        grads += tl.where(columns[None, :] == target[:, None], from_target[:, None], 0.0)
    block += rows.to(tl.int64)[:, None] * block_stride + (columns - left)[None, :]
    stored = (grads * scale).to(block.dtype.element_ty)
    tl.store(block, stored, mask=inside[:, None] & (columns < V)[None, :])


def _with_contiguous_rows(x: Tensor) -> Tensor:
    if x.stride(1) == 1:
        return x
    return x.contiguous()


def _contiguous(grad: Tensor | None) -> Tensor | None:
    """A gradient from above may be one number, expanded without memory of its own."""
    return None if grad is None else grad.contiguous()


class _LinearLogprobs(torch.autograd.Function):
    """Without a weight, `hidden` is the logits [M, V]."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor | None, targets: Tensor, temperature: float):
        hidden = _with_contiguous_rows(hidden)
        if weight is not None:
            weight = _with_contiguous_rows(weight)
        targets = targets.contiguous()
        tiles = tiles_for(hidden, weight)
        M, D = hidden.shape
        V = D if weight is None else len(weight)
        num_spans = triton.cdiv(V, tiles.columns * tiles.span)
        parts = torch.empty(4, num_spans, M, device=hidden.device)
        ctx.scale = 1 / temperature
        sums_kernel[triton.cdiv(M, tiles.rows), num_spans](
            hidden,
            weight,
            targets,
            parts,
            M,
            V,
            D,
            hidden.stride(0),
            0 if weight is None else weight.stride(0),
            ctx.scale,
            SPAN=tiles.span,
            **tiles.constants(tiles.columns),
        )

        # the sums of the spans, brought to the largest logit of the row, add up
        tops, totals, moments, chosen = parts
        top = tops.amax(0)
        fall = (tops - top).clamp(min=LEAST.value)
        total = (totals * fall.exp()).sum(0)
        moment = ((moments + fall * totals) * fall.exp()).sum(0)
        lse = top + total.log()
        entropy = total.log() - moment / total
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.tiles = tiles
        # an output that nobody uses costs nothing in backward
        ctx.set_materialize_grads(False)
        return chosen.sum(0) - lse, entropy, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_target: Tensor | None, of_entropy: Tensor | None, of_lse: Tensor | None):
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        tiles = ctx.tiles
        M, D = hidden.shape
        V = D if weight is None else len(weight)

        # d lse / dz = p and d logprob / dz = onehot - p
        of_target = _contiguous(of_target)
        of_entropy = _contiguous(of_entropy)
        of_probs = torch.zeros_like(lse) if of_lse is None else of_lse.contiguous()
        if of_target is not None:
            of_probs = of_probs - of_target

        # The columns whose gradients are held at a time. Without a weight these gradients are the
        # result, so all of them.
        width = V
        if weight is not None:
            tiles_in_block = BLOCK_ELEMENTS // max(M, 1) // tiles.grad_columns
            width = max(tiles_in_block, 1) * tiles.grad_columns
        dtype = torch.float32 if INTERPRETED else hidden.dtype
        buffer = torch.empty(M, min(width, V), dtype=dtype, device=hidden.device)
        grad_hidden = buffer if weight is None else torch.zeros(M, D, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None

        for left in range(0, V, width):
            columns = slice(left, min(left + width, V))
            block = buffer[:, : columns.stop - left]
            grid = triton.cdiv(M, tiles.rows), triton.cdiv(block.shape[1], tiles.grad_columns)
            grads_kernel[grid](
                hidden,
                weight,
                targets,
                lse,
                entropy,
                of_target,
                of_probs,
                of_entropy,
                block,
                left,
                M,
                V,
                D,
                hidden.stride(0),
                0 if weight is None else weight.stride(0),
                block.stride(0),
                ctx.scale,
                **tiles.constants(tiles.grad_columns),
            )
            if weight is not None and ctx.needs_input_grad[0]:
                grad_hidden += _mm(block, weight[columns])
            if grad_weight is not None:
                grad_weight[columns] = _mm(block.T, hidden)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32; `a` is bfloat16 on a GPU only."""
    if a.dtype == torch.float32:
        return torch.mm(a, b.float())
    return torch.mm(a, b, out_dtype=torch.float32)


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.linear_logprobs.

    Memory beyond outputs and gradients: 16 bytes per row and span, and in the backward pass one
    block of the gradient of the logits and two products of it.
    """
    return _LinearLogprobs.apply(hidden, weight, targets, temperature)


def selected_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """See reference.selected_logprobs; the only [M, V] tensor that it makes is the gradient."""
    return _LinearLogprobs.apply(logits, None, targets, 1.0)[0].to(logits.dtype)

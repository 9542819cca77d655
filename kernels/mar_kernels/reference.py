"""The specification of every kernel, in plain PyTorch and bounded in memory."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

BLOCK_ELEMENTS = (
    1 << 21
)  # the largest block of logits ever held: 8 MiB in float32, which a cache holds between passes
BLOCK_ROWS = 1 << 12  # tall blocks read the weight, the largest operand, the fewest times
LEAST = -1e4  # a log-probability below it is one of exactly 0, whose product with it is 0 and not the NaN of 0 * -inf


def _blocks(num_rows: int, vocab_size: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each block of the [N, V] logits, row after row of blocks."""
    height = max(1, min(num_rows, BLOCK_ROWS, BLOCK_ELEMENTS))
    width = max(1, BLOCK_ELEMENTS // height)
    for top, left in product(range(0, num_rows, height), range(0, vocab_size, width)):
        yield slice(top, min(top + height, num_rows)), slice(left, min(left + width, vocab_size))


class _LinearLogprobs(torch.autograd.Function):
    """The logits are computed block by block, once for the outputs (online softmax, arXiv:1805.02867) and again for the gradients."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):  # type: ignore[no-untyped-def]
        N, V = hidden.shape[0], weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scaled = hidden.to(wide) / temperature
        top = scaled.new_full((N,), torch.finfo(wide).min)  # the largest logit so far
        total, moment, chosen = (
            scaled.new_zeros(N) for _ in range(3)
        )  # sum e, sum e z (z = logit - top), target's logit
        for rows, columns in _blocks(N, V):
            logits = scaled[rows] @ weight[columns].to(wide).T
            place = targets[rows] - columns.start
            inside = (place >= 0) & (place < logits.shape[1])
            found = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
            chosen[rows] = torch.where(inside, found, chosen[rows])
            higher = torch.maximum(top[rows], logits.amax(1))
            z = logits.sub_(higher[:, None]).clamp_(min=LEAST)
            e = z.exp()
            fall = top[rows] - higher
            moment[rows] = (moment[rows] + fall * total[rows]) * fall.exp() + torch.linalg.vecdot(
                e, z
            )
            total[rows] = total[rows] * fall.exp() + e.sum(1)
            top[rows] = higher
        lse = top + total.log()
        entropy = total.log() - moment / total
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an output that nobody uses costs nothing in backward
        return chosen - lse, entropy, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[no-untyped-def]
        ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
    ):
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        scaled = hidden.to(lse.dtype) / ctx.temperature
        grad_hidden = torch.zeros_like(scaled)
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        of_target = torch.zeros_like(lse) if grad_logprobs is None else grad_logprobs
        of_probs = (
            0 if grad_lse is None else grad_lse
        ) - of_target  # dlse/dz = p, dlogprob/dz = onehot - p
        for rows, columns in _blocks(*hidden.shape[:1], *weight.shape[:1]):
            head = weight[columns].to(lse.dtype)
            logprobs = (scaled[rows] @ head.T).sub_(lse[rows, None]).clamp_(min=LEAST)
            grad_logits = logprobs.exp()  # the probabilities, times what follows
            if grad_entropy is None:
                grad_logits.mul_(of_probs[rows, None])
            else:  # dH/dz = -p (log p + H)
                slope = logprobs.add_(entropy[rows, None]).mul_(-grad_entropy[rows, None])
                grad_logits.mul_(slope.add_(of_probs[rows, None]))
            place = targets[rows] - columns.start
            inside = (place >= 0) & (place < grad_logits.shape[1])
            place = place.clamp(0, grad_logits.shape[1] - 1)
            grad_logits.scatter_add_(
                1, place[:, None], torch.where(inside, of_target[rows], 0)[:, None]
            )
            grad_hidden[rows].addmm_(grad_logits, head)
            if grad_weight is not None:
                grad_weight[columns].addmm_(grad_logits.T, scaled[rows])
        grad_hidden = grad_hidden.div_(ctx.temperature).to(hidden.dtype)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
        )


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of `targets`, entropy and log-sum-exp of softmax(hidden @ weight.T / temperature).

    hidden [N, D], weight [V, D], targets [N] int64 -> three tensors [N] of float32 or wider, in nats, differentiable in hidden and weight. The
    [N, V] logits never exist: forward and backward hold one block of at most `BLOCK_ELEMENTS`, and compute 2NVD and 6NVD FLOPs. A token of logit
    -inf has probability 0 and no gradient; NaN in an input or in a gradient from above comes out as NaN.
    """
    return _LinearLogprobs.apply(hidden, weight, targets, temperature)


def selected_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log_softmax(logits [N, V]) at targets [N] -> [N], without writing the [N, V] log-probabilities."""
    return logits.gather(-1, targets[:, None]).squeeze(-1) - torch.logsumexp(logits, dim=-1)


def _group_sums(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(num_groups, *values.shape[1:]).index_add_(0, groups, values)


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
    """One advantage per token from the reward components of each completion (the to-go estimator).

    components [B, C] in the order in which they are decided, the last one being decided at the very end; weights [C]; first_open [B, S]: the first
    component still undecided when segment s begins; segment_ids [B, T]; groups [B]: which prompt. Returns [B, T]:

        A_t = sum over the components c that are open at t of  w_c (c - B_c),     B_c the group's baseline of component c

    credit: `to_go` (open: decided at or after the token's segment; unbiased), `set` (open: all of them; one scalar a completion), `own`
    (those decided in the token's own segment, all open ones where it decides none, and always the last; biased).
    baseline: `leave_one_out` (mean of the other completions), `mean` (of all), `none`. scale: `none`, `group_std` or `batch_std` of the total.
    """
    B, C = components.shape
    num_groups = int(groups.max()) + 1 if B else 0
    weighted = components * weights
    counts = _group_sums(weighted.new_ones(B), groups, num_groups)[groups][:, None]  # [B, 1]
    sums = _group_sums(weighted, groups, num_groups)[groups]  # [B, C]
    if baseline == "leave_one_out":
        centred = weighted - (sums - weighted) / (counts - 1).clamp(min=1)
    elif baseline == "mean":
        centred = weighted - sums / counts
    elif baseline == "none":
        centred = weighted
    else:
        raise ValueError(f"unknown baseline {baseline!r}")

    if scale != "none":
        total = weighted.sum(1)
        if scale == "group_std":
            deviation = total - _group_sums(total, groups, num_groups)[groups] / counts[:, 0]
            variance = _group_sums(deviation**2, groups, num_groups)[groups] / (
                counts[:, 0] - 1
            ).clamp(min=1)
        elif scale == "batch_std":
            variance = ((total - total.mean()) ** 2).sum() / max(B - 1, 1)
        else:
            raise ValueError(f"unknown scale {scale!r}")
        std = (
            variance.sqrt()
        )  # totals can all agree where components do not: nothing to divide by, then
        centred = centred / torch.where(std > 1e-4, std + 1e-4, torch.ones_like(std)).reshape(-1, 1)

    after = torch.zeros(B, C + 1, dtype=components.dtype, device=components.device)
    after[:, :C] = (
        centred.flip(1).cumsum(1).flip(1)
    )  # after[:, c]: everything decided from component c on
    start = first_open.gather(1, segment_ids)  # [B, T]
    if credit == "to_go":
        return after.gather(1, start)
    if credit == "set":
        return after[:, :1].expand(-1, segment_ids.shape[1]).clone()
    if credit == "own":
        following = torch.cat(
            [first_open[:, 1:], torch.full_like(first_open[:, :1], C)], dim=1
        ).gather(1, segment_ids)
        last = torch.full_like(start, C - 1)
        decides = (following > start) & (start < C - 1)
        own = (
            after.gather(1, start)
            - after.gather(1, torch.minimum(following, last))
            + after.gather(1, last)
        )
        return torch.where(decides, own, after.gather(1, start))
    raise ValueError(f"unknown credit {credit!r}")

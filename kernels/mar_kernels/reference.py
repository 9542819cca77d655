"""The specification of every kernel, in plain PyTorch and bounded in memory.

Letters: M trained tokens, V vocabulary, D width; B rows, T tokens, C components, S segments.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

# the largest block of logits ever held: 8 MiB in float32, which a cache holds between two passes
BLOCK_ELEMENTS = 1 << 21

# tall blocks read the weight, the largest operand, the fewest times
BLOCK_ROWS = 1 << 12

# A log-probability below this stands for a probability of exactly 0. Its product with that 0 is
# then 0, and not the NaN of 0 * -inf.
LEAST = -1e4


def _blocks(num_rows: int, vocab_size: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each block of the [M, V] logits, row after row of blocks."""
    height = max(1, min(num_rows, BLOCK_ROWS, BLOCK_ELEMENTS))
    width = max(1, BLOCK_ELEMENTS // height)
    for top, left in product(range(0, num_rows, height), range(0, vocab_size, width)):
        rows = slice(top, min(top + height, num_rows))
        columns = slice(left, min(left + width, vocab_size))
        yield rows, columns


def _targets_in_block(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """The column of each target within the block, and whether it lies inside: [M], [M] bool.

    Where it does not, the column is any of the block.
    """
    column = targets - columns.start
    width = columns.stop - columns.start
    inside = (column >= 0) & (column < width)
    return column.clamp(0, width - 1), inside


class _LinearLogprobs(torch.autograd.Function):
    """The logits are computed block by block, once for the outputs and again for the gradients.

    Of each row's logits the forward pass keeps over the blocks so far (online softmax,
    arXiv:1805.02867):

        top     the largest
        total   sum of e = exp(z) with z = logit - top
        moment  sum of e z
        chosen  the target's

    From these:

        lse = top + log(total)
        entropy = log(total) - moment / total
        logprob = chosen - lse
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows = hidden.shape[0]
        vocab_size = weight.shape[0]
        precise = torch.promote_types(hidden.dtype, torch.float32)
        scaled = hidden.to(precise) / temperature
        top = scaled.new_full((num_rows,), torch.finfo(precise).min)
        total = scaled.new_zeros(num_rows)
        moment = scaled.new_zeros(num_rows)
        chosen = scaled.new_zeros(num_rows)

        for rows, columns in _blocks(num_rows, vocab_size):
            logits = scaled[rows] @ weight[columns].to(precise).T
            column, inside = _targets_in_block(targets[rows], columns)
            at_target = logits.gather(1, column[:, None]).squeeze(1)
            chosen[rows] = torch.where(inside, at_target, chosen[rows])

            new_top = torch.maximum(top[rows], logits.amax(1))
            z = logits.sub_(new_top[:, None]).clamp_(min=LEAST)
            e = z.exp()
            # the sums so far, brought from the old top to the new one
            fall = top[rows] - new_top
            old_moment = (moment[rows] + fall * total[rows]) * fall.exp()
            old_total = total[rows] * fall.exp()
            moment[rows] = old_moment + torch.linalg.vecdot(e, z)
            total[rows] = old_total + e.sum(1)
            top[rows] = new_top

        lse = top + total.log()
        entropy = total.log() - moment / total
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature = temperature
        # an output that nobody uses costs nothing in backward
        ctx.set_materialize_grads(False)
        return chosen - lse, entropy, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, None, None]:
        """Through the logits z, with p their softmax and `onehot` that of the target:

        d logprob / dz = onehot - p
        d lse / dz     = p
        d entropy / dz = -p (log p + entropy)
        """
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        scaled = hidden.to(lse.dtype) / ctx.temperature
        grad_hidden = torch.zeros_like(scaled)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=lse.dtype)

        # what multiplies onehot, and what multiplies p
        zero = torch.zeros_like(lse)
        of_target = zero if grad_logprobs is None else grad_logprobs
        of_lse = zero if grad_lse is None else grad_lse
        of_probs = of_lse - of_target

        for rows, columns in _blocks(hidden.shape[0], weight.shape[0]):
            head = weight[columns].to(lse.dtype)
            logprobs = (scaled[rows] @ head.T).sub_(lse[rows, None]).clamp_(min=LEAST)
            # the probabilities, which become the gradient in place
            grad_logits = logprobs.exp()
            if grad_entropy is None:
                grad_logits.mul_(of_probs[rows, None])
            else:
                slope = logprobs.add_(entropy[rows, None]).mul_(-grad_entropy[rows, None])
                grad_logits.mul_(slope.add_(of_probs[rows, None]))
            column, inside = _targets_in_block(targets[rows], columns)
            at_target = torch.where(inside, of_target[rows], 0)
            grad_logits.scatter_add_(1, column[:, None], at_target[:, None])

            grad_hidden[rows].addmm_(grad_logits, head)
            if grad_weight is not None:
                grad_weight[columns].addmm_(grad_logits.T, scaled[rows])

        grad_hidden = grad_hidden.div_(ctx.temperature).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of `targets`, entropy and log-sum-exp, without the logits in memory.

    Of softmax(hidden @ weight.T / temperature): hidden [M, D], weight [V, D], targets [M] int64
    -> three tensors [M] of float32 or wider, in nats, differentiable in hidden and weight.

    The [M, V] logits never exist: forward and backward hold one block of at most `BLOCK_ELEMENTS`,
    and compute 2 M V D and 6 M V D FLOPs. A token of logit -inf has probability 0 and no gradient.
    NaN in an input or in a gradient from above comes out as NaN.
    """
    return _LinearLogprobs.apply(hidden, weight, targets, temperature)


def selected_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log_softmax(logits [M, V]) at targets [M] -> [M], without all the other log-probabilities."""
    return logits.gather(-1, targets[:, None]).squeeze(-1) - torch.logsumexp(logits, dim=-1)


def _group_sums(values: Tensor, group_ids: Tensor) -> Tensor:
    """For each row of values [B, ...], the sum over the rows of its group."""
    num_groups = 0
    if len(group_ids) > 0:
        num_groups = int(group_ids.max()) + 1
    sums = values.new_zeros(num_groups, *values.shape[1:]).index_add_(0, group_ids, values)
    return sums[group_ids]


def answer_advantages(
    components: Tensor,
    weights: Tensor,
    first_open: Tensor,
    segment_ids: Tensor,
    group_ids: Tensor,
    credit: str = "to_go",
    baseline: str = "leave_one_out",
    scale: str = "none",
) -> Tensor:
    """One advantage per token [B, T] from the reward components of each completion.

        A_t = sum over the components c that are open at token t of  w_c (component_c - baseline_c)

    components   [B, C] in the order in which they are decided, the last one at the very end
    weights      [C]
    first_open   [B, S] the first component that is still undecided when segment s begins
    segment_ids  [B, T] the segment of each token
    group_ids    [B] which prompt a row belongs to

    credit, the components that count as open:
        to_go          decided in the token's segment or later (unbiased)
        set            all of them: one number per completion
        own            decided in the token's own segment, and always the last; where that segment
                       decides none, those of to_go (biased)
    baseline, of each component over the group:
        leave_one_out  mean of the other completions
        mean           mean of all
        none           0
    scale, what advantages are divided by:
        group_std      standard deviation of the total reward in the group
        batch_std      that among all rows
        none           1
    """
    weighted = components * weights
    centred = _minus_baseline(weighted, group_ids, baseline)
    if scale != "none":
        std = _reward_std(weighted.sum(1), group_ids, scale)
        # totals can all agree where components do not: there is nothing to divide by then
        divisor = torch.where(std > 1e-4, std + 1e-4, torch.ones_like(std))
        centred = centred / divisor.reshape(-1, 1)
    return _credited(centred, first_open, segment_ids, credit)


def _minus_baseline(weighted: Tensor, group_ids: Tensor, baseline: str) -> Tensor:
    """Weighted components [B, C] minus their baseline in the group."""
    sums = _group_sums(weighted, group_ids)
    counts = _group_sums(weighted.new_ones(len(weighted), 1), group_ids)
    if baseline == "leave_one_out":
        others = sums - weighted
        # a completion without others keeps its components: 0 is their baseline
        return weighted - others / (counts - 1).clamp(min=1)
    if baseline == "mean":
        return weighted - sums / counts
    if baseline == "none":
        return weighted
    raise ValueError(f"unknown baseline {baseline!r}")


def _reward_std(totals: Tensor, group_ids: Tensor, scale: str) -> Tensor:
    """Sample standard deviation of the total rewards [B], in each row's group [B] or of all []."""
    if scale == "group_std":
        counts = _group_sums(torch.ones_like(totals), group_ids)
        deviations = totals - _group_sums(totals, group_ids) / counts
        return (_group_sums(deviations**2, group_ids) / (counts - 1).clamp(min=1)).sqrt()
    if scale == "batch_std":
        deviations = totals - totals.mean()
        return ((deviations**2).sum() / max(len(totals) - 1, 1)).sqrt()
    raise ValueError(f"unknown scale {scale!r}")


def _credited(centred: Tensor, first_open: Tensor, segment_ids: Tensor, credit: str) -> Tensor:
    """For each token [B, T] the sum of the components [B, C] that it is credited with."""
    num_rows, num_components = centred.shape
    last = num_components - 1
    # sum_from[:, c] is the sum of everything decided from component c on, for c = C nothing
    sum_from = centred.new_zeros(num_rows, num_components + 1)
    sum_from[:, :num_components] = centred.flip(1).cumsum(1).flip(1)

    start = first_open.gather(1, segment_ids)  # [B, T]
    to_go = sum_from.gather(1, start)
    if credit == "to_go":
        return to_go
    if credit == "set":
        return sum_from[:, :1].expand(-1, segment_ids.shape[1]).clone()
    if credit == "own":
        # what the segment decides ends where the next segment's first open component begins
        none_open = torch.full_like(first_open[:, :1], num_components)
        next_first_open = torch.cat([first_open[:, 1:], none_open], dim=1)
        end = next_first_open.gather(1, segment_ids)
        decides = (end > start) & (start < last)
        # from start to end, and the last component whether it is among them or not
        last_index = torch.full_like(start, last)
        sum_from_end = sum_from.gather(1, torch.minimum(end, last_index))
        own = to_go - sum_from_end + sum_from.gather(1, last_index)
        return torch.where(decides, own, to_go)
    raise ValueError(f"unknown credit {credit!r}")

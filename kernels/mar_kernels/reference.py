"""The specification of every kernel, in plain PyTorch and bounded in memory."""

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 23  # the largest [rows, V] block ever held: 32 MiB in float32


def _row_blocks(num_rows: int, vocab_size: int) -> list[slice]:
    rows = max(1, BLOCK_ELEMENTS // vocab_size)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


class _LinearLogprobs(torch.autograd.Function):
    """Log-softmax of `hidden @ weight.T / temperature` at the targets, recomputed block by block in the backward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):  # type: ignore[no-untyped-def]
        logprobs, entropy, lse = (hidden.new_empty(hidden.shape[0]) for _ in range(3))
        for rows in _row_blocks(hidden.shape[0], weight.shape[0]):
            logits = (hidden[rows] @ weight.T).div_(temperature)  # [n, V]
            lse[rows] = torch.logsumexp(logits, dim=-1)
            logprobs[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - lse[rows]
            probs = (logits - lse[rows, None]).exp_()
            entropy[rows] = lse[rows] - probs.mul_(logits).nan_to_num_(0.0).sum(-1)  # 0 * -inf is 0 here
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an output that nobody uses costs nothing in backward
        return logprobs, entropy, lse

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None):  # type: ignore[no-untyped-def]
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
        of_target = torch.zeros_like(lse) if grad_logprobs is None else grad_logprobs
        of_probs = (0 if grad_lse is None else grad_lse) - of_target  # dlse/dz = p, dlogprob/dz = onehot - p
        for rows in _row_blocks(hidden.shape[0], weight.shape[0]):
            logits = (hidden[rows] @ weight.T).div_(ctx.temperature)
            probs, scale = (logits - lse[rows, None]).exp_(), of_probs[rows, None]
            if grad_entropy is not None:  # dH/dz = -p (z - E[z]), with E[z] = lse - H
                scale = scale - logits.sub_((lse - entropy)[rows, None]).mul_(grad_entropy[rows, None])
            grad_logits = probs.mul_(scale).nan_to_num_(0.0)
            grad_logits.scatter_add_(1, targets[rows, None], of_target[rows, None])
            grad_logits.div_(ctx.temperature)
            grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, hidden[rows])
        return grad_hidden, grad_weight, None, None


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of `targets`, entropy and log-sum-exp of softmax(hidden @ weight.T / temperature).

    hidden [N, D], weight [V, D], targets [N] int64 -> three tensors [N], in nats, differentiable in hidden and weight. The [N, V]
    logits never exist: forward and backward hold one block of at most `BLOCK_ELEMENTS`.
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
            variance = _group_sums(deviation**2, groups, num_groups)[groups] / (counts[:, 0] - 1).clamp(min=1)
        elif scale == "batch_std":
            variance = ((total - total.mean()) ** 2).sum() / max(B - 1, 1)
        else:
            raise ValueError(f"unknown scale {scale!r}")
        std = variance.sqrt()  # totals can all agree where components do not: nothing to divide by, then
        centred = centred / torch.where(std > 1e-4, std + 1e-4, torch.ones_like(std)).reshape(-1, 1)

    after = torch.zeros(B, C + 1, dtype=components.dtype, device=components.device)
    after[:, :C] = centred.flip(1).cumsum(1).flip(1)  # after[:, c]: everything decided from component c on
    start = first_open.gather(1, segment_ids)  # [B, T]
    if credit == "to_go":
        return after.gather(1, start)
    if credit == "set":
        return after[:, :1].expand(-1, segment_ids.shape[1]).clone()
    if credit == "own":
        following = torch.cat([first_open[:, 1:], torch.full_like(first_open[:, :1], C)], dim=1).gather(1, segment_ids)
        last = torch.full_like(start, C - 1)
        decides = (following > start) & (start < C - 1)
        own = after.gather(1, start) - after.gather(1, torch.minimum(following, last)) + after.gather(1, last)
        return torch.where(decides, own, after.gather(1, start))
    raise ValueError(f"unknown credit {credit!r}")

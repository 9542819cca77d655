"""From reward components to one advantage per completion token. What changes a reward changes `components`, before credit is given."""

from dataclasses import replace

import torch
from torch import Tensor

from mar.learn.batch import Batch
from mar_kernels import answer_advantages


def token_advantages(batch: Batch, credit: str, baseline: str, scale: str) -> Tensor:
    """Advantages [B, T] float64, zero outside completions; the whole step at once (see mar_kernels.answer_advantages for the estimators).

    scale `whiten`: the mean and the standard deviation of all trained tokens are taken out (REINFORCE++, arXiv 2501.03262, eq. 9).
    """
    weights = batch.components.new_ones(batch.components.shape[1])  # components arrive weighted
    if baseline == "matched" and credit != "set":
        advantages = matched_advantages(batch, credit)
    else:
        compared = (
            "leave_one_out" if baseline == "matched" else baseline
        )  # before its start no completion has earned anything: all match
        columns = (batch.components, weights, batch.first_open, batch.segment_ids, batch.group_ids)
        advantages = answer_advantages(
            *columns, credit, compared, "none" if scale == "whiten" else scale
        )
    return (
        whiten(advantages, batch.loss_mask) if scale == "whiten" else advantages
    ) * batch.completion_mask


def matched_advantages(batch: Batch, credit: str) -> Tensor:
    """`to_go` or `own` credit [B, T]; baseline: the mean of those other completions of the group that had earned as much when the same component
    was next.

    What a completion has earned (its positive components that are decided: hits) is its own past, and what the others go on to earn does not depend
    on its next token, so the estimator stays unbiased. It loses the noise that the past explains: after a hit on the only label nothing more can
    be hit, and a confidence is compared with confidences in answers as right as its own. Without such a completion: the mean of all others.
    """
    C, start = batch.components.shape[1], batch.first_open.gather(1, batch.segment_ids)  # [B, T]
    togo = torch.nn.functional.pad(batch.components.flip(1).cumsum(1).flip(1), (0, 1))  # [B, C + 1]
    own = torch.cat(
        [batch.components[:, :-1] + batch.components[:, -1:], togo[:, C - 1 :]], 1
    )  # of a segment that decides component c
    following = torch.nn.functional.pad(batch.first_open[:, 1:], (0, 1), value=C).gather(
        1, batch.segment_ids
    )
    paid = torch.stack([togo, own] if credit == "own" else [togo], 1)  # [B, 1 or 2, C + 1]
    earned = torch.nn.functional.pad(batch.components.clamp(min=0).cumsum(1), (1, 0))
    order, sizes = batch.group_ids.argsort(stable=True), batch.group_ids.bincount()
    there = torch.arange(int(sizes.max()), device=order.device) < sizes[sizes > 0, None]  # [P, G]
    members = torch.zeros_like(there, dtype=torch.int64).masked_scatter(there, order)
    values, past = paid[members], earned[members]  # [P, G, 1 or 2, C + 1], [P, G, C + 1]
    others = (there[:, None] & ~torch.eye(there.shape[1], dtype=torch.bool, device=order.device))[
        ..., None
    ]
    alike = (past[:, :, None] == past[:, None]) & others  # [P, G, G, C + 1]
    chosen = torch.where(alike.any(2, keepdim=True), alike, others).to(values)
    centred = (
        values
        - torch.einsum("pijc,pjkc->pikc", chosen, values) / chosen.sum(2).clamp(min=1)[:, :, None]
    )
    out = torch.empty_like(paid).index_copy_(0, members[there], centred[there])
    decides = (following > start) & (start < C - 1)  # else it is credited with all that is open
    return (
        torch.where(decides, out[:, -1].gather(1, start), out[:, 0].gather(1, start))
        * batch.completion_mask
    )


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B, T] with mean 0 and standard deviation 1 over the tokens of `mask`; a batch without spread is only centred."""
    chosen = advantages[mask]
    mean = chosen.sum() / max(len(chosen), 1)
    std = ((chosen - mean) ** 2).sum().div(max(len(chosen) - 1, 1)).sqrt()
    return (advantages - mean) / (std + 1e-8 if std > 1e-4 else 1.0)


def best_of_k_advantages(batch: Batch, k: int) -> Tensor:
    """The advantage of each completion for the best of k samples instead of the mean, on all of its tokens, [B, T].

    A_i = k x mean over the sets J of k - 1 other completions of (max(r_i, max_J r) - max_J r): what i adds to a set of k. The mean of
    A_i grad log pi is an unbiased gradient of E[max of k rewards], for rewards of 0 and 1 of pass@k (arXiv 2505.15201, section 4; what is
    subtracted does not depend on sample i). Groups need at least k completions, 2 <= k.
    """
    out = torch.zeros_like(batch.totals)
    for group in batch.group_ids.unique():
        members = (batch.group_ids == group).nonzero()[:, 0]
        rewards, order = batch.totals[members].sort()
        n = len(members)
        below = torch.arange(
            n - 1, dtype=rewards.dtype, device=rewards.device
        )  # of the m-th of n - 1 others, m are lower
        chance = torch.ones_like(
            below
        )  # that it is the largest of k - 1: C(m, k - 2) / C(n - 1, k - 1)
        for i in range(k - 2):
            chance = chance * (below - i).clamp(min=0) / (n - 2 - i)
        chance = chance * (k - 1) / (n - 1)
        for i in range(n):
            others = torch.cat([rewards[:i], rewards[i + 1 :]])
            out[members[order[i]]] = k * (chance * (rewards[i] - others).clamp(min=0)).sum()
    return out[:, None] * batch.completion_mask


def with_kl_cost(batch: Batch, kl: Tensor, coef: float) -> Batch:
    """The batch paid `coef` less per nat of `kl` [B, T] (k1 in the reward).

    The cost of a segment's tokens joins the component that is first open there: to-go credit stays exact, for no later segment excludes a cost
    that is still to come.
    """
    start = batch.first_open.gather(1, batch.segment_ids)
    cost = coef * kl.to(batch.components.dtype) * batch.loss_mask
    return replace(batch, components=batch.components.scatter_add(1, start, -cost))


def with_truncation_rule(
    batch: Batch, rule: str, max_completion_tokens: int, overlong_tokens: int
) -> Batch:
    """What becomes of completions that the length limit ended: `keep`; `mask` (their tokens are not trained on; they still count in baselines);
    `penalise` (up to 1 less reward: linearly over the last `overlong_tokens` before the limit, 0: only at the limit). DAPO, arXiv 2503.14476,
    section 3.4 and eq. 13."""
    if rule == "keep":
        return batch
    cut = [r.completion.finish_reason == "length" for group in batch.groups for r in group]
    truncated = torch.tensor(cut, device=batch.loss_mask.device)
    if rule == "mask":
        return replace(batch, loss_mask=batch.loss_mask & ~truncated[:, None])
    if rule == "penalise":
        over = batch.completion_mask.sum(1) - (max_completion_tokens - overlong_tokens)
        penalty = torch.where(truncated, 1.0, (over.double() / max(overlong_tokens, 1)).clamp(0, 1))
        components = batch.components.clone()
        components[:, -1] -= penalty  # length is known at the very end
        return replace(batch, components=components)
    raise ValueError(f"unknown rule {rule!r}; known: keep, mask, penalise")


def zero_group_frac(batch: Batch) -> float:
    """Share of groups whose completions all earned exactly the same, and so teach nothing under a group baseline."""
    return sum(len({r.total for r in group}) == 1 for group in batch.groups) / len(batch.groups)

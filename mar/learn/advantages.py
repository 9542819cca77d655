"""From reward components to one advantage per completion token.

Which components a token is credited with, what they are compared with and what they are divided by
are functions in three dictionaries, CREDITS, BASELINES and SCALES. They stand in
kernels/mar_kernels/reference.py, beside the estimator itself (`answer_advantages`); what is not
per component stands here, with the scales that one divisor for each completion cannot express
(STEP_SCALES).

What changes a reward (a length penalty) changes `components`, before credit is given. What a token
costs by itself (k1 in the reward) stands beside them in `token_costs`.

Letters: P prompts, G group_size, B rows, T tokens, C components, S segments.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mar.learn.batch import Batch
from mar.records import Rollout
from mar_kernels import answer_advantages
from mar_kernels.reference import BASELINES, CREDITS, SCALES

__all__ = ["BASELINES", "CREDITS", "SCALES", "STEP_SCALES"]


def token_advantages(batch: Batch, credit: str, baseline: str, scale: str) -> Tensor:
    """Advantages [B, T] float64, zero outside completions. Takes the whole step at once.

    credit and baseline are names of CREDITS and BASELINES, scale one of SCALES
    (mar_kernels/reference.py defines them) or of STEP_SCALES.
    """
    if scale in STEP_SCALES:
        advantages = STEP_SCALES[scale](batch, credit, baseline)
    else:
        advantages = of_components(batch, credit, baseline, scale)
    return advantages * batch.completion_mask


def of_components(batch: Batch, credit: str, baseline: str, scale: str) -> Tensor:
    """The advantages [B, T] of all that a completion earns and its tokens cost."""
    return estimate(batch, batch.components, credit, baseline, scale, batch.token_costs)


def estimate(
    batch: Batch,
    components: Tensor,
    credit: str,
    baseline: str,
    scale: str,
    token_costs: Tensor | None = None,
) -> Tensor:
    """`answer_advantages` [B, T] of these components [B, C], which have their weights already."""
    return answer_advantages(
        components=components,
        weights=components.new_ones(components.shape[1]),
        first_open=batch.first_open,
        segment_ids=batch.segment_ids,
        group_ids=batch.group_ids,
        credit=credit,
        baseline=baseline,
        scale=scale,
        token_costs=token_costs,
        confidence_components=batch.confidence_components,
        confidence_segments=batch.confidence_segments,
    )


def whitened(batch: Batch, credit: str, baseline: str) -> Tensor:
    """The mean and the standard deviation of all trained tokens are taken out (REINFORCE++,
    arXiv:2501.03262, eq. 9)."""
    return whiten(of_components(batch, credit, baseline, "none"), batch.loss_mask)


def term_by_term(batch: Batch, credit: str, baseline: str) -> Tensor:
    """Each term of the reward is divided by its own standard deviation in the group before the
    weighted sum, which is then whitened (GDPO, arXiv:2601.05242, eq. 4 to 6).

        A_n = (r_n - mean r_n) / std r_n     r_n the term without its weight, over the group
        A   = whiten(sum_n w_n A_n)          over all trained tokens, as in the authors' code

    Divided together, different mixtures of terms become the same advantage, and the term that
    varies most drowns the others. The r_n are scalars in the paper, which is credit `set`; with
    another credit a token has its part of each term, divided by the spread of the term as a whole.
    """
    advantages = batch.components.new_zeros(batch.segment_ids.shape)
    for n in range(batch.terms.shape[1]):
        weight = batch.term_weights[:, n, None]
        of_term = estimate(batch, batch.terms[:, n], credit, baseline, "group_std")
        advantages = advantages + weight * of_term
    return whiten(advantages, batch.loss_mask)


# name -> advantages [B, T] under a scale that looks at more than the totals of the completions:
# (batch, credit, baseline) -> [B, T]
STEP_SCALES: dict[str, Callable[[Batch, str, str], Tensor]] = {
    "whiten": whitened,
    "term_std": term_by_term,
}


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B, T] with mean 0 and standard deviation 1 over the tokens of `mask`.

    A batch without spread is only centred.
    """
    chosen = advantages[mask]
    mean = chosen.sum() / max(len(chosen), 1)
    variance = ((chosen - mean) ** 2).sum() / max(len(chosen) - 1, 1)
    std = variance.sqrt()
    centred = advantages - mean
    if std > 1e-4:
        return centred / (std + 1e-8)
    return centred


def best_of_k_advantages(batch: Batch, k: int) -> Tensor:
    """The advantage [B, T] of each completion for the best of k samples instead of the mean.

        A_i = k x mean over the sets J of k - 1 other completions of (max(r_i, max_J r) - max_J r)

    which is what i adds to a set of k; all tokens of a completion share it. The mean of
    A_i grad log pi is an unbiased gradient of E[max of k rewards], for rewards of 0 and 1 of pass@k
    (arXiv:2505.15201, section 4; what is subtracted does not depend on sample i).
    Needs 2 <= k <= the size of each group.

    What tokens cost by themselves is no part of the maximum: each completion pays for its own.
    """
    earned = batch.components.sum(1)
    out = torch.zeros_like(earned)
    for group in batch.group_ids.unique():
        members = (batch.group_ids == group).nonzero()[:, 0]
        rewards, order = earned[members].sort()
        n = len(members)

        # In ascending order m of the n - 1 others lie below the m-th of them. It is the largest of
        # k - 1 drawn from them with the chance C(m, k - 2) / C(n - 1, k - 1).
        below = torch.arange(n - 1, dtype=rewards.dtype, device=rewards.device)
        chance_largest = torch.ones_like(below)
        for i in range(k - 2):
            chance_largest = chance_largest * (below - i).clamp(min=0) / (n - 2 - i)
        chance_largest = chance_largest * (k - 1) / (n - 1)

        for i in range(n):
            others = torch.cat([rewards[:i], rewards[i + 1 :]])
            gain = (rewards[i] - others).clamp(min=0)
            out[members[order[i]]] = k * (chance_largest * gain).sum()
    advantages = out[:, None] * batch.completion_mask
    if batch.token_costs is not None:
        costs_alone = replace(batch, components=torch.zeros_like(batch.components))
        advantages = advantages + token_advantages(costs_alone, "to_go", "leave_one_out", "none")
    return advantages


def with_kl_cost(batch: Batch, kl: Tensor, coef: float) -> Batch:
    """The batch in which each trained token costs `coef` per nat of its `kl` [B, T] (k1 in the
    reward)."""
    cost = coef * kl.to(batch.components.dtype) * batch.loss_mask
    return replace(batch, token_costs=cost)


def with_truncation_rule(
    batch: Batch, rule: str, max_completion_tokens: int, overlong_tokens: int
) -> Batch:
    """The batch under the rule for completions that the length limit ended.

        keep      nothing changes
        mask      their tokens are not trained on; they still count in baselines
        penalise  up to 1 less reward, linearly over the last `overlong_tokens` before the limit
                  (0: only at the limit)

    DAPO, arXiv:2503.14476, section 3.4 and eq. 13.
    """
    if rule == "keep":
        return batch
    finish_reasons = [r.completion.finish_reason for group in batch.groups for r in group]
    truncated = torch.tensor(
        [reason == "length" for reason in finish_reasons], device=batch.loss_mask.device
    )
    if rule == "mask":
        return replace(batch, loss_mask=batch.loss_mask & ~truncated[:, None])
    if rule == "penalise":
        overlong = batch.completion_mask.sum(1) - (max_completion_tokens - overlong_tokens)
        part = (overlong.double() / max(overlong_tokens, 1)).clamp(0, 1)
        penalty = torch.where(truncated, 1.0, part)
        components = batch.components.clone()
        # the length is known at the very end, so the last component pays
        components[:, -1] -= penalty
        return replace(batch, components=components)
    raise ValueError(f"unknown rule {rule!r}; known: keep, mask, penalise")


def zero_group_frac(batch: Batch) -> float:
    """Share of groups whose completions all earned the same."""
    return sum(is_flat(group) for group in batch.groups) / len(batch.groups)


def is_flat(group: Sequence[Rollout]) -> bool:
    """Whether all completions of a group earned the same in total.

    With credit `set` such a group teaches nothing. With credit per answer it may: a hit and then a
    miss earn as much as a miss and then a hit.
    """
    return len({rollout.total for rollout in group}) == 1

"""From reward components to one advantage per completion token.

What changes a reward (a KL cost, a length penalty) changes `components`, before credit is given.

Letters: P prompts, G group_size, B rows, T tokens, C components, S segments.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mar.learn.batch import Batch
from mar_kernels import answer_advantages


def token_advantages(batch: Batch, credit: str, baseline: str, scale: str) -> Tensor:
    """Advantages [B, T] float64, zero outside completions. Takes the whole step at once.

    credit and baseline are those of `mar_kernels.answer_advantages`; baseline `matched` is
    `matched_advantages`. scale is `none`, `group_std`, `batch_std`, or `whiten`: the mean and the
    standard deviation of all trained tokens are taken out (REINFORCE++, arXiv:2501.03262, eq. 9).
    """
    if baseline == "matched" and credit != "set":
        advantages = matched_advantages(batch, credit)
    else:
        # `set` credits everything from the start on, before which no completion has earned
        # anything: all of them match, and matched is leave_one_out
        group_baseline = "leave_one_out" if baseline == "matched" else baseline
        reward_scale = "none" if scale == "whiten" else scale
        advantages = answer_advantages(
            components=batch.components,
            # the components of a batch are weighted already
            weights=batch.components.new_ones(batch.components.shape[1]),
            first_open=batch.first_open,
            segment_ids=batch.segment_ids,
            group_ids=batch.group_ids,
            credit=credit,
            baseline=group_baseline,
            scale=reward_scale,
        )
    if scale == "whiten":
        advantages = whiten(advantages, batch.loss_mask)
    return advantages * batch.completion_mask


def matched_advantages(batch: Batch, credit: str) -> Tensor:
    """`to_go` or `own` credit [B, T] against completions of the group that stand as well so far.

    For a token of completion i in a segment where component c is the first still open:

        credit_i[c]    what the token is credited with: to_go: sum of the components from c on;
                       own: component c and the last one, if the segment decides c
        earned_i[c]    sum of the positive parts of the components before c: what i has earned
        matches        completions j != i of the group with earned_j[c] = earned_i[c],
                       or all j != i where there is none
        A_i[c]       = credit_i[c] - mean of credit_j[c] over the matches j

    What i has earned is its own past, and what the others go on to earn does not depend on i's next
    token, so the estimator stays unbiased. It loses the noise that the past explains: after a hit
    on the only label nothing more can be hit, and a confidence is compared with confidences in
    answers as right as its own.
    """
    components = batch.components
    num_components = components.shape[1]

    # [B, C + 1]: entry c belongs to tokens where component c is the first open one, C: none is
    to_go = F.pad(components.flip(1).cumsum(1).flip(1), (0, 1))
    earned = F.pad(components.clamp(min=0).cumsum(1), (1, 0))
    credited = [to_go]
    if credit == "own":
        this_and_last = components[:, :-1] + components[:, -1:]
        credited.append(torch.cat([this_and_last, to_go[:, num_components - 1 :]], 1))
    centred = _minus_mean_of_matches(torch.stack(credited, 1), earned, batch.group_ids)

    # from one entry per component to one per token, [B, T]
    first_open = batch.first_open.gather(1, batch.segment_ids)
    advantages = centred[:, 0].gather(1, first_open)
    if credit == "own":
        open_afterwards = F.pad(batch.first_open[:, 1:], (0, 1), value=num_components)
        next_open = open_afterwards.gather(1, batch.segment_ids)
        # a segment that decides nothing, or only the last component, is credited to_go
        decides = (next_open > first_open) & (first_open < num_components - 1)
        own = centred[:, 1].gather(1, first_open)
        advantages = torch.where(decides, own, advantages)
    return advantages * batch.completion_mask


def _minus_mean_of_matches(credited: Tensor, earned: Tensor, group_ids: Tensor) -> Tensor:
    """credited [B, R, C + 1] minus their mean over the matches of each completion (see above).

    R credit rules share the matches, which earned [B, C + 1] and the groups [B] decide.
    """
    members, is_member = _rows_of_groups(group_ids)
    values = credited[members]  # [P, G, R, C + 1]
    past = earned[members]  # [P, G, C + 1]

    # masks [P, G, G, C + 1] over (group, completion i, completion j, first open component)
    is_self = torch.eye(is_member.shape[1], dtype=torch.bool, device=group_ids.device)
    is_other = (is_member[:, None] & ~is_self)[..., None]
    same_past = (past[:, :, None] == past[:, None]) & is_other
    has_match = same_past.any(2, keepdim=True)
    matches = torch.where(has_match, same_past, is_other).to(values)

    sums = torch.einsum("pijc,pjrc->pirc", matches, values)
    counts = matches.sum(2).clamp(min=1)[:, :, None]
    centred = values - sums / counts
    return torch.empty_like(credited).index_copy_(0, members[is_member], centred[is_member])


def _rows_of_groups(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each group [P, G], G the size of the largest, and which entries are rows.

    A smaller group is padded with row 0.
    """
    order = group_ids.argsort(stable=True)
    sizes = group_ids.bincount()
    sizes = sizes[sizes > 0]
    is_member = torch.arange(int(sizes.max()), device=group_ids.device) < sizes[:, None]
    members = torch.zeros_like(is_member, dtype=torch.int64).masked_scatter(is_member, order)
    return members, is_member


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
    """
    out = torch.zeros_like(batch.totals)
    for group in batch.group_ids.unique():
        members = (batch.group_ids == group).nonzero()[:, 0]
        rewards, order = batch.totals[members].sort()
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
    return out[:, None] * batch.completion_mask


def with_kl_cost(batch: Batch, kl: Tensor, coef: float) -> Batch:
    """The batch paid `coef` less per nat of `kl` [B, T] (k1 in the reward).

    The cost of a segment's tokens joins the component that is first open there. So to-go credit
    stays exact: while costs of a component are still to come, the component is open.
    """
    first_open = batch.first_open.gather(1, batch.segment_ids)
    cost = coef * kl.to(batch.components.dtype) * batch.loss_mask
    return replace(batch, components=batch.components.scatter_add(1, first_open, -cost))


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
    """Share of groups whose completions all earned the same.

    They teach nothing: the baseline of such a group makes all its advantages 0.
    """
    num_equal = 0
    for group in batch.groups:
        totals = {rollout.total for rollout in group}
        num_equal += len(totals) == 1
    return num_equal / len(batch.groups)

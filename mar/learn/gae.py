"""Generalised advantage estimation with a value model, the baseline of PPO."""

import torch
from torch import Tensor

from mar.learn.batch import Batch


def token_rewards(batch: Batch, credit: str) -> Tensor:
    """The reward components as rewards [B, T] of single tokens, float64.

    `to_go`: each component at the token that decides it, which is the last one in whose segment it
    is still open. `set`: their sum at the last token of the completion. What a token costs by
    itself (`token_costs`) it pays at once, with either.

    With gamma = lambda = 1 and V = 0 the advantages of `gae` are then those of answer_advantages
    without a baseline.
    """
    if credit not in ("to_go", "set"):
        raise ValueError(f"a critic goes with credit to_go or set, not {credit!r}")
    rewards = batch.components.new_zeros(batch.completion_mask.shape)
    if batch.token_costs is not None:
        rewards = rewards - batch.token_costs
    if credit == "set":
        last_token = batch.completion_mask.sum(1, keepdim=True) - 1
        earned = batch.components.sum(1, keepdim=True)
        return rewards.scatter_add(1, last_token, earned)
    first_open = batch.first_open.gather(1, batch.segment_ids)  # [B, T]
    component = torch.arange(batch.components.shape[1], device=first_open.device)  # [C]
    is_open = (first_open[..., None] <= component) & batch.completion_mask[..., None]  # [B, T, C]
    deciding_token = is_open.sum(1) - 1  # [B, C]
    return rewards.scatter_add(1, deciding_token, batch.components)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of undiscounted episodes (Schulman et al. 2016).

        d_t = r_t + V_{t+1} - V_t
        A_t = d_t + lam A_{t+1}
        returns = A + V                     arXiv:1506.02438, eq. 16

    All tensors [B, T], zero outside `mask`. An episode ends with the last token of `mask`, after
    which V is 0.
    """
    values = values.to(rewards.dtype) * mask
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    errors = (rewards + next_values - values) * mask
    advantages = torch.zeros_like(errors)
    running = torch.zeros_like(errors[:, 0])
    for t in reversed(range(errors.shape[1])):
        running = errors[:, t] + lam * running
        advantages[:, t] = running
    return advantages * mask, (advantages + values) * mask


def explained_variance(values: Tensor, returns: Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns) of [M] tokens; None if the returns do not vary."""
    spread = returns.var(correction=0)
    # NaN where there are no tokens
    if not spread > 0:
        return None
    return 1 - ((returns - values).var(correction=0) / spread).item()

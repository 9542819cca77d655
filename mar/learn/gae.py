"""The value model of PPO: a decoder of its own with a scalar head, started from the policy, and generalised advantage estimation."""

import torch
from torch import Tensor

from mar.learn.batch import Batch


def token_rewards(batch: Batch, credit: str) -> Tensor:
    """The components as rewards [B, T] float64 at the token that decides each (`to_go`), or their sum at the last token (`set`).

    A component is decided by the last token in whose segment it is still open, so with gamma = lambda = 1 and V = 0 the advantages of `gae` are
    those of answer_advantages without a baseline.
    """
    last = batch.completion_mask.sum(1, keepdim=True) - 1
    rewards = torch.zeros(
        batch.completion_mask.shape, dtype=batch.components.dtype, device=batch.components.device
    )
    if credit == "set":
        return rewards.scatter_add(1, last, batch.totals[:, None])
    start = batch.first_open.gather(1, batch.segment_ids)  # [B, T]
    component = torch.arange(batch.components.shape[1], device=start.device)
    is_open = (start[..., None] <= component) & batch.completion_mask[..., None]  # [B, T, C]
    return rewards.scatter_add(1, is_open.sum(1) - 1, batch.components)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T] of undiscounted episodes that end with the last token of `mask` (Schulman et al. 2016, arXiv 1506.02438, eq. 16):

    A_t = d_t + lam A_{t+1},   d_t = r_t + V_{t+1} - V_t,   returns = A + V.   All [B, T], zero outside `mask`.
    """
    values = values.to(rewards.dtype) * mask
    following = torch.cat(
        [values[:, 1:], torch.zeros_like(values[:, :1])], 1
    )  # zero after the last token
    errors = (rewards + following - values) * mask
    advantages, running = torch.zeros_like(errors), torch.zeros_like(errors[:, 0])
    for t in range(errors.shape[1] - 1, -1, -1):
        running = errors[:, t] + lam * running
        advantages[:, t] = running
    return advantages * mask, (advantages + values) * mask


def explained_variance(values: Tensor, returns: Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns) of [M] tokens; None where the returns do not vary."""
    spread = returns.var(correction=0)
    return 1 - ((returns - values).var(correction=0) / spread).item() if spread > 0 else None

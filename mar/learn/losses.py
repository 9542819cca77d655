"""Policy-gradient losses: pure functions of flat per-token tensors, summed over a micro-batch with weights fixed for the whole step.

Every loss of LOSSES takes the same columns, all [M]: `logprobs` log pi(token) with gradient, `advantages` A, `weights` w (`token_weights`,
times `importance_weights` where the sampler was another distribution), `old_logprobs` of the policy that sampled, and `rows`, each token's
completion; then `clip_low` and `clip_high`. It returns a scalar. r = exp(logprobs - old_logprobs). A token of weight 0 is not there.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, float], Tensor]


def token_weights(mask: Tensor, aggregation: str, max_completion_tokens: int) -> Tensor:
    """What each token that `mask` [B, T] keeps counts in the step's loss, [B, T]; micro-batches and ranks add up to the same loss however it is cut.

    `token_mean`: 1 / number of tokens of the step (DAPO). `sequence_mean`: 1 / (B x own length) (GRPO). `constant`: 1 / (B x the longest allowed
    completion) (Dr. GRPO), the only one that leaves the policy gradient unbiased.
    """
    mask = mask.double()
    num_rows = max(mask.shape[0], 1)
    if aggregation == "token_mean":
        return mask / mask.sum().clamp(min=1)
    if aggregation == "sequence_mean":
        return mask / (num_rows * mask.sum(1, keepdim=True).clamp(min=1))
    if aggregation == "constant":
        return mask / (num_rows * max_completion_tokens)
    raise ValueError(f"unknown aggregation {aggregation!r}; known: {', '.join(AGGREGATIONS)}")


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(pi_old / pi_sampler, cap), constant (Espeholt et al. 2018, arXiv 1802.01561, eq. 1; for language models
    Yao et al. 2025). They correct for top-k, top-p, min-p and for a sampler of other precision."""
    return (old_logprobs - sampler_logprobs).detach().exp().clamp(max=cap)


def sequence_mean_log_ratio(log_ratio: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """For each token [M] the mean of `log_ratio` over the tokens of its completion that have a weight."""
    kept = (weights != 0).to(log_ratio.dtype)
    sums = log_ratio.new_zeros(2, int(rows.max()) + 1).index_add_(
        1, rows, torch.stack([log_ratio * kept, kept])
    )
    return (sums[0] / sums[1].clamp(min=1))[rows]


def reinforce(logprobs: Tensor, advantages: Tensor, weights: Tensor, *_: object) -> Tensor:
    """REINFORCE (Williams 1992): -sum_t w_t A_t log pi(token_t)."""
    return -(weights * advantages * logprobs).sum()


def _clipped(
    ratio: Tensor, advantages: Tensor, weights: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()


def ppo_clip(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old_logprobs: Tensor,
    rows: Tensor,
    low: float,
    high: float,
) -> Tensor:
    """PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7) with separate bounds (DAPO, arXiv 2503.14476, eq. 8):
    -sum_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)."""
    return _clipped((logprobs - old_logprobs).exp(), advantages, weights, low, high)


def gspo(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old_logprobs: Tensor,
    rows: Tensor,
    low: float,
    high: float,
) -> Tensor:
    """GSPO (Zheng et al. 2025, arXiv 2507.18071, eq. 5 and 7) in its token form (eq. 13 and 14), so that advantages may differ along a completion:
    ppo_clip with r_t = s * pi_t / sg(pi_t), where s = exp(mean of the completion's log ratios) is constant and sg stops the gradient. With one
    advantage a completion, value and gradient are those of GSPO."""
    mean = sequence_mean_log_ratio((logprobs - old_logprobs).detach(), weights, rows)
    return _clipped((mean + logprobs - logprobs.detach()).exp(), advantages, weights, low, high)


def cispo(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old_logprobs: Tensor,
    rows: Tensor,
    low: float,
    high: float,
) -> Tensor:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): REINFORCE weighted by the clipped ratio, no token loses its gradient:
    -sum_t w_t sg(clip(r_t, 1 - low, 1 + high)) A_t log pi(token_t). low=1 is no lower bound."""
    ratio = (logprobs - old_logprobs).detach().exp().clamp(1 - low, 1 + high)
    return -(weights * ratio * advantages * logprobs).sum()


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log ref [M]: unbiased for KL(pi || ref) as a value (Schulman 2020, "Approximating KL divergence"). It belongs in the reward; as a
    loss its expected gradient would be zero."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2 [M]: on samples of pi its gradient is that of the token's KL(pi || ref) (same note)."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref / pi - log(ref / pi) - 1 [M]: unbiased as a value and never negative (same note; GRPO, arXiv 2402.03300, eq. 4). Its gradient is that
    of KL(ref || pi)."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


LOSSES: dict[str, Loss] = {"reinforce": reinforce, "ppo": ppo_clip, "gspo": gspo, "cispo": cispo}

KL_ESTIMATORS = {"k3": kl_k3, "k2": kl_k2, "k1": kl_k1}


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float
) -> Tensor:
    """sum_t w_t max((V - R)^2, (V_clipped - R)^2) / 2 with V_clipped within `clip` of `old_values` (Schulman et al. 2016, arXiv 1506.02438; the
    clipping is that of OpenAI's baselines). All [M]."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * (weights * torch.maximum((values - returns) ** 2, (near - returns) ** 2)).sum()


@torch.no_grad()
def diagnostics(
    logprobs: Tensor, columns: Mapping[str, Tensor], by_sequence: bool, low: float, high: float
) -> dict[str, float]:
    """Sums over the tokens with a weight: `approx_kl` r - 1 - log r (estimates KL(old || new)), `clip_frac` tokens whose ratio is outside the bounds,
    `sampler_kl` k1 of KL(sampler || old) (k3 is wrong where the sampler leaves tokens out), `num`;
    and the largest ratio and |old - full_logprobs|. columns: the flat ones of that name.
    """
    kept, old = columns["weights"] != 0, columns["old_logprobs"]
    log_ratio = logprobs - old
    used = (
        sequence_mean_log_ratio(log_ratio, columns["weights"], columns["rows"])
        if by_sequence
        else log_ratio
    )
    ratio = used.exp()[kept]
    return {
        "approx_kl": kl_k3(old, logprobs)[kept].sum().item(),
        "clip_frac": ((ratio < 1 - low) | (ratio > 1 + high)).sum().item(),
        "sampler_kl": kl_k1(columns["sampler_logprobs"], old)[kept].sum().item(),
        "num": kept.sum().item(),
        "ratio_max": ratio.max().item() if len(ratio) else 1.0,
        "sampler_mismatch_max": (old - columns["full_logprobs"]).abs().max().item(),
    }

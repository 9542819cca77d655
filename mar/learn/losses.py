"""Losses, KL estimators, token weights and diagnostics: pure functions of flat per-token tensors.

Letters: M trained tokens of a micro-batch, B rows, T tokens of the longest completion.

Every loss of LOSSES takes the same arguments, all tensors [M]:

    logprobs      log pi(token), with gradient
    advantages    A
    weights       w: `token_weights`, times `importance_weights` where those are asked for
    old_logprobs  log pi_old(token), of the policy that sampled
    rows          the completion that a token belongs to

then the numbers clip_low and clip_high: how far the ratio may fall below and rise above 1. It
returns a scalar, the sum over the tokens. The weights are fixed for the whole optimizer step, so
the losses of its micro-batches add up. A token of weight 0 changes nothing.

In the equations r_t = pi(token_t) / pi_old(token_t), and sg stops the gradient.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# --- weights of the tokens ------------------------------------------------------------------------

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


def token_weights(mask: Tensor, aggregation: str, max_completion_tokens: int) -> Tensor:
    """The weight [B, T] of each token of `mask` [B, T] in the loss of the whole step.

        token_mean     1 / tokens of the step                    DAPO, arXiv:2503.14476, eq. 8
        sequence_mean  1 / (B x tokens of the completion)        GRPO, arXiv:2402.03300, eq. 3
        constant       1 / (B x max_completion_tokens)           Dr. GRPO, arXiv:2503.20783

    Only `constant` leaves the policy gradient unbiased.
    """
    mask = mask.double()
    num_rows = max(mask.shape[0], 1)
    if aggregation == "token_mean":
        return mask / mask.sum().clamp(min=1)
    if aggregation == "sequence_mean":
        lengths = mask.sum(1, keepdim=True)
        return mask / (num_rows * lengths.clamp(min=1))
    if aggregation == "constant":
        return mask / (num_rows * max_completion_tokens)
    raise ValueError(f"unknown aggregation {aggregation!r}; known: {', '.join(AGGREGATIONS)}")


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(pi_old / pi_sampler, cap) [M], without gradient.

    They correct for a sampler that draws from another distribution (top-k, top-p, min-p) or
    computes in another precision. Espeholt et al. 2018, arXiv:1802.01561, eq. 1; for language
    models Yao et al. 2025.
    """
    return (old_logprobs - sampler_logprobs).detach().exp().clamp(max=cap)


# --- losses ---------------------------------------------------------------------------------------

# (logprobs, advantages, weights, old_logprobs, rows, clip_low, clip_high) -> the loss
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, float], Tensor]


def reinforce(logprobs: Tensor, advantages: Tensor, weights: Tensor, *_: object) -> Tensor:
    """REINFORCE (Williams 1992).

    loss = -sum_t w_t A_t log pi(token_t)
    """
    return -(weights * advantages * logprobs).sum()


def ppo_clip(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old_logprobs: Tensor,
    rows: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """PPO (arXiv:1707.06347, eq. 7) with two separate bounds (DAPO, arXiv:2503.14476, eq. 8).

    loss = -sum_t w_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
    """
    ratio = (logprobs - old_logprobs).exp()
    return _clipped_loss(ratio, advantages, weights, clip_low, clip_high)


def gspo(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old_logprobs: Tensor,
    rows: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """GSPO (arXiv:2507.18071, eq. 5 and 7) in its token form (eq. 13 and 14).

        s = sg(exp(mean of log r_t over the completion))
        loss = that of `ppo_clip` with s pi(token_t) / sg(pi(token_t)) in the place of r_t

    With one advantage per completion, value and gradient are those of GSPO; the token form also
    allows advantages that differ along a completion.
    """
    log_ratio = (logprobs - old_logprobs).detach()
    mean_log_ratio = sequence_mean_log_ratio(log_ratio, weights, rows)
    ratio = (mean_log_ratio + logprobs - logprobs.detach()).exp()
    return _clipped_loss(ratio, advantages, weights, clip_low, clip_high)


def cispo(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old_logprobs: Tensor,
    rows: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5): REINFORCE weighted by the clipped ratio.

        loss = -sum_t w_t sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A_t log pi(token_t)

    No token loses its gradient. clip_low = 1 is no lower bound.
    """
    ratio = (logprobs - old_logprobs).detach().exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -(weights * clipped * advantages * logprobs).sum()


LOSSES: dict[str, Loss] = {"reinforce": reinforce, "ppo": ppo_clip, "gspo": gspo, "cispo": cispo}


def _clipped_loss(
    ratio: Tensor, advantages: Tensor, weights: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()


def sequence_mean_log_ratio(log_ratio: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """For each token [M] the mean of `log_ratio` over its completion, without weight 0 tokens."""
    kept = (weights != 0).to(log_ratio.dtype)
    sums = log_ratio.new_zeros(2, int(rows.max()) + 1)
    sums.index_add_(1, rows, torch.stack([log_ratio * kept, kept]))
    total, count = sums
    return (total / count.clamp(min=1))[rows]


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float
) -> Tensor:
    """The critic's loss in PPO, all tensors [M] (Schulman et al. 2016, arXiv:1506.02438).

    loss = 1/2 sum_t w_t max((V_t - R_t)^2, (V'_t - R_t)^2)
    V' = V clipped to old_values +- clip, as in OpenAI's baselines
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (weights * error).sum()


# --- KL estimators: Schulman 2020, "Approximating KL divergence" ----------------------------------


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 = log(pi / ref), [M].

    As a value unbiased for KL(pi || ref). It belongs in the reward: as a loss its expected gradient
    would be zero.
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 = log(pi / ref)^2 / 2, [M].

    As a loss, on samples of pi, its gradient is that of the token's KL(pi || ref).
    """
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = ref / pi - log(ref / pi) - 1, [M] (GRPO, arXiv:2402.03300, eq. 4).

    As a value unbiased for KL(pi || ref) and never negative. As a loss its gradient is that of
    KL(ref || pi).
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


KL_ESTIMATORS = {"k3": kl_k3, "k2": kl_k2, "k1": kl_k1}


# --- diagnostics ----------------------------------------------------------------------------------


@torch.no_grad()
def diagnostics(
    logprobs: Tensor, columns: Mapping[str, Tensor], by_sequence: bool, low: float, high: float
) -> dict[str, float]:
    """How far the policy has moved, and how far off the sampler was.

    Tokens of weight 0 are left out.

    Sums over tokens, to be divided by `num`:
        approx_kl    r - 1 - log r, estimates KL(old || new)
        clip_frac    1 where the ratio is outside [1 - low, 1 + high]
        sampler_kl   k1 of KL(sampler || old); k3 would be wrong where the sampler leaves tokens out
        num          1
    Maxima:
        ratio_max             the ratio
        sampler_mismatch_max  |old_logprobs - full_logprobs|, over all tokens

    The ratio is that of the token, or with `by_sequence` that of its completion (gspo). `columns`
    holds `weights`, `old_logprobs`, `rows`, `sampler_logprobs` and `full_logprobs`, each [M].
    """
    weights = columns["weights"]
    old_logprobs = columns["old_logprobs"]
    kept = weights != 0
    log_ratio = logprobs - old_logprobs
    if by_sequence:
        log_ratio = sequence_mean_log_ratio(log_ratio, weights, columns["rows"])
    ratio = log_ratio.exp()[kept]
    outside = (ratio < 1 - low) | (ratio > 1 + high)
    ratio_max = 1.0
    if len(ratio) > 0:
        ratio_max = ratio.max().item()
    mismatch = (old_logprobs - columns["full_logprobs"]).abs()
    return {
        "approx_kl": kl_k3(old_logprobs, logprobs)[kept].sum().item(),
        "clip_frac": outside.sum().item(),
        "sampler_kl": kl_k1(columns["sampler_logprobs"], old_logprobs)[kept].sum().item(),
        "num": kept.sum().item(),
        "ratio_max": ratio_max,
        "sampler_mismatch_max": mismatch.max().item(),
    }

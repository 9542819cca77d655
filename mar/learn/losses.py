"""Losses, KL estimators, token weights and importance weights: pure functions of per-token tensors.

Letters: M trained tokens of a micro-batch, B rows, T tokens of the longest completion.

A loss takes one record, `LossInputs`, and returns the loss and what it wants logged. To add one,
write such a function and enter it into LOSSES; hyper-parameters of its own come from
`algo.loss_options` and are declared beside it with `options`. What it logs is in metrics.jsonl as
`policy/<name>`; a name that stays in the repository gets a line in MEANINGS. The weights are fixed
for the whole optimizer step, so the losses of its micro-batches add up. A token of weight 0 changes
nothing.

The loss that is minimised adds KL and an entropy bonus: `policy_loss` in update.py.

In the equations r_t = pi(token_t) / pi_old(token_t), and sg stops the gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# --- what a loss sees, and what it returns --------------------------------------------------------


@dataclass(frozen=True)
class LossInputs:
    """The trained tokens of a micro-batch. Tensors are [M]."""

    logprobs: Tensor  # log pi(token), with gradient
    advantages: Tensor  # A
    weights: Tensor  # w: `token_weights`, times the importance weights where these are asked for
    # log pi_old(token): of the policy that sampled, or with importance weights (which account for
    # algo.lag) of the one before the step's first update
    old_logprobs: Tensor
    rows: Tensor  # the completion that a token belongs to
    clip_low: float = 0.2  # how far the ratio may fall below 1
    clip_high: float = 0.2  # how far it may rise above 1
    options: Mapping[str, float] = field(default_factory=dict)  # the loss's own hyper-parameters
    # bool: counted in what is logged, also where the importance weight is 0; None: weight not 0
    trained: Tensor | None = None

    @property
    def counted(self) -> Tensor:
        """[M] bool: the tokens that logged sums are over, and that the log's means divide by."""
        return self.weights != 0 if self.trained is None else self.trained

    @property
    def log_ratio(self) -> Tensor:
        return self.logprobs - self.old_logprobs


# How a logged number adds up over the micro-batches, ranks and updates of a step.
TOKEN_MEAN = "token_mean"  # given as a sum over tokens; logged as a mean over all trained tokens
UPDATE_MEAN = "update_mean"  # summed over micro-batches; logged as a mean over the updates
LARGEST = "largest"


class Logged(NamedTuple):
    """A number for metrics.jsonl, and how it adds up."""

    value: float
    adds_up: str


class LossOutput(NamedTuple):
    """The loss (a sum over tokens) and what is logged as `policy/<name>`."""

    loss: Tensor
    logged: dict[str, Logged]


class Option(NamedTuple):
    """A hyper-parameter of one function: its default and the range [low, high] of its values."""

    default: float
    low: float
    high: float


Loss = Callable[[LossInputs], LossOutput]


def options(**declared: Option) -> Callable[[Loss], Loss]:
    """Declare the hyper-parameters that a loss reads from `inputs.options`."""

    def declare(loss: Loss) -> Loss:
        loss.options = declared  # type: ignore[attr-defined]
        return loss

    return declare


def options_of(loss: Loss) -> Mapping[str, Option]:
    """The hyper-parameters of a loss; empty for one that has none."""
    return getattr(loss, "options", {})


# --- weights of the tokens ------------------------------------------------------------------------


def token_mean(mask: Tensor, max_completion_tokens: int) -> Tensor:
    """1 / tokens of the step (DAPO, arXiv:2503.14476, eq. 8)."""
    return mask / mask.sum().clamp(min=1)


def sequence_mean(mask: Tensor, max_completion_tokens: int) -> Tensor:
    """1 / (B x tokens of the completion) (GRPO, arXiv:2402.03300, eq. 3)."""
    num_rows = max(mask.shape[0], 1)
    lengths = mask.sum(1, keepdim=True)
    return mask / (num_rows * lengths.clamp(min=1))


def constant(mask: Tensor, max_completion_tokens: int) -> Tensor:
    """1 / (B x max_completion_tokens) (Dr. GRPO, arXiv:2503.20783). The only one that leaves the
    policy gradient unbiased."""
    num_rows = max(mask.shape[0], 1)
    return mask / (num_rows * max_completion_tokens)


# name -> the weight of each token: (mask [B, T] float64, max_completion_tokens) -> [B, T]
AGGREGATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant,
}


def token_weights(mask: Tensor, aggregation: str, max_completion_tokens: int) -> Tensor:
    """The weight [B, T] of each token of `mask` [B, T] in the loss of the whole step."""
    if aggregation not in AGGREGATIONS:
        known = ", ".join(AGGREGATIONS)
        raise ValueError(f"unknown aggregation {aggregation!r}; known: {known}")
    return AGGREGATIONS[aggregation](mask.double(), max_completion_tokens)


# --- importance weights: the sampler drew from another distribution than is trained -------------


@dataclass(frozen=True)
class ImportanceInputs:
    """Log-probabilities of the sampled tokens, [M], and the options of `algo.importance_*`."""

    old_logprobs: Tensor  # by the trainer
    sampler_logprobs: Tensor  # of the distribution that was drawn from
    weights: Tensor  # 0: the token does not count
    rows: Tensor  # the completion that a token belongs to
    cap: float
    low: float
    high: float
    by_sequence: bool

    @property
    def ratio(self) -> Tensor:
        """pi_old / pi_sampler of the token, or with `by_sequence` the geometric mean over its
        completion."""
        log_ratio = (self.old_logprobs - self.sampler_logprobs).detach()
        if self.by_sequence:
            log_ratio = sequence_mean_log_ratio(log_ratio, self.weights, self.rows)
        return log_ratio.exp()


def no_importance(inputs: ImportanceInputs) -> Tensor:
    return torch.ones_like(inputs.old_logprobs)


def truncated(inputs: ImportanceInputs) -> Tensor:
    """min(pi_old / pi_sampler, cap) (Espeholt et al. 2018, arXiv:1802.01561, eq. 1; for language
    models Yao et al. 2025)."""
    return inputs.ratio.clamp(max=inputs.cap)


def masked(inputs: ImportanceInputs) -> Tensor:
    """The ratio where it lies in [low, high], 0 elsewhere: a token that the two disagree about too
    much is not trained on, on either side (IcePop, Ling team 2025)."""
    ratio = inputs.ratio
    trusted = (ratio >= inputs.low) & (ratio <= inputs.high)
    return torch.where(trusted, ratio, torch.zeros_like(ratio))


# name -> a factor on the token weights, [M], without gradient
IMPORTANCE: dict[str, Callable[[ImportanceInputs], Tensor]] = {
    "none": no_importance,
    "truncated": truncated,
    "masked": masked,
}


# --- losses ---------------------------------------------------------------------------------------


def policy_gradient(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """-sum_t w_t A_t log pi(token_t)."""
    return -(weights * advantages * logprobs).sum()


def reinforce(inputs: LossInputs) -> LossOutput:
    """REINFORCE (Williams 1992).

    loss = -sum_t w_t A_t log pi(token_t)
    """
    loss = policy_gradient(inputs.logprobs, inputs.advantages, inputs.weights)
    return LossOutput(loss, ratio_logs(inputs, inputs.log_ratio.exp()))


def ppo_clip(inputs: LossInputs) -> LossOutput:
    """PPO (arXiv:1707.06347, eq. 7) with two separate bounds (DAPO, arXiv:2503.14476, eq. 8).

    loss = -sum_t w_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
    """
    ratio = inputs.log_ratio.exp()
    return LossOutput(_clipped_loss(inputs, ratio), ratio_logs(inputs, ratio))


def gspo(inputs: LossInputs) -> LossOutput:
    """GSPO (arXiv:2507.18071, eq. 5 and 7) in its token form (eq. 13 and 14).

        s = sg(exp(mean of log r_t over the completion))
        loss = that of `ppo_clip` with s pi(token_t) / sg(pi(token_t)) in the place of r_t

    With one advantage per completion, value and gradient are those of GSPO; the token form also
    allows advantages that differ along a completion.
    """
    logprobs = inputs.logprobs
    log_ratio = inputs.log_ratio.detach()
    mean_log_ratio = sequence_mean_log_ratio(log_ratio, inputs.weights, inputs.rows)
    ratio = (mean_log_ratio + logprobs - logprobs.detach()).exp()
    return LossOutput(_clipped_loss(inputs, ratio), ratio_logs(inputs, mean_log_ratio.exp()))


def cispo(inputs: LossInputs) -> LossOutput:
    """CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5): REINFORCE weighted by the clipped ratio.

        loss = -sum_t w_t sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A_t log pi(token_t)

    No token loses its gradient. clip_low = 1 is no lower bound.
    """
    ratio = inputs.log_ratio.detach().exp()
    clipped = ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    loss = -(inputs.weights * clipped * inputs.advantages * inputs.logprobs).sum()
    return LossOutput(loss, ratio_logs(inputs, ratio))


@options(
    delta_low=Option(default=0.2, low=0.0, high=1.0),
    delta_high=Option(default=0.2, low=0.0, high=1.0),
    penalty=Option(default=0.001, low=0.0, high=100.0),
)
def dppo(inputs: LossInputs) -> LossOutput:
    """DPPO: a mask by the change of the probability itself, and a squared log-ratio.

        d_t = pi(token_t) - pi_old(token_t)
        m_t = 0 where A_t > 0 and d_t > delta_high, or A_t < 0 and d_t < -delta_low; else 1
        loss = sum_t w_t [ -m_t sg(r_t) A_t log pi(token_t) + penalty (log r_t)^2 ]

    A ratio overstates the change of a rare token and understates that of a likely one; the
    difference of probabilities bounds the total variation (arXiv:2602.04879, the binary TV mask).
    The penalty is prime-rl's (docs/algorithms.md).
    """
    log_ratio = inputs.log_ratio
    ratio = log_ratio.detach().exp()
    change = inputs.logprobs.detach().exp() - inputs.old_logprobs.exp()
    rose_too_far = (inputs.advantages > 0) & (change > inputs.options["delta_high"])
    fell_too_far = (inputs.advantages < 0) & (change < -inputs.options["delta_low"])
    masked_out = rose_too_far | fell_too_far
    weighted_advantages = inputs.weights * ratio * inputs.advantages
    gain = torch.where(masked_out, torch.zeros_like(ratio), weighted_advantages) * inputs.logprobs
    cost = inputs.options["penalty"] * inputs.weights * log_ratio**2
    logged = ratio_logs(inputs, ratio)
    logged["masked_frac"] = Logged(masked_out[inputs.counted].sum().item(), TOKEN_MEAN)
    return LossOutput((cost - gain).sum(), logged)


LOSSES: dict[str, Loss] = {
    "reinforce": reinforce,
    "ppo": ppo_clip,
    "gspo": gspo,
    "cispo": cispo,
    "dppo": dppo,
}


def _clipped_loss(inputs: LossInputs, ratio: Tensor) -> Tensor:
    clipped = ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    gains = torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
    return -(inputs.weights * gains).sum()


@torch.no_grad()
def ratio_logs(inputs: LossInputs, ratio: Tensor) -> dict[str, Logged]:
    """`clip_frac`: share of the tokens whose ratio lies outside the bounds; `ratio_max`."""
    ratio = ratio.detach()[inputs.counted]
    outside = (ratio < 1 - inputs.clip_low) | (ratio > 1 + inputs.clip_high)
    largest = ratio.max().item() if len(ratio) > 0 else 1.0
    return {
        "clip_frac": Logged(outside.sum().item(), TOKEN_MEAN),
        "ratio_max": Logged(largest, LARGEST),
    }


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


# name -> (logprobs [M], ref_logprobs [M]) -> [M]
KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k3": kl_k3,
    "k2": kl_k2,
    "k1": kl_k1,
}


# --- diagnostics ----------------------------------------------------------------------------------

# what is logged as `policy/<name>` by the functions of this file -> its line in the glossary,
# mar/measure/README.md
MEANINGS = {
    "approx_kl": "KL from the policy of the loss's ratio r (the one that sampled; with importance "
    "weights the one before the step's first update), mean of r - 1 - log r",
    "clip_frac": "share of tokens whose ratio is outside the clip bounds",
    "ratio_max": "largest ratio r",
    "masked_frac": "share of tokens that the mask of `algo.loss=dppo` leaves out",
    "sampler_kl": "KL from the sampler's distribution to that of the trainer, mean of "
    "log(sampler / trainer)",
    "sampler_mismatch_max": "largest difference between the sampler's and the trainer's "
    "log-probability of a token (with `algo.lag` and an importance weight, also what the steps "
    "since then changed)",
}


@torch.no_grad()
def diagnostics(
    logprobs: Tensor,
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    full_logprobs: Tensor,
    weights: Tensor,
) -> dict[str, Logged]:
    """How far the policy has moved, and how far off the sampler was. All [M].

    approx_kl             r - 1 - log r, estimates KL(old || new)
    sampler_kl            k1 of KL(sampler || old); k3 would be wrong where the sampler leaves
                          tokens out
    sampler_mismatch_max  |old_logprobs - full_logprobs|, also of tokens of weight 0
    """
    counted = weights != 0
    moved = kl_k3(old_logprobs, logprobs)[counted]
    off = kl_k1(sampler_logprobs, old_logprobs)[counted]
    mismatch = (old_logprobs - full_logprobs).abs()
    return {
        "approx_kl": Logged(moved.sum().item(), TOKEN_MEAN),
        "sampler_kl": Logged(off.sum().item(), TOKEN_MEAN),
        "sampler_mismatch_max": Logged(mismatch.max().item(), LARGEST),
    }

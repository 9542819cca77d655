"""Policy-gradient losses: pure functions of flat per-token tensors, summed over a micro-batch with weights fixed for the whole step."""

from torch import Tensor

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


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


def reinforce(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """REINFORCE (Williams 1992): -sum_t w_t A_t log pi(token_t). All [M]; returns a scalar."""
    return -(weights * advantages * logprobs).sum()

"""From reward components to one advantage per completion token."""

from torch import Tensor

from mar.batch import Batch
from mar_kernels import answer_advantages


def token_advantages(batch: Batch, credit: str, baseline: str, scale: str) -> Tensor:
    """Advantages [B, T] float64, zero outside completions; the whole step at once (see mar_kernels.answer_advantages for the estimators)."""
    weights = batch.components.new_ones(batch.components.shape[1])  # components arrive weighted
    advantages = answer_advantages(
        batch.components, weights, batch.first_open, batch.segment_ids, batch.group_ids, credit, baseline, scale
    )
    return advantages * batch.completion_mask


def zero_group_frac(batch: Batch) -> float:
    """Share of groups whose completions all earned exactly the same, and so teach nothing under a group baseline."""
    return sum(len({r.total for r in group}) == 1 for group in batch.groups) / len(batch.groups)

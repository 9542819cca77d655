"""What is logged of one training step, beside what the updates say (learn/update.py)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mar.learn.advantages import zero_group_frac
from mar.learn.batch import Batch
from mar.measure.metrics import set_metrics
from mar.sample.engine import Generation
from mar.sample.rollout import Scorer


def step_metrics(
    batch: Batch,
    advantages: Tensor,
    scorer: Scorer,
    generations: Sequence[Generation],
    num_replaced: int,
    num_unjudged: int,
) -> dict[str, Any]:
    """Rewards, advantages, the set metrics of the step's own rollouts, and how the sampler did.

    advantages [B, T]. `generations`: of the step's prompts, then of those that replace others, of
    which only the decode steps count. `num_replaced`: groups that dynamic sampling replaced. `num_unjudged`:
    completions left out because nobody could judge them.
    """
    rollouts = [rollout for group in batch.groups for rollout in group]
    of_sets, _ = set_metrics(rollouts, scorer.grammar.confident)
    trained_advantages = advantages[batch.completion_mask]
    truncated = [rollout.completion.finish_reason == "length" for rollout in rollouts]

    metrics: dict[str, Any] = {"reward/total": _mean([r.total for r in rollouts])}
    for name in rollouts[0].parts:
        metrics[f"reward/{name}"] = _mean([r.parts[name] for r in rollouts])
    metrics["adv/mean"] = trained_advantages.mean().item()
    metrics["adv/std"] = trained_advantages.std().item()
    metrics["adv/replaced_groups"] = num_replaced
    metrics["adv/zero_group_frac"] = zero_group_frac(batch)
    for name, value in of_sets.items():
        metrics[f"train/{name}"] = value
    metrics["train/unjudged"] = num_unjudged
    metrics["train/truncated_frac"] = _mean(truncated)
    metrics["sampler/decode_steps"] = sum(generation.num_steps for generation in generations)
    metrics["sampler/occupancy"] = generations[0].occupancy
    return metrics


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))

"""What is logged of one training step, beside what the updates say (learn/update.py).

To add a metric, write a function from `StepSeen` to a number (None where there is none) and enter
it in STEP_METRICS. The first paragraph of its docstring is its line in README.md, which
`make report` writes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from mar.learn.advantages import zero_group_frac as share_of_flat_groups
from mar.learn.batch import Batch
from mar.measure.metrics import set_metrics
from mar.records import Rollout
from mar.sample.engine import Generation
from mar.sample.rollout import Scorer


@dataclass(frozen=True)
class StepSeen:
    """What a metric of a training step may look at.

    A rollout (mar/records.py) has the completion (`rollout.completion.ids` are its tokens), its
    answers, what each earned, `parts` by term, and their sum, `total`.
    """

    batch: Batch
    advantages: Tensor  # [B, T]
    scorer: Scorer
    # of the step's prompts, then of those that replaced others
    generations: Sequence[Generation]
    num_replaced: int  # groups that dynamic sampling replaced
    num_unjudged: int  # completions left out because nobody could judge them

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """All B of the step."""
        return [rollout for group in self.batch.groups for rollout in group]

    @cached_property
    def trained_advantages(self) -> Tensor:
        """[M] those of the tokens that are trained on."""
        return self.advantages[self.batch.loss_mask]


def reward(seen: StepSeen) -> float:
    """Mean reward of the step's completions, without what `algo.truncated=penalise` takes off."""
    return _mean([rollout.total for rollout in seen.rollouts])


def advantage_mean(seen: StepSeen) -> float | None:
    """Mean of the advantages of the trained tokens."""
    if len(seen.trained_advantages) == 0:
        return None
    return seen.trained_advantages.mean().item()


def advantage_std(seen: StepSeen) -> float | None:
    """Standard deviation of the advantages of the trained tokens."""
    if len(seen.trained_advantages) < 2:
        return None
    return seen.trained_advantages.std().item()


def replaced_groups(seen: StepSeen) -> int:
    """Groups that took the place of one whose completions all earned the same (`algo.resample`)."""
    return seen.num_replaced


def zero_group_frac(seen: StepSeen) -> float:
    """Share of groups whose completions all earned the same `reward/total`."""
    return share_of_flat_groups(seen.batch)


def unjudged(seen: StepSeen) -> int:
    """Completions left out because the sandbox or the judge gave no verdict."""
    return seen.num_unjudged


def truncated_frac(seen: StepSeen) -> float:
    """Share of completions that the length limit ended."""
    return _mean([r.completion.finish_reason == "length" for r in seen.rollouts])


def decode_steps(seen: StepSeen) -> int:
    """Decode steps of the sampler, with those of replaced groups."""
    return sum(generation.num_steps for generation in seen.generations)


def occupancy(seen: StepSeen) -> float | None:
    """Share of the sampler's row slots in use while prompts waited for one (null: none had to
    wait)."""
    return seen.generations[0].occupancy


# name -> a number of the step. What a reward's terms paid (`reward/...`) and the metrics of answer
# sets (`train/...`) are logged beside these, without being listed.
STEP_METRICS: dict[str, Callable[[StepSeen], Any]] = {
    "reward/total": reward,
    "adv/mean": advantage_mean,
    "adv/std": advantage_std,
    "adv/replaced_groups": replaced_groups,
    "adv/zero_group_frac": zero_group_frac,
    "train/unjudged": unjudged,
    "train/truncated_frac": truncated_frac,
    "sampler/decode_steps": decode_steps,
    "sampler/occupancy": occupancy,
}


def step_metrics(seen: StepSeen) -> dict[str, Any]:
    """STEP_METRICS, the terms of the reward, and the metrics of the step's own answer sets."""
    of_sets, _ = set_metrics(seen.rollouts, seen.scorer.grammar.confident)
    metrics = {name: compute(seen) for name, compute in STEP_METRICS.items()}
    for name in seen.rollouts[0].parts:
        metrics[f"reward/{name}"] = _mean([r.parts[name] for r in seen.rollouts])
    for name, value in of_sets.items():
        metrics[f"train/{name}"] = value
    return metrics


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))

"""How a run measures its policy: one set of answers for each held-out prompt, drawn at the training
temperature. Always the same items, and always the same random draws."""

from dataclasses import dataclass
from typing import Any

from mar.measure.bootstrap import resample_weights, with_interval
from mar.measure.metrics import set_metrics
from mar.policy.distributed import ALONE, World
from mar.policy.model import Decoder
from mar.records import Prompt, Rollout
from mar.sample.draws import SamplingParams
from mar.sample.rollout import OnCompletion, Scorer, judge_groups, judged_only, sample


@dataclass(frozen=True)
class HeldOut:
    """Everything but the policy: what is asked, how answers are drawn, how they are scored."""

    prompts: tuple[Prompt, ...]
    scorer: Scorer
    params: SamplingParams
    kv_budget_tokens: int
    seed: int


def measure(
    policy: Decoder,
    held_out: HeldOut,
    world: World = ALONE,
    on_completion: OnCompletion | None = None,
) -> tuple[dict[str, Any], list[Rollout]]:
    """The metrics of `set_metrics`, and the rollouts that they were read from.

    `interval` among the metrics holds the 95 % bootstrap interval over items of each. The draws
    depend on seed and item alone, not on the training step. `on_completion` gets each completion of
    this rank as soon as it is done.
    """
    prompts = held_out.prompts
    scorer = held_out.scorer
    completions, _ = sample(
        policy,
        prompts,
        group_size=1,
        params=held_out.params,
        kv_budget_tokens=held_out.kv_budget_tokens,
        identity=(held_out.seed, "eval", 0),
        share=world.share,
        decode=scorer.decode,
        on_completion=on_completion,
    )
    judged = judge_groups(prompts[world.share], completions, scorer)
    rollouts = [group[0] for group in judged_only(world.gather(judged))]

    values, statistics = set_metrics(rollouts, scorer.grammar.confident)
    weights = resample_weights(len(rollouts))
    intervals = {}
    for name, statistic in statistics.items():
        _, low, high = with_interval(statistic, weights)
        intervals[name] = [low, high]
    return {**values, "interval": intervals}, rollouts

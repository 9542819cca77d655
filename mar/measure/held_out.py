"""How a run measures its policy: one set of answers per held-out prompt, at the training temperature, always the same items and draws; and what it
says of that in the end."""

from dataclasses import dataclass
from typing import Any

from mar.answers.grammar import Grammar
from mar.answers.rewards import RewardSpec
from mar.measure.answer_sets import set_metrics
from mar.measure.bootstrap import estimate, resamples
from mar.policy.distributed import ALONE, World
from mar.policy.model import Decoder
from mar.records import Prompt, Rollout
from mar.sample.draws import SamplingParams
from mar.sample.rollout import Decode, judge_groups, judged_only, sample
from mar.verify.verifiers import How


@dataclass(frozen=True)
class Protocol:
    """Everything but the policy: what is asked, how it is drawn, how it is judged."""

    prompts: tuple[Prompt, ...]
    grammar: Grammar
    spec: RewardSpec
    verifier: How
    decode: Decode
    params: SamplingParams
    kv_budget_tokens: int
    seed: int


def measure(
    model: Decoder, protocol: Protocol, world: World = ALONE
) -> tuple[dict[str, Any], list[Rollout]]:
    """The metrics of `set_metrics`, with `interval` (metric -> 95 % bootstrap interval over items), and the rollouts they were read from. Draws
    depend on seed and item alone, not on the training step."""
    p = protocol
    groups, _ = sample(
        model, p.prompts, 1, p.params, p.kv_budget_tokens, (p.seed, "eval", 0), world.share
    )
    judged = judge_groups(p.prompts[world.share], groups, p.grammar, p.spec, p.verifier, p.decode)
    rollouts = [group[0] for group in judged_only(world.gather(judged))]
    values, found = set_metrics(rollouts, p.verifier, p.grammar.confident)
    weights = resamples(len(rollouts))
    return {
        **values,
        "interval": {name: estimate(statistic, weights)[1:] for name, statistic in found.items()},
    }, rollouts

"""What a policy is compared with: the same model untrained, and other ways of asking for answers.

An *arm*, as of a clinical trial, is one of the conditions that an evaluation compares: the policy
as it was trained to answer, each of its baselines, and the policy asked for sets of another size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mar.answers.grammar import Grammar
from mar.answers.rewards import RewardSpec
from mar.errors import UserError
from mar.measure.answer_sets import Item, item_of_rollouts
from mar.policy.model import Decoder
from mar.records import Prompt
from mar.sample.draws import SamplingParams
from mar.sample.rollout import Decode, OnCompletion, Scorer, judge_groups, sample
from mar.verify.verifiers import AnswerChecker

# What a policy of single answers is compared with: the same model asked for so many at once.
SET_SIZE_OF_BASELINES = 3


@dataclass(frozen=True)
class Arm:
    """One condition: which weights answer, in which form, asked how, and how many sets an item."""

    name: str
    description: str  # one sentence, shown beside the numbers
    grammar: Grammar
    num_sets: int  # G
    style: str = "ranked"  # how the prompt asks for the answers
    trained: bool = True  # False: the weights before training


def build_arms(grammar: Grammar, k: int, sizes: Sequence[int], trained: bool) -> list[Arm]:
    """The policy (always first), its baselines, and sets of other sizes.

    Each question gets k answers: k // K sets of a policy that gives K answers at once, k
    completions of a single one. trained: there is a trained policy; else all arms have the same
    weights.
    """
    K = grammar.num_answers
    confident = grammar.confident
    single = Grammar(
        "rlcr_single" if confident else "rlvr_single", num_answers=1, thinking=grammar.thinking
    )
    if grammar.multi:
        several = grammar
    else:
        several = Grammar(
            "rlcr_multi" if confident else "rlvr_multi",
            num_answers=SET_SIZE_OF_BASELINES,
            thinking=grammar.thinking,
        )
    num_sets = max(1, k // K)
    untrained = "the untrained model" if trained else "the same weights"

    policy = Arm(
        name="policy",
        description=f"{num_sets} {'set' if num_sets == 1 else 'sets'} of {K}, asked as in training",
        grammar=grammar,
        num_sets=num_sets,
        trained=trained,
    )
    base = Arm(
        name="base",
        description=f"{untrained}, asked as the policy is, once",
        grammar=grammar,
        num_sets=1,
        trained=False,
    )
    independent = Arm(
        name="single",
        description=f"{untrained}, asked for one answer, {k} times",
        grammar=single,
        num_sets=k,
        trained=False,
    )
    prompted = Arm(
        name="prompted_k",
        description=f"{untrained}, prompted for K: "
        f"asked only to list {several.num_answers} answers",
        grammar=several,
        num_sets=1,
        style="prompted_k",
        trained=False,
    )
    verbalized = Arm(
        name="verbalized",
        description=f"{untrained}, verbalised sampling: "
        f"asked to draw at random {several.num_answers} answers",
        grammar=several,
        num_sets=1,
        style="verbalized",
        trained=False,
    )
    other_sizes = [
        Arm(
            name=f"K={size}",
            description=f"the policy, asked for {size}",
            grammar=replace(grammar, num_answers=size),
            num_sets=1,
            trained=trained,
        )
        for size in sizes
        if grammar.multi and size != K
    ]

    arms = [policy]
    if trained:
        arms.append(base)
    if grammar.multi:
        arms.append(independent)
    return [*arms, prompted, verbalized, *other_sizes]


def sample_items(
    arm: Arm,
    prompts: Sequence[Prompt],
    model: Decoder,
    params: SamplingParams,
    kv_budget_tokens: int,
    seed: int,
    verifier: AnswerChecker,
    decode: Decode,
    on_completion: OnCompletion | None = None,
) -> list[Item]:
    """Sample and judge an arm's sets for some of its prompts. Draws depend on seed and item alone.

    Raises UserError where the sandbox or judge has stopped working.
    """
    groups, _ = sample(
        model,
        prompts,
        group_size=arm.num_sets,
        params=params,
        kv_budget_tokens=kv_budget_tokens,
        identity=(seed, "eval", 0),
        decode=decode,
        on_completion=on_completion,
    )
    # What an answer earns is not looked at, but a reward with Brier terms needs confidences.
    reward = RewardSpec(brier="paper" if arm.grammar.confident else "none")
    scorer = Scorer(arm.grammar, reward, verifier, decode)
    rollouts = judge_groups(prompts, groups, scorer)
    unjudged = sum(rollout.unjudged > 0 for group in rollouts for rollout in group)
    if unjudged:
        raise UserError(
            f"{unjudged} completions could not be judged, "
            "the sandbox or judge has stopped working: the same command goes on"
        )
    return [
        item_of_rollouts(prompt, group) for prompt, group in zip(prompts, rollouts, strict=True)
    ]

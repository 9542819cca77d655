"""Demonstrations of one form for a warm-up, and what a model would answer, without drawing.

All demonstrations of a batch have the same form, so that with the request first
(data.request_first) all prompts begin alike. That beginning is computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mar.answers.grammar import Grammar
from mar.answers.prompts import build_prompt
from mar.errors import UserError
from mar.learn.demonstrations import (
    NO_HINT,
    PLAIN,
    Bag,
    ConfidenceHint,
    DemonstrationBatch,
    Encode,
    draw_demonstration,
    join_bags,
    soft_targets,
)
from mar.policy.model import Decoder
from mar.policy.packing import PackedGroups, pack_groups
from mar.records import Example


@dataclass(frozen=True)
class Asking:
    """How a task's questions become tokens."""

    tokenizer: Any
    encode: Encode
    noun: str
    request_first: bool
    explain_decimals: bool

    def prompt_ids(self, example: Example, grammar: Grammar) -> list[int]:
        """Raises UserError for a chat template that opens thoughts."""
        prompt = build_prompt(
            example,
            grammar,
            self.tokenizer,
            self.noun,
            request_first=self.request_first,
            explain_decimals=self.explain_decimals,
        )
        if prompt.think_open:
            raise UserError(
                "this model's chat template opens <think>, and sft.mixture=per_step and measuring "
                "are for answers alone: add sft.mixture=short sft.eval_every=0"
            )
        ids: list[int] = prompt.ids.tolist()
        return ids


def num_shared(lines: Sequence[Sequence[int]]) -> int:
    """How many tokens all lines begin with alike, each keeping at least one of its own."""
    most = min(map(len, lines)) - 1
    for place in range(most):
        if len({line[place] for line in lines}) > 1:
            return place
    return most


def make_form_batch(
    examples: Sequence[Example],
    grammar: Grammar,
    asking: Asking,
    rng: np.random.Generator,
    others: Sequence[str],
    hint: ConfidenceHint = NO_HINT,
) -> DemonstrationBatch:
    """One demonstration of the same form for each example. `others`: answers to other questions."""
    prompts: list[list[int]] = []
    completions: list[list[int]] = []
    targets: list[Bag] = []
    for example in examples:
        pieces = draw_demonstration(example, grammar, others, rng, hint=hint)
        ids, of_tokens = soft_targets(pieces, asking.encode, asking.tokenizer.eos_token_id)
        prompts.append(asking.prompt_ids(example, grammar))
        completions.append(ids)
        targets += of_tokens
    return DemonstrationBatch(pack_sharing(prompts, completions), join_bags(targets))


def pack_sharing(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> PackedGroups:
    """One completion for each prompt; what all prompts begin with stands once.

    It becomes the prompt of one group, and the rest of each prompt the beginning of a row: the M
    targets are those of the completions alone.
    """
    shared = num_shared(prompts)
    if shared == 0:
        return pack_groups(prompts, [[completion] for completion in completions])
    rows: list[list[int]] = []
    is_taught: list[bool] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        rest = prompt[shared:]
        rows.append([*rest, *completion])
        is_taught += [False] * len(rest) + [True] * len(completion)
    packed = pack_groups([prompts[0][:shared]], [rows])
    taught = torch.tensor(is_taught)
    return replace(packed, predict_from=packed.predict_from[taught], targets=packed.targets[taught])


@torch.no_grad()
def answer_masses(
    model: Decoder, examples: Sequence[Example], asking: Asking, at_once: int = 8
) -> np.ndarray:
    """[B, C] for each gold of an example, the probability that the model writes exactly it as its
    single answer and then begins the closing tag; 0 where an example has fewer than C golds."""
    element = PLAIN.elements[0]
    opening = asking.encode(element.opening)
    closing = asking.encode(element.closing)[0]
    masses = np.zeros((len(examples), max(len(example.golds) for example in examples)))
    for start in range(0, len(examples), at_once):
        some = examples[start : start + at_once]
        prompts = [[*asking.prompt_ids(example, PLAIN), *opening] for example in some]
        groups = [
            [[*asking.encode(gold.name), closing] for gold in example.golds] for example in some
        ]
        logprobs = model(pack_groups(prompts, groups))[0].double()
        lengths = [len(candidate) for group in groups for candidate in group]
        found = iter(part.sum().exp().item() for part in logprobs.split(lengths))
        for row, group in enumerate(groups, start):
            masses[row, : len(group)] = [next(found) for _ in group]
    return masses

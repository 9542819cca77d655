"""Prompts to rollouts: sample, read, verify, pay. Ends at rewards; nothing here is differentiated."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mar.draw import SamplingParams, stream_key
from mar.grammar import Grammar, decode_with_starts, parse
from mar.model import Decoder
from mar.records import Completion, Prompt, Rollout
from mar.rewards import RewardSpec, reward
from mar.sampler import Generation, Request, generate
from mar.verify import VERIFIERS, matching_increments, repeats

Decode = Callable[[tuple[int, ...]], str]
REMEMBERED_TOKENS = 32  # longer texts do not come again


def make_decode(tokenizer: Any) -> Decode:
    """Token ids to text, remembering short windows: completions repeat them all the time."""

    def read(ids: tuple[int, ...]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    remembered = lru_cache(maxsize=1 << 16)(read)
    return lambda ids: remembered(ids) if len(ids) <= REMEMBERED_TOKENS else read(ids)


def sample(
    model: Decoder,
    prompts: Sequence[Prompt],
    group_size: int,
    params: SamplingParams,
    kv_budget_tokens: int,
    identity: tuple[int | str, ...],
    share: slice = slice(None),
) -> tuple[list[list[Completion]], Generation]:
    """`group_size` completions of every prompt of `share`, and how the sampler did. `identity` (run seed, stage, step), prompt id, its occurrence
    among all prompts and sample index fix every draw."""
    seen: Counter[str] = Counter()  # a prompt asked twice in one step gets two different groups
    requests = []
    for p in prompts:
        requests.append(Request(p.ids, tuple(stream_key(*identity, p.id, seen[p.id], g) for g in range(group_size))))
        seen[p.id] += 1
    generation = generate(model, requests[share], params, kv_budget_tokens)
    completions = [
        [Completion(g, s.ids, s.sampler_logprobs, s.full_logprobs, s.finish_reason, s.inserted) for g, s in enumerate(group)]
        for group in generation.groups
    ]
    return completions, generation


def judge_completion(prompt: Prompt, completion: Completion, grammar: Grammar, spec: RewardSpec, verifier: str, decode: Decode) -> Rollout:
    """Read one completion strictly, match its answers to this prompt's own golds, and split its reward into components."""
    written = completion.ids[:-1] if completion.finish_reason == "stop" else completion.ids
    text, starts = decode_with_starts(written.tolist(), decode)
    parsed = parse(text, grammar, prompt.think_open)
    targets = prompt.example.targets()
    hits, _ = matching_increments(parsed.answers, targets, VERIFIERS[verifier])
    repeated = repeats(parsed.answers, prompt.example.golds, VERIFIERS[verifier])
    earned = reward(parsed, hits, repeated, len(targets), grammar, spec)
    starts = np.append(starts, len(text))[: len(completion.ids)]  # the stop token starts where the text ends
    return Rollout(
        prompt=prompt,
        completion=completion,
        text=text,
        answers=parsed.answers,
        confidences=parsed.confidences,
        hits=hits,
        repeated=repeated,
        reason=parsed.reason,
        components=earned.components,
        segment_ids=parsed.segments(starts),
        total=earned.total,
        parts=earned.parts,
        token_starts=starts,
    )


def judge_groups(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], grammar: Grammar, spec: RewardSpec, verifier: str, decode: Decode
) -> list[list[Rollout]]:
    """Rollouts of every completion, each against its own prompt."""
    return [
        [judge_completion(prompt, completion, grammar, spec, verifier, decode) for completion in group]
        for prompt, group in zip(prompts, groups, strict=True)
    ]

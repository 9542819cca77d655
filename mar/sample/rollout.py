"""Prompts to rollouts: sample, read, verify, pay. Ends at rewards; nothing here is differentiated."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from mar.answers.grammar import Grammar, Parsed, decode_with_starts, parse
from mar.answers.rewards import RewardSpec, reward
from mar.errors import UserError
from mar.policy.model import Decoder
from mar.records import Completion, Gold, Prompt, Rollout
from mar.sample.draws import SamplingParams, stream_key
from mar.sample.engine import Generation, Request, Sampled, generate
from mar.verify.matching import matching_increments, probabilities, repeats
from mar.verify.programs import Runner
from mar.verify.verifiers import How, matcher

Decode = Callable[[tuple[int, ...]], str]

Begin = Callable[[Prompt, Completion], None]

REMEMBERED_TOKENS = 32  # longer texts do not come again


def make_decode(tokenizer: Any) -> Decode:
    """Token ids to text, remembering short windows: completions repeat them all the time."""

    def read(ids: tuple[int, ...]) -> str:
        return tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    remembered = lru_cache(maxsize=1 << 16)(read)
    return lambda ids: remembered(ids) if len(ids) <= REMEMBERED_TOKENS else read(ids)


def completed(g: int, s: Sampled) -> Completion:
    return Completion(g, s.ids, s.sampler_logprobs, s.full_logprobs, s.finish_reason, s.inserted)


def sample(
    model: Decoder,
    prompts: Sequence[Prompt],
    group_size: int,
    params: SamplingParams,
    kv_budget_tokens: int,
    identity: tuple[int | str, ...],
    share: slice = slice(None),
    begin: Begin | None = None,
) -> tuple[list[list[Completion]], Generation]:
    """`group_size` completions of every prompt of `share`, and how the sampler did. `identity` (run seed, stage, step), prompt id, its occurrence
    among all prompts and sample index fix every draw. `begin` gets each completion as soon as it is done."""
    seen: Counter[str] = Counter()  # a prompt asked twice in one step gets two different groups
    requests = []
    for p in prompts:
        requests.append(
            Request(
                p.ids, tuple(stream_key(*identity, p.id, seen[p.id], g) for g in range(group_size))
            )
        )
        seen[p.id] += 1
    mine = prompts[share]
    if begin:
        params = replace(
            params, on_done=lambda i, s: begin(mine[i // group_size], completed(i % group_size, s))
        )
    generation = generate(model, requests[share], params, kv_budget_tokens)
    return [
        [completed(g, s) for g, s in enumerate(group)] for group in generation.groups
    ], generation


@dataclass(frozen=True)
class Reading:
    """A completion as text, and what the grammar reads in it."""

    prompt: Prompt
    completion: Completion
    text: str
    starts: (
        np.ndarray
    )  # [R] characters that the tokens before had fixed; the stop token starts where the text ends
    parsed: Parsed


def read(prompt: Prompt, completion: Completion, grammar: Grammar, decode: Decode) -> Reading:
    """Decode and parse one completion strictly."""
    written = completion.ids[:-1] if completion.finish_reason == "stop" else completion.ids
    text, starts = decode_with_starts(written.tolist(), decode)
    starts = np.append(starts, len(text))[: len(completion.ids)]
    return Reading(prompt, completion, text, starts, parse(text, grammar, prompt.think_open))


def pay(reading: Reading, grammar: Grammar, spec: RewardSpec, verifier: How) -> Rollout:
    """Match the answers to this prompt's own golds, or to its tests, and split the reward into components."""
    example, answers = reading.prompt.example, reading.parsed.answers
    if isinstance(
        verifier, Runner
    ):  # as many golds as answers: each distinct program that passes takes one
        found = {
            answer: verifier.verdict(example, answer) for answer in answers if answer is not None
        }
        targets: tuple[Gold, ...] = (Gold("a program that passes"),) * len(answers)
        hits, _ = matching_increments(
            answers,
            targets,
            lambda a, _: tuple(range(len(answers))) * (found[a].outcome == "passed"),
            lambda a: found[a].key,
        )
        repeated = repeats(answers, key=lambda a: found[a].key)
        keys = tuple(None if a is None else found[a].key for a in answers)
    else:
        targets, keys, verify = example.targets(), (), matcher(verifier, example)
        if example.drawn is None and example.truth in (
            "exact",
            "survey",
        ):  # data.target=probabilities
            hits, targets = probabilities(answers, targets, verify), targets[:1]
        else:
            hits, _ = matching_increments(answers, targets, verify)
        repeated = repeats(answers, example.golds, verify)
    unjudged = (
        0
        if isinstance(verifier, str)
        else sum(not verifier.judged(example, a) for a in {*answers} if a is not None)
    )
    earned = reward(reading.parsed, hits, repeated, len(targets), grammar, spec)
    return Rollout(
        prompt=reading.prompt,
        completion=reading.completion,
        text=reading.text,
        answers=answers,
        confidences=reading.parsed.confidences,
        hits=hits,
        repeated=repeated,
        reason=reading.parsed.reason,
        components=earned.components,
        segment_ids=reading.parsed.segments(reading.starts),
        total=earned.total,
        keys=keys,
        unjudged=unjudged,
        parts=earned.parts,
        token_starts=reading.starts,
    )


def judge_groups(
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    grammar: Grammar,
    spec: RewardSpec,
    verifier: How,
    decode: Decode,
) -> list[list[Rollout]]:
    """Rollouts of every completion, each against its own prompt. Programs of all completions run, and a judge is asked, side by side."""
    readings = [
        [read(prompt, completion, grammar, decode) for completion in group]
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    if not isinstance(verifier, str):
        verifier.ask(
            (r.prompt.example, a)
            for group in readings
            for r in group
            for a in r.parsed.answers
            if a is not None
        )
    rollouts = [[pay(reading, grammar, spec, verifier) for reading in group] for group in readings]
    if isinstance(verifier, Runner):
        verifier.running.clear()  # a breakdown may be tried again
    return rollouts


def beginner(grammar: Grammar, verifier: How, decode: Decode) -> Begin | None:
    """What `sample` calls with each completion as it is done: its programs start to run while others are still being sampled."""
    if not isinstance(verifier, Runner):
        return None
    return lambda p, c: verifier.ask(
        (p.example, a) for a in read(p, c, grammar, decode).parsed.answers if a is not None
    )


def judged_only(groups: Sequence[list[Rollout]], fewest: int = 2) -> list[list[Rollout]]:
    """The groups without completions that could not be judged: neither paid, nor in the baseline of the others.

    A group of which fewer than `fewest` are left, and any are missing, is left out. UserError where nothing remains.
    """
    kept = [[r for r in group if not r.unjudged] for group in groups]
    kept = [
        group
        for group, whole in zip(kept, groups, strict=True)
        if len(group) >= min(fewest, len(whole))
    ]
    if not kept:
        raise UserError(
            "no completion of this step could be judged: the sandbox, or the judge, has stopped working"
        )
    return kept

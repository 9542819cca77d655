"""From prompts to rollouts: sample, read, verify, pay. Ends at rewards; nothing here has a gradient."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from mar.answers.grammar import Grammar, Parsed, decode_with_starts, parse
from mar.answers.reward_terms import Judged
from mar.answers.rewards import (
    RewardSpec,
    confidence_components,
    confidence_segments,
    first_open,
    needs_group,
    pay_terms,
)
from mar.errors import UserError
from mar.policy.model import Decoder
from mar.records import Completion, Gold, Prompt, Rollout
from mar.sample.draws import SamplingParams, stream_key
from mar.sample.engine import Decode, Generation, Request, generate
from mar.verify.matching import (
    candidates,
    exact_masses,
    expected_hits,
    matching_increments,
    meanings,
    remembering,
    repeats,
)
from mar.verify.programs import ProgramRunner
from mar.verify.verifiers import AnswerChecker, WordChecker, submit_answers, verifier_for

OnCompletion = Callable[[Prompt, Completion], None]

REMEMBERED_TOKENS = 32  # longer texts do not come again


def make_decode(tokenizer: Any) -> Decode:
    """Token ids to text. Short windows are remembered: completions repeat them all the time."""

    def decode(ids: tuple[int, ...]) -> str:
        return tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    remembered = lru_cache(maxsize=1 << 16)(decode)

    def decode_short_from_memory(ids: tuple[int, ...]) -> str:
        if len(ids) <= REMEMBERED_TOKENS:
            return remembered(ids)
        return decode(ids)

    return decode_short_from_memory


@dataclass(frozen=True)
class Scorer:
    """How completions become rewards: read by the grammar, compared by the verifier, paid by the
    reward."""

    grammar: Grammar
    reward: RewardSpec
    verifier: AnswerChecker
    decode: Decode

    @cached_property
    def first_open(self) -> np.ndarray:
        """[S] the first reward component that is still open in each segment (rewards.py)."""
        return first_open(self.grammar, self.reward)

    @cached_property
    def of_confidence(self) -> tuple[np.ndarray, np.ndarray]:
        """[C] and [S]: the components and the segments that belong to confidences (rewards.py)."""
        components = confidence_components(self.grammar, self.reward)
        return components, confidence_segments(self.grammar)


# --- sampling --------------------------------------------------------------------------------


def sample(
    model: Decoder,
    prompts: Sequence[Prompt],
    group_size: int,
    params: SamplingParams,
    kv_budget_tokens: int,
    identity: tuple[int | str, ...],
    share: slice = slice(None),
    on_completion: OnCompletion | None = None,
    decode: Decode | None = None,
) -> tuple[list[list[Completion]], Generation]:
    """`group_size` completions of every prompt in `share`, and how the sampler did.

    Every draw is fixed by `identity` (run seed, stage, step), the prompt's id, how often that id
    came before among `prompts`, and the sample index. `on_completion` gets each completion as soon
    as it is done. `decode` is needed where `params` has stop strings or a thinking budget.
    """
    requests = []
    times_seen: Counter[str] = Counter()  # a prompt asked twice in a step gets two different groups
    for prompt in prompts:
        occurrence = times_seen[prompt.id]
        times_seen[prompt.id] += 1
        keys = [stream_key(*identity, prompt.id, occurrence, g) for g in range(group_size)]
        requests.append(Request(tuple(prompt.ids.tolist()), tuple(keys)))

    my_prompts = prompts[share]

    def on_done(index: int, completion: Completion) -> None:
        if on_completion is not None:
            on_completion(my_prompts[index], completion)

    generation = generate(
        model,
        requests[share],
        params,
        kv_budget_tokens,
        decode=decode,
        on_done=on_done,
    )
    return generation.groups, generation


# --- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A completion as text, and what the grammar reads in it."""

    prompt: Prompt
    completion: Completion
    text: str
    token_starts: np.ndarray  # [R] where in `text` each token begins
    parsed: Parsed

    @property
    def written_answers(self) -> list[str]:
        return [answer for answer in self.parsed.answers if answer is not None]


def read(prompt: Prompt, completion: Completion, grammar: Grammar, decode: Decode) -> Reading:
    """Decode and parse one completion strictly."""
    ids = completion.ids
    if completion.finish_reason == "stop":
        ids = ids[:-1]
    text, starts = decode_with_starts(ids.tolist(), decode)
    # The stop token begins where any other would: the segment of a token is known before it.
    token_starts = starts[: len(completion.ids)]
    parsed = parse(text, grammar, prompt.think_open)
    return Reading(prompt, completion, text, token_starts, parsed)


# --- verifying and paying --------------------------------------------------------------------


@dataclass(frozen=True)
class Verified:
    """What the verifier finds in the K answers of one completion."""

    hits: tuple[float, ...]  # [K] y_k: what answer k adds to the coverage
    repeated: tuple[bool, ...]  # [K] says again what an earlier answer said
    num_golds: int
    mass: tuple[float, ...]  # [K] exact probability where the task knows it, else the hit
    keys: tuple[str | None, ...]  # [K] equal for answers that mean the same
    fits: tuple[tuple[int, ...], ...] = ()  # [K] the golds that each answer can be


def verify_programs(reading: Reading, runner: ProgramRunner) -> Verified:
    """There are as many golds as answers: each distinct program that passes its tests takes one."""
    example = reading.prompt.example
    answers = reading.parsed.answers
    verdicts = {answer: runner.verdict(example, answer) for answer in reading.written_answers}
    golds = (Gold("a program that passes"),) * len(answers)

    def takes(answer: str, _: Sequence[Gold]) -> tuple[int, ...]:
        if verdicts[answer].outcome == "passed":
            return tuple(range(len(answers)))
        return ()

    def key(answer: str) -> str:
        return verdicts[answer].key

    hits, _ = matching_increments(answers, golds, takes, key)
    keys = [None if answer is None else key(answer) for answer in answers]
    repeated = repeats(answers, key=key)
    return Verified(hits, repeated, len(golds), mass=hits, keys=tuple(keys))


def verify_words(reading: Reading, verifier: WordChecker) -> Verified:
    """Answers against this prompt's own golds: its label, or the probability of each gold."""
    example = reading.prompt.example
    answers = reading.parsed.answers
    takes = remembering(verifier_for(verifier, example))
    repeated = repeats(answers, example.golds, takes)
    targets = example.targets()
    num_golds = len(targets)
    paid_in_expectation = example.label is None and example.truth in ("exact", "survey")
    if paid_in_expectation:  # data.target=probabilities: one gold is right, nobody drew which
        num_golds = 1
        hits = expected_hits(answers, targets, takes)
    else:
        hits, _ = matching_increments(answers, targets, takes)
    mass = hits
    golds = targets
    if example.truth == "exact":
        golds = example.golds
        mass = exact_masses(answers, golds, takes)
    keys = meanings(answers, example.golds, takes)
    fits = candidates(answers, golds, takes)
    return Verified(hits, repeated, num_golds, mass, keys, fits)


def verify(reading: Reading, verifier: AnswerChecker) -> Verified:
    if isinstance(verifier, ProgramRunner):
        return verify_programs(reading, verifier)
    return verify_words(reading, verifier)


def judge_group(
    readings: Sequence[Reading], verdicts: Sequence[Verified], scorer: Scorer
) -> list[Judged]:
    """What the terms of the reward see of each completion of one prompt."""
    group = [
        Judged(
            parsed=reading.parsed,
            hits=verified.hits,
            repeated=verified.repeated,
            num_golds=verified.num_golds,
            grammar=scorer.grammar,
            spec=scorer.reward,
            text=reading.text,
            num_tokens=len(reading.completion.ids),
            meanings=verified.keys,
        )
        for reading, verified in zip(readings, verdicts, strict=True)
    ]
    if not needs_group(scorer.reward):
        return group
    return [replace(judged, others=(*group[:i], *group[i + 1 :])) for i, judged in enumerate(group)]


def pay_group(readings: Sequence[Reading], scorer: Scorer) -> list[Rollout]:
    """Verify the answers of one prompt's completions and pay each of them."""
    verdicts = [verify(reading, scorer.verifier) for reading in readings]
    group = judge_group(readings, verdicts, scorer)
    return [
        pay(reading, verified, judged, scorer.verifier)
        for reading, verified, judged in zip(readings, verdicts, group, strict=True)
    ]


def pay(reading: Reading, verified: Verified, judged: Judged, verifier: AnswerChecker) -> Rollout:
    """The rollout of one completion, its reward split into components."""
    unjudged = 0
    if not isinstance(verifier, str):
        example = reading.prompt.example
        distinct = set(reading.written_answers)
        unjudged = sum(not verifier.has_verdict(example, answer) for answer in distinct)

    parsed = reading.parsed
    earned = pay_terms(judged)
    return Rollout(
        prompt=reading.prompt,
        completion=reading.completion,
        text=reading.text,
        answers=parsed.answers,
        confidences=parsed.confidences,
        hits=verified.hits,
        repeated=verified.repeated,
        reason=parsed.reason,
        components=earned.components,
        segment_ids=parsed.segments(reading.token_starts),
        total=earned.total,
        mass=verified.mass,
        keys=verified.keys,
        fits=verified.fits,
        unjudged=unjudged,
        parts=earned.parts,
        token_starts=reading.token_starts,
        terms=earned.terms,
        term_weights=earned.term_weights,
    )


def judge_groups(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], scorer: Scorer
) -> list[list[Rollout]]:
    """Rollouts of all completions, each judged against its own prompt.

    All programs run, and a judge is asked about all answers, side by side.
    """
    readings = []
    for prompt, group in zip(prompts, groups, strict=True):
        readings.append([read(prompt, c, scorer.grammar, scorer.decode) for c in group])

    verifier = scorer.verifier
    submit_answers(
        verifier,
        (
            (reading.prompt.example, answer)
            for group in readings
            for reading in group
            for answer in reading.written_answers
        ),
    )
    rollouts = []
    for read_group in readings:
        rollouts.append(pay_group(read_group, scorer))
    if isinstance(verifier, ProgramRunner):
        verifier.running.clear()  # a breakdown may be tried again
    return rollouts


def start_programs_early(scorer: Scorer) -> OnCompletion | None:
    """For `sample`: start the programs of a completion while others are still being sampled."""
    runner = scorer.verifier
    if not isinstance(runner, ProgramRunner):
        return None

    def start(prompt: Prompt, completion: Completion) -> None:
        reading = read(prompt, completion, scorer.grammar, scorer.decode)
        runner.submit((prompt.example, answer) for answer in reading.written_answers)

    return start


def judged_only(groups: Sequence[list[Rollout]], fewest: int = 2) -> list[list[Rollout]]:
    """The groups without completions that could not be judged: these are neither paid 0 nor counted
    in the baseline of the others.

    A group that lost completions and has fewer than `fewest` left is dropped. Raises UserError
    where nothing remains.
    """
    kept = []
    for group in groups:
        judged = [rollout for rollout in group if not rollout.unjudged]
        if len(judged) >= min(fewest, len(group)):
            kept.append(judged)
    if not kept:
        raise UserError(
            "no completion of this step could be judged: the sandbox, or the judge, stopped working"
        )
    return kept

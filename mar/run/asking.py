"""Ask a policy: a run's newest checkpoint, a checkpoint folder, or the embedded model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mar.answers.grammar import Grammar, grammar_of
from mar.answers.prompts import build_prompt, fit_grammar
from mar.answers.tokenizer import load_tokenizer, num_tokens
from mar.config import Config
from mar.errors import UserError
from mar.files import at_home
from mar.policy.distributed import compute_device
from mar.policy.lora import adapted
from mar.policy.model import Decoder
from mar.policy.weights import load_model
from mar.records import Example
from mar.run import checkpoint
from mar.run.asked_as import asked_as
from mar.run.compose import compose, load_config
from mar.run.folder import no_run
from mar.run.from_run import model_of
from mar.run.setup import sampling_params
from mar.run.words import known_model
from mar.sample.draws import SamplingParams
from mar.sample.rollout import Decode, make_decode, read, sample
from mar.tasks.registry import get_task
from mar.verify.normaliser import normalise


@dataclass(frozen=True)
class AnswerSet:
    """What one completion says. `reason`: why it breaks the form, None where it follows it."""

    text: str
    answers: tuple[str | None, ...]
    confidences: tuple[float | None, ...]
    reason: str | None


@dataclass(frozen=True)
class PooledAnswer:
    """One answer in all sets. `share`: of the sets that hold it; `confidence`: the mean over all
    sets, 0 where a set does not hold it; None where the form has no confidences."""

    answer: str
    share: float
    confidence: float | None


@dataclass(frozen=True)
class AskedPolicy:
    """A policy with everything that a question to it needs."""

    config: Config
    policy: Decoder
    tokenizer: Any
    grammar: Grammar
    params: SamplingParams
    decode: Decode

    def ask(self, question: str, num_sets: int, seed: int) -> list[AnswerSet]:
        """`num_sets` answer sets; the same for the same question and seed."""
        example = Example(id=question, task=self.config.data.task, question=question, golds=())
        data = self.config.data
        noun = get_task(data.task).noun
        prompt = build_prompt(
            example,
            self.grammar,
            self.tokenizer,
            noun,
            request_first=data.request_first,
            explain_decimals=self.config.model.explain_decimals,
        )
        limit = self.config.model.max_prompt_tokens
        if len(prompt.ids) > limit:
            raise UserError(
                f"the question takes {len(prompt.ids)} tokens and model.max_prompt_tokens is "
                f"{limit}: shorten it, or raise the limit"
            )
        positions = self.policy.config.max_positions
        if len(prompt.ids) + self.params.max_tokens > positions:
            raise UserError(
                f"the question takes {len(prompt.ids)} tokens, which leaves no room for an answer of up "
                f"to {self.params.max_tokens} tokens in the {positions} positions of the model: shorten "
                "it, or lower model.max_completion_tokens"
            )
        budget = len(prompt.ids) + num_sets * self.params.max_tokens
        groups, _ = sample(
            self.policy,
            [prompt],
            group_size=num_sets,
            params=self.params,
            kv_budget_tokens=max(budget, self.config.sampler.kv_budget_tokens),
            identity=(seed, "ask", 0),
            decode=self.decode,
        )
        sets = []
        for completion in groups[0]:
            reading = read(prompt, completion, self.grammar, self.decode)
            parsed = reading.parsed
            sets.append(AnswerSet(reading.text, parsed.answers, parsed.confidences, parsed.reason))
        return sets


def open_policy(target: str, settings: Sequence[str]) -> AskedPolicy:
    """The policy that `target` names: a run's folder, a folder with config.json, or `embedded`.

    `settings` are `key=value` words. Raises UserError for anything else, and for a run without a
    readable checkpoint.
    """
    folder = at_home(target)
    found = None
    if (folder / "config.yaml").is_file():
        config = load_config(folder / "config.yaml", settings)
        found = checkpoint.require_newest(folder, config)
    elif (folder / "config.json").is_file():
        words = asked_as(folder, settings)
        config = compose(["model=hf", f"model.path={folder.resolve()}", *words, *settings])
    elif target == "embedded":
        if any(word.startswith("+experiment=") for word in settings):
            raise UserError("embedded knows the clinic alone: leave +experiment= out")
        config = compose(["+experiment=clinic", *settings])
    elif " " in target and not folder.exists():
        raise UserError(f"{target!r} is no policy: first the run, or embedded, then the question")
    elif known_model(target) and not folder.exists():
        raise UserError(
            f"{target} is a model, untrained: get it by python -m mar.fetch {target}, which prints "
            "its folder, and name that"
        )
    else:
        raise UserError(no_run(folder, ", a checkpoint (config.json) or embedded"))

    options = config.model
    model_folder, _ = model_of(options)
    tokenizer = load_tokenizer(model_folder)
    grammar = fit_grammar(grammar_of(config), tokenizer)
    decode = make_decode(tokenizer)
    policy = load_model(
        model_folder,
        dtype=getattr(torch, config.scale.dtype),
        device=compute_device(config.device),
        num_tokens=num_tokens(tokenizer),
    )
    if found is not None:
        policy = adapted(policy, options)
        checkpoint.restore_weights(found, policy)
    return AskedPolicy(
        config=config,
        policy=policy.requires_grad_(False),
        tokenizer=tokenizer,
        grammar=grammar,
        params=sampling_params(config, grammar, tokenizer, model_folder),
        decode=decode,
    )


def pool(sets: Sequence[AnswerSet]) -> list[PooledAnswer]:
    """All sets as one distribution over answers, the most confident first. Sets that break the form
    say nothing; a repeat in a set counts once."""
    readable = [one for one in sets if one.reason is None]
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    masses: dict[str, float] = {}
    confident = False
    for one in readable:
        for key, answer, confidence in _distinct(one):
            names.setdefault(key, answer)
            counts[key] = counts.get(key, 0) + 1
            if confidence is not None:
                confident = True
                masses[key] = masses.get(key, 0.0) + confidence
    pooled = []
    for key, name in names.items():
        share = counts[key] / len(readable)
        confidence = masses.get(key, 0.0) / len(readable) if confident else None
        pooled.append(PooledAnswer(name, share, confidence))

    def weight(answer: PooledAnswer) -> tuple[float, float]:
        return (answer.confidence or 0.0, answer.share)

    return sorted(pooled, key=weight, reverse=True)


def _distinct(one: AnswerSet) -> Iterator[tuple[str, str, float | None]]:
    """(key, answer, confidence) of each answer that the set has not said before."""
    seen = set()
    for answer, confidence in zip(one.answers, one.confidences, strict=True):
        if answer is None:
            continue
        key = normalise(answer)
        if key not in seen:
            seen.add(key)
            yield key, answer, confidence

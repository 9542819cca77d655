"""Train a policy to write K answers with honest confidences.

One step: sample G completions of P prompts, judge them, one advantage per token, then the updates.
REINFORCE with credit for each answer is the default; ratios, a critic, a reference model
and several updates per batch are switches (conf/algo/). There is no replay.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from torch import Tensor

from mar.answers.tokenizer import CLOCK
from mar.config import Config
from mar.errors import UserError
from mar.files import jsonable
from mar.learn.advantages import is_flat
from mar.learn.batch import make_batch
from mar.learn.gradient_variance import variance_ratio
from mar.learn.update import compute_advantages, update
from mar.measure.bounds import known_bounds
from mar.measure.step_metrics import StepSeen, step_metrics
from mar.policy.distributed import join
from mar.policy.model import Decoder
from mar.policy.sources import environment
from mar.records import Prompt, Rollout
from mar.run import checkpoint
from mar.run import folder as run_folder
from mar.run.checkpoint import CheckpointWriter
from mar.run.compose import (
    check_sweep,
    compose,
    from_omegaconf,
    require_choice,
    require_language,
    require_one_run,
    validate,
)
from mar.run.console import Display, hint_where_busy
from mar.run.evaluations import Evaluations
from mar.run.from_run import model_of, pin_source
from mar.run.interrupts import Interrupts
from mar.run.record import StepRecord
from mar.run.resume import announce_extension, resume
from mar.run.setup import Training, announce, build_training
from mar.run.summary import close
from mar.run.sweep import Sweep, in_one_process
from mar.run.timing import Timer
from mar.run.wandb_mirror import Mirror
from mar.run.words import HYDRA_FLAGS, Command, NoOptions, Words, run_command, spelled
from mar.sample.engine import Generation
from mar.sample.rollout import judge_groups, judged_only, sample, start_programs_early

# --- the algorithm ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one training step leaves: metrics, the B rollouts, and their advantages [B, T]."""

    metrics: dict[str, Any]
    rollouts: list[Rollout]
    advantages: Tensor


def train_step(training: Training, step: int) -> Step:
    """Sample, judge, make the batch, advantages, update. Steps are counted from 0."""
    algo = training.config.algo
    learner = training.learner
    scorer = training.scorer
    timer = Timer()
    prompts = training.prompt_order.of_step(step)
    with learner.rollout_policy() as policy:
        judged, generation = sample_and_judge(training, policy, prompts, timer, step)
        groups = judged_only(judged, fewest=max(2, algo.pass_k))
        groups, num_replaced, more = replace_flat_groups(training, policy, groups, timer, step)
    with timer("update"):
        device = learner.world.device
        batch = make_batch(groups, scorer.first_open, device, scorer.of_confidence)
        batch, columns = compute_advantages(learner, batch, step)
        metrics: dict[str, Any] = {}
        if algo.variance_every and step % algo.variance_every == 0:
            metrics["adv/variance_ratio"] = variance_ratio(learner, batch)
        metrics |= update(learner, batch, columns, step)

    advantages = columns["advantages"]
    num_unjudged = sum(rollout.unjudged > 0 for group in judged for rollout in group)
    generations = (generation, *more)
    seen = StepSeen(batch, advantages, scorer, generations, num_replaced, num_unjudged)
    metrics |= step_metrics(seen)
    metrics |= timer.metrics(batch.num_tokens)
    return Step(metrics, [rollout for group in groups for rollout in group], advantages)


def sample_and_judge(
    training: Training, policy: Decoder, prompts: Sequence[Prompt], timer: Timer, *identity: int
) -> tuple[list[list[Rollout]], Generation]:
    """The groups of all prompts, on every rank, and how this rank's sampler did.

    Each rank samples and judges its own share of the prompts.
    """
    world = training.learner.world
    with timer("sample"):
        completions, generation = sample(
            policy,
            prompts,
            group_size=training.config.algo.group_size,
            params=training.params,
            kv_budget_tokens=training.config.sampler.kv_budget_tokens,
            identity=(training.config.seed, "train", *identity),
            share=world.share,
            decode=training.scorer.decode,
            on_completion=start_programs_early(training.scorer),
        )
    with timer("verify"):
        own_groups = judge_groups(prompts[world.share], completions, training.scorer)
        groups = world.gather(own_groups)
    return groups, generation


def replace_flat_groups(
    training: Training, policy: Decoder, groups: list[list[Rollout]], timer: Timer, step: int
) -> tuple[list[list[Rollout]], int, list[Generation]]:
    """Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups of newly drawn prompts in
    place of those whose completions all earned the same. At most `algo.resample` attempts.

    Returns the groups, how many of them are new, and how this rank's sampler did in each attempt.
    """
    groups = list(groups)
    replaced = set()
    generations = []
    for attempt in range(1, training.config.algo.resample + 1):
        flat = [i for i, group in enumerate(groups) if is_flat(group)]
        if not flat:
            break
        prompts = training.prompt_order.out_of_turn(step, attempt, num=len(flat))
        fresh, generation = sample_and_judge(training, policy, prompts, timer, step, attempt)
        generations.append(generation)
        for i, group in zip(flat, fresh, strict=True):
            if not any(rollout.unjudged for rollout in group):
                groups[i] = group
                replaced.add(i)
    return groups, len(replaced), generations


# --- the run ---------------------------------------------------------------------------------


def train(
    training: Training,
    first_step: int,
    record: StepRecord,
    checkpoints: CheckpointWriter,
    evaluations: Evaluations,
) -> str:
    """The loop, after `first_step` updates. Returns `finished`, `stopped` (by train.stop_at) or
    `interrupted`."""
    config = training.config
    world = training.learner.world
    display = record.display
    num_steps = config.train.steps
    last_step = min(num_steps, config.train.stop_at or num_steps)
    interrupts = Interrupts(world.leads)
    step = first_step
    try:
        evaluations.catch_up(first_step)
        with display, interrupts.held():
            for step in range(first_step + 1, last_step + 1):
                done = train_step(training, step - 1)
                # Before this step counts, so that no more than checkpoint.every can be lost.
                checkpoints.finish()
                record.write(step, done.metrics, done.rollouts, done.advantages)
                stop = interrupts.agreed(world)
                record.check_finite(step, done.metrics, done.rollouts)
                is_last = stop or step == last_step
                # A signal during an evaluation stops at once: save before it.
                is_saved = step % config.checkpoint.every == 0 or evaluations.is_due(step)
                if is_last or is_saved:
                    checkpoints.save(step)
                if is_last:
                    checkpoints.finish()
                if stop:
                    raise KeyboardInterrupt
                if evaluations.is_due(step):
                    with interrupts.at_once():
                        evaluations.measure(f"step {step}", step)
        if last_step == num_steps:
            evaluations.measure("after", last_step)
    except KeyboardInterrupt:
        display.say(
            f"interrupted at step {step}; checkpoint of step {checkpoints.last_step()} in "
            f"{checkpoints.folder}; the same command goes on from there"
        )
        return "interrupted"
    except OSError as error:
        saved = checkpoints.last_step(reported=error)
        raise UserError(
            f"{error}: mend that, and the same command goes on after step {saved} of "
            f"{record.folder}"
        ) from None
    finally:
        checkpoints.close()  # the folder stays locked until then
    return "finished" if last_step == num_steps else "stopped"


def run(config: Config) -> int:
    """`run_until_end`, as an exit code."""
    return 130 if run_until_end(config) == "interrupted" else 0


def run_until_end(config: Config, skip_finished: bool = False) -> str:
    """Prepare, resume if there is something to resume, train, and close with a table and one JSON
    line. Returns what `train` does; with `skip_finished` a run that is finished is left as it is,
    and `finished before` returned."""
    began = time.perf_counter()
    display = Display(config.logger.console, 0, config.train.steps)
    world = join(config.device, config.scale)
    display.console.quiet = not world.leads
    config = announce(config, display)
    hint_where_busy(display, world.device.type, config.model.threads)
    if config.model.threads:
        torch.set_num_threads(config.model.threads)

    asked = config
    config = world.told(lambda: pin_source(asked, display.say))
    # Refuse a folder that belongs to something else before anything is loaded.
    found = run_folder.find(config.to_dict())
    if skip_finished and found.is_done:
        display.say(f"{found.path} is finished with an equal configuration: skipped")
        return "finished before"
    if found.extends is not None:
        announce_extension(config, found.extends, world, display)
    # Once a machine: it may fetch the model, or merge a run's adapters, and hashes all of it.
    model_folder, provenance = world.found_here(lambda: model_of(config.model))
    training = build_training(config, model_folder, display, world)
    learner = training.learner
    folder = Path(config.run_dir)
    if world.leads:
        _lock = run_folder.lock(folder)  # until this function ends
        models = [learner.policy, learner.critic] if learner.critic else [learner.policy]
        keep, lag = config.checkpoint.keep, config.algo.lag
        checkpoint.require_room(folder / "checkpoints", models, keep, num_past=lag)
        told_date = f"{CLOCK:%Y-%m-%d}"  # by a chat template that asks for today's
        origin = {"model": provenance, "chat_date": told_date, **environment()}
        opened = run_folder.prepare({**config.to_dict(), "provenance": origin})
        if opened.archive:
            display.say(f"{folder} was finished: it is {opened.archive} now, and {opened.why}")
    world.wait()

    held_out = training.held_out.prompts
    num_answers = config.reward.num_answers
    document: dict[str, Any] = {"task": config.data.task, "num_items": len(held_out)}
    document |= known_bounds([prompt.example for prompt in held_out], num_answers) or {}
    first_step = resume(folder, learner, document, display)
    display.first_step = first_step
    say_what_trains(training, folder, display)
    if config.logger.wandb != "off" and world.leads:
        mode = config.logger.wandb
        display.mirror = Mirror(mode, folder, jsonable(config.to_dict()), display.say)

    outcome = train(
        training,
        first_step,
        record=StepRecord(folder, world.leads, config.algo.max_skips, display),
        checkpoints=CheckpointWriter(
            folder / "checkpoints", learner, config.checkpoint.keep, display.say
        ),
        evaluations=Evaluations(training, folder, display, document),
    )
    if outcome == "finished" and world.leads:
        seconds = time.perf_counter() - began
        close(document, num_answers, folder, display, seconds, pictures)
    return outcome


def say_what_trains(training: Training, folder: Path, display: Display) -> None:
    config = training.config
    learner = training.learner
    parameters = list(learner.policy.parameters())
    model = config.model.path if config.model.source == "run" else config.model.name
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    display.say(
        f"{config.data.task}: {len(training.prompt_order.prompts)} training and "
        f"{len(training.held_out.prompts)} held-out prompts; "
        f"training {trained:,} of the {total:,} parameters of {model}; "
        f"writing to {folder}"
    )
    if learner.sampling_copy:
        copied = learner.sampling_copy.parameters()
        size = sum(p.numel() * p.element_size() for p in copied) / 1e9
        kept = "kept" if config.scale.keep_copy else "freed"
        display.say(
            f"sampling from an unsharded copy: {size:.3g} GB on every rank, {kept} while training"
        )


def pictures(folder: Path) -> Mapping[str, Path]:
    """The run's figures, as files in its folder."""
    from mar.figures import plots  # matplotlib is an extra

    return plots.save(plots.of_run(folder), folder / "plots")


# --- the command -----------------------------------------------------------------------------


SWEEP = Sweep()


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def with_hydra(tree: Any) -> None:
    """A job of a sweep; with --cfg and --info Hydra shows the settings, and comes not here."""

    def checked() -> Config:
        config = from_omegaconf(tree)
        require_language(config, HydraConfig.get().overrides.task)
        return validate(config)

    if in_one_process():
        SWEEP.take(checked, partial(run_until_end, skip_finished=True))
    else:
        run_until_end(checked(), skip_finished=True)


def start(words: Words[NoOptions]) -> int:
    """One run, or with Hydra's flags a sweep or a look at the settings."""
    flags = [word for word in words.settings if word in HYDRA_FLAGS]
    values = {word for flag in flags for word in HYDRA_FLAGS[flag]}
    settings = [word for word in words.settings if word not in flags and word not in values]
    of_hydra = [word for word in words.settings if word not in settings]
    modes = [flag for flag in dict.fromkeys(flags) if flag != "--resolve"]
    if len(modes) > 1:
        raise UserError(
            f"{modes[0]} and {modes[1]}: one of the two can be chosen, leave the other out"
        )
    if {"-m", "--multirun"} & set(flags):
        require_choice(settings)
        check_sweep(settings)
    else:
        require_one_run(settings)
        if not flags:
            require_choice(settings)
            return run(compose(settings))
        compose(settings, check=False)
    # Hydra reads no flag that stands between two settings.
    sys.argv[1:] = [*of_hydra, *spelled(settings, sweep=True)]
    return SWEEP.run_to_its_end(with_hydra)


COMMAND = Command(
    name="mar.train",
    about=__doc__,
    options=NoOptions,
    settings=(
        "train.steps",
        "algo.prompts_per_step",
        "algo.group_size",
        "reward.num_answers",
        "model.path",
        "data.path",
        "eval.num_items",
        "checkpoint.every",
        "seed",
        "name",
        "out",
        "device",
    ),
    flags=True,
    examples=(
        "+experiment=medqa                                   # without a GPU: some minutes",
        "+experiment=jsonl data.path=<your file> model=hf model.path=<hub id or folder>",
        "-m +experiment=clinic seed=0,1 algo=own,reinforce   # a sweep: one run for each",
        "+experiment=clinic --cfg job                        # every setting with its value",
    ),
)


def main(words: Sequence[str]) -> int:
    return run_command(COMMAND, words, start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

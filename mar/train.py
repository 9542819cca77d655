"""Train a policy to write K answers with honest confidences:  python -m mar.train +experiment=medqa

One step: sample G completions of P prompts, verify and pay them, one advantage per token, then the updates. REINFORCE with a leave-one-out baseline
is the default; ratios, a critic, a reference model and several updates per batch are switches (conf/algo/). There is no replay.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from torch import Tensor

from mar.config import Config
from mar.errors import UserError, exit_code
from mar.files import plain, write_json
from mar.learn.advantages import zero_group_frac
from mar.learn.batch import make_batch
from mar.learn.gradient_variance import variance_ratio
from mar.learn.learner import Job
from mar.learn.update import prepare, update
from mar.measure.answer_sets import set_metrics
from mar.measure.bounds import known_bounds
from mar.measure.held_out import measure
from mar.policy.distributed import join
from mar.policy.model import Decoder
from mar.policy.sources import environment, resolve_model
from mar.records import Rollout
from mar.run import checkpoint
from mar.run import folder as rundir
from mar.run.completions import completion_row
from mar.run.compose import compose, from_omegaconf, validate
from mar.run.console import Display
from mar.run.interrupts import Interrupts
from mar.run.resume import resume
from mar.run.setup import announce, build_job
from mar.run.summary import close, summary
from mar.run.wandb_mirror import Mirror
from mar.sample.rollout import beginner, judge_groups, judged_only, sample


def refill(job: Job, policy: Decoder, step: int, groups: list[list[Rollout]]) -> int:
    """Dynamic sampling (DAPO): put groups of other prompts in place of those whose completions all earned the same, at most algo.resample times.
    Returns how many were replaced."""
    p, world, replaced = job.protocol, job.world, 0
    for attempt in range(1, job.config.algo.resample + 1):
        flat = [i for i, group in enumerate(groups) if len({r.total for r in group}) == 1]
        if not flat:
            break
        prompts, identity = (
            job.prompts_of(step, attempt)[: len(flat)],
            (job.config.seed, "train", step, attempt),
        )
        size = job.config.algo.group_size
        fresh, _ = sample(
            policy, prompts, size, p.params, p.kv_budget_tokens, identity, world.share
        )
        judged = world.gather(
            judge_groups(prompts[world.share], fresh, p.grammar, p.spec, p.verifier, p.decode)
        )
        for i, group in zip(flat, judged, strict=True):
            if not any(r.unjudged for r in group):
                groups[i] = group
                replaced += 1
    return replaced


def train_step(job: Job, step: int) -> tuple[dict[str, Any], list[Rollout], Tensor]:
    """Sample, verify, advantage, loss, step. Returns metrics, B rollouts and their advantages [B, T]."""
    config, p, world = job.config, job.protocol, job.world
    clock = [time.perf_counter()]
    prompts = job.prompts_of(step)
    drawn = (
        p.params,
        p.kv_budget_tokens,
        (config.seed, "train", step),
        world.share,
        beginner(p.grammar, p.verifier, p.decode),
    )
    with job.sampler() as policy:
        completions, generation = sample(policy, prompts, config.algo.group_size, *drawn)
        clock.append(time.perf_counter())
        judged = world.gather(
            judge_groups(prompts[world.share], completions, p.grammar, p.spec, p.verifier, p.decode)
        )
        groups = judged_only(judged, max(2, config.algo.pass_k))
        replaced = refill(job, policy, step, groups)
    clock.append(time.perf_counter())
    batch, columns = prepare(job, make_batch(groups, job.first_open, world.device))
    every = config.algo.variance_every  # before the update: of the policy that sampled
    metrics: dict[str, Any] = (
        {"adv/variance_ratio": variance_ratio(job, batch)} if every and step % every == 0 else {}
    )
    metrics |= update(job, batch, columns, step)
    clock.append(time.perf_counter())

    rollouts = [rollout for group in groups for rollout in group]
    sets, _ = set_metrics(rollouts, p.verifier, p.grammar.confident)
    metrics |= {
        "reward/total": float(np.mean([r.total for r in rollouts])),
        **{
            f"reward/{name}": float(np.mean([r.parts[name] for r in rollouts]))
            for name in rollouts[0].parts
        },
        "adv/mean": columns["advantages"][batch.completion_mask].mean().item(),
        "adv/std": columns["advantages"][batch.completion_mask].std().item(),
        "adv/replaced_groups": replaced,
        "adv/zero_group_frac": zero_group_frac(batch),
        **{f"train/{name}": value for name, value in sets.items()},
        "train/unjudged": sum(r.unjudged > 0 for group in judged for r in group),
        "train/truncated_frac": float(
            np.mean([r.completion.finish_reason == "length" for r in rollouts])
        ),
        "sampler/decode_steps": generation.num_steps,
        "sampler/occupancy": generation.occupancy,
        "perf/sample_s": clock[1] - clock[0],
        "perf/verify_s": clock[2] - clock[1],
        "perf/update_s": clock[3] - clock[2],
        "perf/tokens_per_s": batch.num_tokens / (clock[3] - clock[0]),
    }
    return metrics, rollouts, columns["advantages"]


def skipped(
    job: Job, step: int, metrics: Mapping[str, Any], rollouts: Sequence[Rollout], display: Display
) -> bool:
    """Whether updates of this step were left out because they were not finite; says so and keeps the completions."""
    number, file = metrics["optim/skipped"], job.folder / "skipped.jsonl"
    if not number:
        return False
    job.write(file.name, [completion_row(r, "train", step) for r in rollouts])
    display.say(
        f"step {step}: a loss or gradient is not finite, {number} updates were left out; completions in {file}"
    )
    return True


def train(job: Job, first_step: int, display: Display, document: dict[str, Any]) -> str:
    """The loop, from update `first_step`. Returns `finished`, `stopped` (by train.stop_at) or `interrupted`."""
    config, interrupts, checkpoints = (
        job.config,
        Interrupts(job.world.leads),
        job.folder / "checkpoints",
    )
    last_step = min(config.train.steps, config.train.stop_at or config.train.steps)
    step, in_a_row = first_step, 0
    behind: Future[Path] | None = None  # the checkpoint that is written while the next step runs

    def saved(said: OSError | None = None) -> int:
        """The step that the same command goes on from; of what is being written, how it ends."""
        if behind and not (error := behind.exception()):
            return int(behind.result().name[-6:])
        if behind and error is not said:
            display.say(f"a checkpoint could not be written: {error}")
        return found.step if (found := checkpoint.newest(checkpoints, display.say)) else 0

    def due(step: int) -> bool:
        return (
            config.eval.every > 0
            and step % config.eval.every == 0
            and 0 < step < config.train.steps
        )

    try:
        if "before" not in document:
            evaluate(job, "before", 0, document, display)
        elif (
            due(first_step) and document["history"][-1]["step"] < first_step
        ):  # interrupted between checkpoint and evaluation
            evaluate(job, f"step {first_step}", first_step, document, display)
        with display:
            for step in range(first_step + 1, last_step + 1):
                with interrupts.held():
                    metrics, rollouts, advantages = train_step(job, step - 1)
                    if behind:
                        behind.result()  # before this step counts, so that no more than checkpoint.every can be lost
                    job.write("metrics.jsonl", [{"step": step, **metrics}])
                    shown = zip(rollouts, advantages.tolist(), strict=True)
                    job.write(
                        "completions.jsonl", [completion_row(r, "train", step, a) for r, a in shown]
                    )
                    display.step(step, metrics)
                    stop = interrupts.agreed(job.world)
                    in_a_row = in_a_row + 1 if skipped(job, step, metrics, rollouts, display) else 0
                    if in_a_row == config.algo.max_skips:
                        raise UserError(
                            f"{in_a_row} steps in a row were not finite: lower optim.lr; {checkpoints} has the last good step"
                        )
                    if step % config.checkpoint.every == 0 or step == last_step or stop:
                        behind = checkpoint.save(
                            checkpoints,
                            step,
                            job.model,
                            job.optimizer,
                            config.checkpoint.keep,
                            job.critic,
                            job.world,
                        )
                        if step == last_step or stop:
                            behind.result()
                if stop:
                    raise KeyboardInterrupt
                if due(step):
                    evaluate(job, f"step {step}", step, document, display)
        if last_step == config.train.steps:
            evaluate(job, "after", last_step, document, display)
    except KeyboardInterrupt:
        display.say(
            f"interrupted at step {step}; checkpoint of step {saved()} in {checkpoints}; the same command goes on from there"
        )
        return "interrupted"
    except OSError as error:
        raise UserError(
            f"{error}: mend that, and the same command goes on after step {saved(error)} of {job.folder}"
        ) from None
    finally:
        wait([behind] if behind else [])  # the folder stays locked for so long
    return "finished" if last_step == config.train.steps else "stopped"


def evaluate(job: Job, stage: str, step: int, document: dict[str, Any], display: Display) -> None:
    """Measure the policy, add it to `eval.json`, and say so."""
    began = time.perf_counter()
    with job.sampler() as policy:
        metrics, rollouts = measure(policy, job.protocol, job.world)
    texts = [completion_row(r, "eval", step) for r in rollouts[:200]]
    job.write("completions.jsonl", texts)
    if display.mirror:
        display.mirror.completions(step, plain(texts))
    document["history"] = [h for h in document.get("history", []) if h["step"] < step] + [
        {"step": step, **metrics}
    ]
    if stage in ("before", "after"):
        document[stage] = metrics
        document["gap_closed"] = summary(document, job.config.reward.num_answers)["gap_closed"]
    if job.world.leads:
        write_json(job.folder / "eval.json", document)
    key = f"coverage@{job.config.reward.num_answers}"
    shown = "  ".join(
        f"{k} {metrics[k]:.3f}"
        for k in (key, "top1", "ece", "format_rate")
        if metrics.get(k) is not None
    )
    if metrics["format_rate"] == 0:
        display.say(
            "no completion has the right form, so nothing can be learnt: warm the model up (python -m mar.sft), or take another"
        )
    display.say(
        f"eval {stage} ({len(rollouts)} items, {time.perf_counter() - began:.0f} s)  {shown}"
    )


def run(config: Config) -> int:
    """Prepare, resume if there is something to resume, train, and close with a table and one JSON line. Returns the exit code."""
    began, display = time.perf_counter(), Display(config.logger.console, 0, config.train.steps)
    world = join(config.device, config.scale)
    display.console.quiet = not world.leads
    config = announce(config, display)
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    rundir.find(
        config.to_dict()
    )  # refuse a folder that belongs to something else before anything is loaded
    model_folder, provenance = resolve_model(
        config.model.source, config.model.name, config.model.path
    )
    folder = Path(config.run_dir)
    job = build_job(config, folder, model_folder, display, world)
    if world.leads:
        _held = rundir.lock(folder)  # until this function ends
        checkpoint.require_room(folder.parent, [job.model, *(job.critic or ())[:1]])
        place = rundir.prepare(
            {**config.to_dict(), "provenance": {"model": provenance, **environment()}}
        )
        if place.archive:
            display.say(
                f"{folder} was finished: it is {place.archive} now, and differed in {', '.join(place.differs) or 'nothing'}"
            )
    world.wait()
    document: dict[str, Any] = {"task": config.data.task, "num_items": len(job.protocol.prompts)}
    document |= (
        known_bounds([p.example for p in job.protocol.prompts], config.reward.num_answers) or {}
    )
    first_step = resume(job, document, display)
    total, trained = (
        sum(p.numel() for p in job.model.parameters() if p.requires_grad or every)
        for every in (True, False)
    )
    display.say(
        f"{config.data.task}: {len(job.prompts)} training and {len(job.protocol.prompts)} held-out prompts; "
        f"training {trained:,} of the {total:,} parameters of {config.model.name}; writing to {folder}"
    )
    if job.whole:
        size = sum(p.numel() * p.element_size() for p in job.whole.parameters()) / 1e9
        kept = "kept" if config.scale.keep_copy else "freed"
        display.say(
            f"sampling from an unsharded copy: {size:.3g} GB on every rank, {kept} while training"
        )
    display.first_step = first_step
    if config.logger.wandb != "off" and world.leads:
        display.mirror = Mirror(config.logger.wandb, folder, plain(config.to_dict()), display.say)
    outcome = train(job, first_step, display, document)
    if outcome == "finished" and world.leads:
        close(
            document,
            config.reward.num_answers,
            folder,
            display,
            time.perf_counter() - began,
            pictures,
        )
    return 130 if outcome == "interrupted" else 0


def pictures(folder: Path) -> Mapping[str, Path]:
    """The run's figures, as files in its folder."""
    from mar.figures import plots  # matplotlib is an extra

    return plots.save(plots.of_run(folder), folder / "plots")


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def main(tree: Any) -> None:
    if code := exit_code(lambda: run(validate(from_omegaconf(tree)))):
        sys.exit(code)


def refuse_unknown_words(words: Sequence[str]) -> None:
    """Exit with one sentence where Hydra would print a page: a misspelt key or option. Sweeps and flags are left to Hydra."""
    if not any(word.startswith("-") for word in words) and (
        code := exit_code(lambda: compose(words, check=False))
    ):
        sys.exit(code)


if __name__ == "__main__":
    refuse_unknown_words(sys.argv[1:])
    main()

"""Supervised warm-up on demonstrations, before reinforcement learning makes the answers good.

A model learns the form of the answers, and as far as a task tells it the probability of each, from
exact targets (mar/learn/demonstrations.py): that of an answer is the posterior. All of its
parameters are trained, or with model.lora_rank=12 adapters. The same command goes on where it was
cut off. The folder then holds a checkpoint: its last line has the words to go on with.

Every sft.eval_every steps the probability of every gold is computed for held-out questions, without
drawing: what one answer and three answers cover, beside what constant answers and the posterior
itself would (sft.jsonl).
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mar.answers.grammar import FORMS
from mar.answers.tokenizer import copy_tokenizer, load_tokenizer, num_tokens
from mar.config import Config, ModelOptions
from mar.files import append_jsonl, truncate_jsonl, write_jsonl
from mar.learn.demonstrations import (
    PLAIN,
    ConfidenceHint,
    DemonstrationBatch,
    make_demonstration_batch,
    short_forms,
    soft_target_loss,
)
from mar.learn.optim import clip_gradients, make_optimizers, require_finite, set_learning_rate
from mar.learn.warm_up import Asking, answer_masses, make_form_batch
from mar.measure.single_answers import bars_of, coverage_of, divergence, gold_probabilities, means
from mar.policy.lora import (
    adapted,
    merge,
    require_rounded_are_frozen,
    save_adapters,
    trainable_pattern,
)
from mar.policy.model import Decoder
from mar.policy.weights import load_model, save_model
from mar.records import Example
from mar.run.asked_as import write_asked_as
from mar.run.compose import compose, require_choice
from mar.run.console import Display
from mar.run.evaluation_folder import require_writable
from mar.run.folder import lock
from mar.run.from_run import model_of
from mar.run.setup import announce, load_data
from mar.run.warm_up import (
    ADAPTERS_LR,
    LR,
    Progress,
    Questions,
    Recent,
    SftOptions,
    asking_of,
    check_options,
    folder_of,
    prior_of,
    rate_factor,
    require_own_folder,
    restore_state,
    save_state,
    without_places,
)
from mar.run.words import Command, Words, run_command

LOG = "sft.jsonl"


def draw_batch(
    config: Config,
    sft: SftOptions,
    asking: Asking,
    examples: Sequence[Example],
    others: Sequence[str],
    step: int,
) -> tuple[str, DemonstrationBatch]:
    """The demonstrations of a step (from 0), and the name of their form or mixture. `others`:
    answers to other questions."""
    rng = np.random.default_rng([config.seed, step])
    hint = ConfidenceHint(sft.hint, sft.hint_counts, sft.hint_spread)
    is_plain = step < sft.plain_steps
    if sft.mixture == "per_step":
        form = int(rng.choice(len(FORMS), p=np.array(sft.shares) / sum(sft.shares)))
        num_answers = config.reward.num_answers if config.reward.multi else 3
        grammar = PLAIN if is_plain else short_forms(num_answers)[form]
        return grammar.form, make_form_batch(examples, grammar, asking, rng, others, hint)
    mixture = "plain" if is_plain else sft.mixture
    batch = make_demonstration_batch(
        examples,
        noun=asking.noun,
        tokenizer=asking.tokenizer,
        encode=asking.encode,
        rng=rng,
        others=others,
        mixture=mixture,
        hint=hint,
        rows=sft.rows,
        explain_decimals=asking.explain_decimals,
    )
    return mixture, batch


class HeldOut:
    """What the model is measured on as it learns: the probability of every gold, without drawing."""

    def __init__(self, config: Config, num: int, display: Display) -> None:
        self.examples = load_data(config, "validation", num, 0, display)
        self.p = gold_probabilities(self.examples)
        self.prior = prior_of(config, self.examples, display)
        # Else golds are right or wrong, and only their mass can be told.
        self.is_distribution = bool(self.p.any())

    def bars(self) -> dict[str, float]:
        """What needs no model."""
        return means(bars_of(self.p, self.prior)) if self.is_distribution else {}

    def measure(self, model: Decoder, asking: Asking) -> dict[str, float]:
        q = answer_masses(model, self.examples, asking)
        values = coverage_of(q, self.p, closed=self.prior is not None)
        return means(values if self.is_distribution else {"named": values["named"]})


def run(words: Words[SftOptions]) -> None:
    """Train, measure and save; a folder that was begun goes on."""
    sft = words.options
    require_choice(words.settings)
    display = Display("plain", 0, sft.steps)
    config = announce(replace(compose(words.settings), device="cpu"), display)
    check_options(sft, config, words.settings)
    options, data, optim = config.model, config.data, config.optim
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    folder = folder_of(config, words.settings)
    log = folder / LOG
    require_own_folder(folder, log)
    require_writable(folder)
    _lock = lock(folder, "wait for it, or choose another run_dir= or name=")  # until run ends

    source, record = model_of(options)
    fixed = {"model": record["sha256"], "sft.muon": sft.muon}
    tokenizer = load_tokenizer(source)
    asking = asking_of(config, tokenizer)
    held_out = HeldOut(config, sft.eval_items, display) if sft.eval_every else None
    taught = replace(config, data=replace(data, num_asked=sft.asked or data.num_asked))
    questions = Questions(taught, sft.batch, display)
    model = adapted(load_model(source, num_tokens=num_tokens(tokenizer)), options)
    peak = sft.lr or (ADAPTERS_LR if options.lora_rank else LR)
    optimizers = make_optimizers(model, peak, optim, trainable_pattern(options), sft.muon)
    require_rounded_are_frozen(model)

    folder.mkdir(parents=True, exist_ok=True)
    resumed = restore_state(model, optimizers, folder, fixed)
    began = time.perf_counter() - resumed.seconds
    if resumed.step:
        display.say(f"{folder} goes on after step {resumed.step} of {sft.steps}")

    def write(row: dict[str, Any]) -> None:
        row["seconds"] = round(time.perf_counter() - began)
        append_jsonl(log, [row])
        display.say(json.dumps(row))

    told = {"words": told_words(words)}
    if resumed.step:
        truncate_jsonl(log, resumed.step)
        append_jsonl(log, [{"step": resumed.step, **told}])
    else:
        bars = {"held_out": len(held_out.examples), **held_out.bars()} if held_out else {}
        write_jsonl(log, [{"step": 0, **told, **bars}])
        if held_out:
            write({"step": 0, **held_out.measure(model, asking)})

    recent = Recent()
    for step in range(resumed.step, sft.steps):
        examples = questions.of(step)
        form, batch = draw_batch(config, sft, asking, examples, questions.answers, step)
        loss = soft_target_loss(model, batch)
        model.zero_grad()
        loss.backward()
        norm = clip_gradients(model, optim.grad_clip)
        require_finite(norm, step + 1, f"lower sft.lr; {folder} has the last state")
        factor = rate_factor(step, sft)
        for optimizer, rate in optimizers:
            set_learning_rate(optimizer, rate * factor)
            optimizer.step()

        excess = loss.item() - batch.entropy  # nats a counted token
        num_completions = len(examples) * sft.rows
        recent.add(form, excess * batch.num_counted / num_completions)
        recent.positions += len(batch.packed.ids)
        prior = held_out.prior if held_out and held_out.is_distribution else None
        if prior is not None and form == "rlvr_single":
            # Without reading, on the same questions: the noise of the choice cancels between both.
            recent.add("of_prior", float(divergence(gold_probabilities(examples), prior).mean()))

        done, is_last = step + 1, step + 1 == sft.steps
        if done % sft.log_every and not is_last:
            continue
        cpu_seconds = round(time.process_time())
        rates = {"lr": round(peak * factor, 7), "grad_norm": round(norm, 2)}
        write({"step": done} | recent.row() | rates | {"cpu_seconds": cpu_seconds})
        recent = Recent()
        if done % sft.save_every and not is_last:
            continue
        if held_out and (done % sft.eval_every == 0 or is_last):
            write({"step": done, **held_out.measure(model, asking)})
        progress = Progress(done, time.perf_counter() - began, resumed.names)
        save_state(model, optimizers, progress, folder, fixed)
    save_checkpoint(model, folder, source, config, sft.dtype)
    display.say(f"wrote {folder}, to go on with: {words_to_go_on(folder, options)}")


def words_to_go_on(folder: Path, model: ModelOptions) -> str:
    """The settings with which a run asks the warmed-up model in the words of its demonstrations."""
    words = [f"model=hf model.path={folder}", "model.thinking=false"]
    if not model.explain_decimals:  # true in conf/model/hf.yaml
        words.append("model.explain_decimals=false")
    return " ".join(words)


def told_words(words: Words[SftOptions]) -> list[str]:
    """What the log says of the command line: everything but where things lie."""
    own = [f"sft.{name}={value}" for name, value in asdict(words.options).items()]
    return without_places(words.settings) + own


def save_checkpoint(model: Decoder, folder: Path, source: Path, config: Config, dtype: str) -> None:
    """A checkpoint of the model, its adapters merged, and these alone in `adapters/`."""
    stored = getattr(torch, dtype)
    if config.model.lora_rank:
        base = config.model.path or config.model.name
        save_adapters(model, folder / "adapters", base, stored)
    copy_tokenizer(source, folder)
    write_asked_as(folder, replace(config, model=replace(config.model, thinking=False)), False)
    save_model(merge(model), folder, stored)


COMMAND = Command(
    name="mar.sft",
    about=__doc__,
    options=SftOptions,
    prefix="sft.",
    settings=(
        "model.path",
        "model.lora_rank",
        "data.path",
        "reward.num_answers",
        "seed",
        "name",
        "out",
    ),
    examples=(
        "+experiment=jsonl data.path=<your file> model=smollm2-135m",
        "+experiment=jsonl data.path=<your file> model=hf model.path=<folder> model.lora_rank=12",
        "+experiment=clinic model=hf model.path=<folder> run_dir=<new folder> sft.steps=2000",
    ),
)


def main(words: Sequence[str]) -> int:
    return run_command(COMMAND, words, run, "interrupted: the same command goes on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

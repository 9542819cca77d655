"""Supervised warm-up of a pretrained model through adapters: it keeps what it knows, and learns to
read the questions.

    python -m mar.warmup +experiment=ddxplus_bayes model=smollm2-135m data.path=FOLDER \
        model.lora_rank=12 model.lr=1e-3 run_dir=FOLDER sft.steps=1000

The words are those of mar.train, with a few of its own under `sft.` (mar/run/warm_up.py). Every
demonstration has exact targets (mar/learn/demonstrations.py): that of an answer is the posterior.
The same command goes on where it was cut off. Every `sft.eval_every` steps the probability of every
gold is computed for held-out questions, without drawing: what one answer and three answers cover,
beside what constant answers and the posterior itself would.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mar.answers.grammar import FORMS
from mar.answers.tokenizer import load_tokenizer, num_tokens
from mar.errors import exit_code
from mar.files import append_jsonl, truncate_jsonl, write_jsonl
from mar.learn.demonstrations import SHORT, piece_encoder, soft_target_loss
from mar.learn.optim import clip_gradients, make_optimizer, require_finite, set_learning_rate
from mar.learn.warm_up import Asking, answer_masses, make_form_batch
from mar.measure.single_answers import bars_of, coverage_of, divergence, gold_probabilities, means
from mar.policy.lora import adapted, save_adapters, trainable_pattern
from mar.policy.weights import load_model
from mar.run.console import Display
from mar.run.from_run import model_of
from mar.run.setup import load_data
from mar.run.warm_up import (
    Progress,
    Questions,
    Recent,
    learning_rate,
    prior_of,
    restore_state,
    save_state,
    split_words,
)
from mar.tasks.registry import get_task

LOG = "warmup.jsonl"


def run(words: Sequence[str]) -> None:
    sft, config = split_words(words)
    options, data, optim = config.model, config.data, config.optim
    torch.set_num_threads(options.threads or torch.get_num_threads())
    display = Display(config.logger.console, 0, sft.steps)
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)

    model_folder, _ = model_of(options)
    tokenizer = load_tokenizer(model_folder)
    model = adapted(load_model(model_folder, num_tokens=num_tokens(tokenizer)), options)
    noun = get_task(data.task).noun
    asking = Asking(tokenizer, piece_encoder(tokenizer), noun, data.request_first)
    betas = (optim.betas[0], optim.betas[1])
    trainable = trainable_pattern(options)
    optimizer = make_optimizer(model, optim.lr, betas, optim.eps, optim.weight_decay, trainable)

    held_out = load_data(config, "validation", sft.eval_items, 0, display)
    p, prior = gold_probabilities(held_out), prior_of(config, held_out, display)
    taught = replace(config, data=replace(data, num_asked=sft.asked or data.num_asked))
    questions = Questions(taught, sft.batch, display)
    resumed = restore_state(model, optimizer, folder)
    began = time.perf_counter() - resumed.seconds
    log = folder / LOG

    def write(row: dict[str, Any]) -> None:
        row["seconds"] = round(time.perf_counter() - began)
        append_jsonl(log, [row])
        display.say(json.dumps(row))

    def measure(step: int) -> None:
        q = answer_masses(model, held_out, asking)
        write({"step": step} | means(coverage_of(q, p, closed=prior is not None)))

    if resumed.step:
        truncate_jsonl(log, resumed.step)
        append_jsonl(log, [{"step": resumed.step, "words": list(words)}])
    else:
        bars = means(bars_of(p, prior))
        write_jsonl(log, [{"step": 0, "words": list(words), "held_out": len(held_out), **bars}])
        measure(0)

    recent = Recent()
    for step in range(resumed.step, sft.steps):
        rng = np.random.default_rng([config.seed, step])
        examples = questions.of(step)
        form = int(rng.choice(len(FORMS), p=np.array(sft.shares) / sum(sft.shares)))
        batch = make_form_batch(examples, SHORT[form], asking, rng)
        loss = soft_target_loss(model, batch)
        model.zero_grad()
        loss.backward()
        norm = clip_gradients(model, optim.grad_clip)
        require_finite(norm, step + 1, f"lower model.lr; {folder} has the last state")
        rate = learning_rate(step, sft, optim.lr)
        set_learning_rate(optimizer, rate)
        optimizer.step()

        excess = loss.item() - batch.entropy  # nats a counted token
        recent.add(FORMS[form], excess * batch.token_weights.sum().item() / len(examples))
        recent.positions += len(batch.packed.ids)
        if prior is not None and FORMS[form] == "rlvr_single":
            # Without reading, on the same questions: the noise of the choice cancels between both.
            recent.add("of_prior", float(divergence(gold_probabilities(examples), prior).mean()))

        done, is_last = step + 1, step + 1 == sft.steps
        if done % sft.save_every and not is_last:
            continue
        cpu_seconds = round(time.process_time())
        of_step = {"lr": round(rate, 7), "grad_norm": round(norm, 2), "cpu_seconds": cpu_seconds}
        write({"step": done} | recent.row() | of_step)
        recent = Recent()
        if done % sft.eval_every == 0 or is_last:
            measure(done)
            save_adapters(model, folder / "adapters", options.path or options.name, torch.bfloat16)
        save_state(model, optimizer, Progress(done, time.perf_counter() - began), folder)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(sys.argv[1:])))

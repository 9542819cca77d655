"""A run's policy as a checkpoint that others load.

Writes safetensors, tokenizer, chat template, generation config and a model card with the prompt
that the policy was trained on; transformers and vLLM read the folder.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mar.answers.grammar import Grammar, grammar_of
from mar.answers.prompts import fit_grammar, instructions
from mar.answers.tokenizer import (
    CLOCK,
    copy_tokenizer,
    load_tokenizer,
    num_tokens,
    reads_clock,
    stop_ids,
)
from mar.config import Config, one_of, option
from mar.errors import UserError
from mar.figures.runs import read_document
from mar.policy.lora import adapted, is_adapter, merge, save_adapters, trainable_pattern
from mar.policy.model import Decoder
from mar.policy.weights import load_model, save_model
from mar.run import checkpoint
from mar.run.asked_as import write_asked_as
from mar.run.compose import load_config
from mar.run.evaluation_folder import make_folder, require_writable
from mar.run.folder import require_run
from mar.run.from_run import model_of
from mar.run.words import Command, Words, run_command
from mar.tasks.registry import get_task

CARD = """---
library_name: transformers
tags: [multi-answer, reinforcement-learning]
---
# {model}, {task}

{model} after {step} of {steps} steps of `mar` on {task} ({objective}, K={K}, credit {credit}); parameters in {dtype}.

It was asked in these words, {place} the question, and sampled at temperature {temperature}:

```
{instructions}
```
{told_date}{results}"""

# Small updates are less than half a unit in the last place of the weight that they are added to.
ROUNDED = (
    "adapters merged into bfloat16 weights are rounded: for exactly the policy that was trained "
    "take adapters=true or dtype=float32"
)


@dataclass
class ExportOptions:
    """Words of this command alone."""

    out: Path | None = option(None, help="a new folder; RUN/export")
    dtype: str = one_of("bfloat16", "float32", help="of the weights")
    adapters: bool = option(False, help="true: the adapters alone, in peft's format")


# how many held-out questions, and what was measured on them
Measured = tuple[int, dict[str, float]]


def _measured_at(run: Path, step: int, steps: int) -> Measured:
    """What eval.json says of the policy after a step; nothing where that was not measured."""
    document = read_document(run / "eval.json")
    of_steps = {entry.get("step"): entry for entry in document.get("history") or ()}
    entry = (document.get("after") if step == steps else None) or of_steps.get(step) or {}
    metrics = {name: value for name, value in entry.items() if isinstance(value, float)}
    return document.get("num_items", 0), metrics


def card(
    config: Config,
    grammar: Grammar,
    step: int,
    dtype: str,
    measured: Measured,
    told_date: str = "",
) -> str:
    """README.md of the exported folder. `told_date`: the date that a chat template with a clock was
    told in training, or empty."""
    task = config.data.task
    num_items, metrics = measured
    rows = [f"| {name} | {value:.3f} |\n" for name, value in metrics.items()]
    results = ""
    if rows:
        header = f"\nOn {num_items} held-out items:\n\n| metric | |\n|---|---|\n"
        results = header + "".join(rows)
    if told_date:
        told_date = f"\nIts chat template asks for the date; in training it was told {told_date}.\n"
    return CARD.format(
        model=config.model.path or config.model.name,
        step=step,
        steps=config.train.steps,
        task=task,
        objective=config.reward.objective,
        K=grammar.num_answers,
        credit=config.algo.credit,
        dtype=dtype,
        place="above" if config.data.request_first else "after",
        temperature=config.algo.temperature,
        instructions=instructions(
            grammar, get_task(task).noun, explain_decimals=config.model.explain_decimals
        ),
        results=results,
        told_date=told_date,
    )


def export(run: Path, folder: Path, dtype: str, adapters: bool = False) -> Path:
    """Write `folder`: a checkpoint with the adapters merged, or with `adapters` these alone (peft).

    Raises UserError for a run without a checkpoint, for a folder that holds something, and where
    adapters alone are not what was trained.
    """
    config = load_config(run / "config.yaml")
    saved = checkpoint.require_newest(run, config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no empty folder: name another or remove it")
    require_writable(folder)
    measured = _measured_at(run, saved.step, config.train.steps)

    source, _ = model_of(config.model)
    model = adapted(load_model(source), config.model)
    tokenizer = load_tokenizer(source)
    if adapters:
        _require_only_adapters(run, config, model)
    checkpoint.restore_weights(saved, model)
    make_folder(folder)
    if adapters:
        save_adapters(model, folder, config.model.path or config.model.name)
        return folder

    copy_tokenizer(source, folder)
    token_ids = _special_token_ids(tokenizer, source)
    no_tokens = list(range(num_tokens(tokenizer), model.config.vocab_size))
    _save_generation_config(folder, config, token_ids, no_tokens)
    grammar = fit_grammar(grammar_of(config), tokenizer)
    if config.model.lora_rank and dtype == "bfloat16":
        print(ROUNDED, file=sys.stderr)
    told_date = f"{CLOCK:%d %B %Y}" if reads_clock(tokenizer) else ""
    readme = card(config, grammar, saved.step, dtype, measured, told_date)
    (folder / "README.md").write_text(readme)
    write_asked_as(folder, config)
    save_model(merge(model), folder, getattr(torch, dtype), extra=token_ids)
    return folder


def _require_only_adapters(run: Path, config: Config, model: Decoder) -> None:
    """Raises UserError where a run trained something beside its adapters, or has none."""
    if not config.model.lora_rank:
        raise UserError(f"{run} has no adapters: leave adapters=true out")
    trainable = trainable_pattern(config.model)
    for name, _ in model.named_parameters():
        if re.search(trainable, name) and not is_adapter(name):
            raise UserError(f"{run} trained {name} too: leave adapters=true out")


def _special_token_ids(tokenizer: Any, source: Path) -> dict[str, Any]:
    """Stop tokens and padding, under the keys of Hugging Face's configs."""
    stops = stop_ids(tokenizer, source)
    eos = list(stops) if len(stops) > 1 else stops[0]
    return {"eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}


def _save_generation_config(
    folder: Path, config: Config, token_ids: dict[str, Any], no_tokens: list[int]
) -> None:
    """How the policy was sampled. `no_tokens`: ids of a padded embedding, which nothing draws."""
    from transformers import GenerationConfig

    generation = GenerationConfig(
        do_sample=True,
        temperature=config.algo.temperature,
        top_k=config.algo.top_k,
        top_p=config.algo.top_p,
        min_p=config.algo.min_p or None,
        suppress_tokens=no_tokens or None,
        **token_ids,
    )
    generation.save_pretrained(folder)


def run(words: Words[ExportOptions]) -> None:
    folder = require_run(Path(words.places[0]))
    options = words.options
    print(export(folder, options.out or folder / "export", options.dtype, options.adapters))


COMMAND = Command(
    name="mar.export",
    about=__doc__,
    places="RUN",
    options=ExportOptions,
    examples=(
        "runs/medqa/seed0                          # into runs/medqa/seed0/export",
        "runs/medqa/seed0 out=model dtype=float32",
        "runs/medqa/seed0 adapters=true            # the adapters alone, in peft's format",
    ),
)


def main(words: Sequence[str]) -> int:
    return run_command(COMMAND, words, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

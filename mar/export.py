"""A run's policy as a checkpoint that others load:  python -m mar.export runs/clinic/seed0 [folder] [--dtype bfloat16]

Writes safetensors, tokenizer, chat template, generation config and a model card with the prompt that the policy was trained on; transformers and
vLLM read the folder.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from mar.answers.grammar import Grammar, grammar_of
from mar.answers.prompts import fit_grammar, instructions, load_tokenizer
from mar.config import Config
from mar.errors import UserError, exit_code
from mar.policy.lora import merge, save_adapters
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model, save_model
from mar.run import checkpoint
from mar.run.compose import load_config
from mar.run.setup import STOP_TOKENS, adapted
from mar.tasks.registry import get_task

CARD = """---
library_name: transformers
tags: [multi-answer, reinforcement-learning]
---
# {model}, {task}

{model} after {step} of {steps} steps of `mar` on {task} ({objective}, K={K}, credit {credit}); parameters in {dtype}.

It was asked in these words, after the question, and sampled at temperature {temperature}:

```
{instructions}
```
{results}"""


def card(config: Config, grammar: Grammar, step: int, dtype: str, measured: dict[str, Any]) -> str:
    """README.md of the exported folder."""
    task, after = config.data.task, measured.get("after") or {}
    rows = "".join(
        f"| {name} | {value:.3f} |\n" for name, value in after.items() if isinstance(value, float)
    )
    return CARD.format(
        model=config.model.path or config.model.name,
        step=step,
        steps=config.train.steps,
        task=task,
        objective=config.reward.objective,
        K=grammar.num_answers,
        credit=config.algo.credit,
        dtype=dtype,
        temperature=config.algo.temperature,
        instructions=instructions(grammar, get_task(task).noun),
        results=f"\nOn {measured['num_items']} held-out items:\n\n| metric | |\n|---|---|\n{rows}"
        if rows
        else "",
    )


def export(run: Path, folder: Path, dtype: str, adapters: bool = False) -> Path:
    """Write `folder`: a checkpoint, adapters merged, or in peft's format the `adapters` alone. Raises UserError for a run without a checkpoint, for
    a folder that holds something, and where adapters alone are not what was trained."""
    from transformers import GenerationConfig

    config = load_config(run / "config.yaml")
    found = checkpoint.newest(run / "checkpoints")
    if found is None:
        raise UserError(
            f"{run} has no readable checkpoint: let the run reach checkpoint.every={config.checkpoint.every}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no empty folder: name another or remove it")
    source, _ = resolve_model(config.model.source, config.model.name, config.model.path)
    model = adapted(load_model(source), config.model)
    tokenizer = load_tokenizer(source)
    trainable = config.model.trainable or "lora_"
    others = [
        n for n, _ in model.named_parameters() if re.search(trainable, n) and ".lora_" not in n
    ]
    if adapters and (others or not config.model.lora_rank):
        what = f"trained {others[0]} too" if config.model.lora_rank else "has no adapters"
        raise UserError(f"{run} {what}: export without --adapters")
    checkpoint.restore_weights(found, model)
    if adapters:
        save_adapters(model, folder, config.model.path or config.model.name)
        return folder
    grammar = grammar_of(config)
    tokenizer.save_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    stops = sorted(
        {tokenizer.eos_token_id, *(vocabulary[t] for t in STOP_TOKENS if t in vocabulary)}
    )
    ends = {
        "eos_token_id": stops if len(stops) > 1 else stops[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    GenerationConfig(
        do_sample=True, temperature=config.algo.temperature, top_k=0, top_p=1.0, **ends
    ).save_pretrained(folder)
    measured = json.loads((run / "eval.json").read_text()) if (run / "eval.json").exists() else {}
    (folder / "README.md").write_text(
        card(config, fit_grammar(grammar, tokenizer), found.step, dtype, measured)
    )
    save_model(merge(model), folder, getattr(torch, dtype), extra=ends)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("folder", type=Path, nargs="?", help="where to write (default: RUN/export)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--adapters", action="store_true", help="the adapters alone, in peft's format"
    )
    args = parser.parse_args()
    return exit_code(
        lambda: print(
            export(args.run, args.folder or args.run / "export", args.dtype, args.adapters)
        )
    )


if __name__ == "__main__":
    sys.exit(main())

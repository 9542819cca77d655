"""Look at a task before training on it:  python -m mar.tasks ddxplus data.source=path data.path=<file> [model=smollm2-135m]

Prints the rows of each split, kept and dropped; gold-set sizes; prompt lengths in tokens; and three prompts as the model
reads them. Words are those of the training command.
"""

import sys
from collections import Counter

import numpy as np

from mar.answers.grammar import grammar_of
from mar.answers.prompts import build_prompt, fit_grammar, load_tokenizer
from mar.errors import UserError, exit_code
from mar.policy.sources import resolve_model
from mar.records import Prompt
from mar.run.compose import CONF_DIR, compose
from mar.run.console import Display
from mar.run.setup import load_data
from mar.tasks.registry import get_task


def main(words: list[str]) -> None:
    if not words:
        raise UserError("name a task: python -m mar.tasks medqa data.source=path data.path=<file>")
    name, noun, display = words[0], get_task(words[0]).noun, Display("plain", 0, 0)
    known = (CONF_DIR / "experiment" / f"{name}.yaml").exists()
    config = compose(
        [
            f"+experiment={name if known else 'jsonl'}",
            f"data.task={name}",
            "model=smollm2-135m",
            *words[1:],
        ]
    )
    folder, _ = resolve_model(config.model.source, config.model.name, config.model.path)
    tokenizer = load_tokenizer(folder)
    grammar = fit_grammar(grammar_of(config), tokenizer)
    prompts: list[Prompt] = []
    for split in (
        ("train", "validation", "test")
        if config.data.source == "path"
        else (config.data.train_split, config.data.eval_split)
    ):
        examples = load_data(config, split, config.data.num_train, config.seed, display)
        prompts = prompts or [
            build_prompt(example, grammar, tokenizer, noun) for example in examples
        ]
        golds = np.array([len(example.golds) for example in examples])
        strata = Counter(example.stratum for example in examples if example.stratum)
        display.say(
            f"{split}: {len(examples)} rows, golds {golds.mean():.2f} ({golds.min()} to {golds.max()}) {dict(strata) or ''}"
        )
    lengths = np.array([len(prompt.ids) for prompt in prompts])
    low, middle, high = np.percentile(lengths, [0, 50, 100]).astype(int)
    display.say(f"prompt tokens of train ({config.model.name}): {low} to {high}, median {middle}")
    for prompt in prompts[:3]:
        display.say(f"\n--- {prompt.id}\n{prompt.text}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))

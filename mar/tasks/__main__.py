"""Look at a task before training on it.

    python -m mar.tasks ddxplus data.source=path data.path=<file> [model=smollm2-135m]

Prints the rows of each split, kept and dropped; gold-set sizes; prompt lengths in tokens; and three
prompts as the model reads them. The words are those of the training command.
"""

import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mar.answers.grammar import grammar_of
from mar.answers.prompts import build_prompt, fit_grammar
from mar.answers.tokenizer import load_tokenizer
from mar.config import Config
from mar.errors import UserError, exit_code
from mar.records import Example, Prompt
from mar.run.compose import CONF_DIR, compose
from mar.run.console import Display
from mar.run.from_run import model_of
from mar.run.setup import load_data
from mar.tasks.registry import get_task


def main(words: Sequence[str]) -> None:
    if not words:
        raise UserError("name a task: python -m mar.tasks medqa data.source=path data.path=<file>")
    task, *overrides = words
    noun = get_task(task).noun  # refuses an unknown name before anything is composed
    has_experiment = (CONF_DIR / "experiment" / f"{task}.yaml").exists()
    experiment = task if has_experiment else "jsonl"
    config = compose(
        [f"+experiment={experiment}", f"data.task={task}", "model=smollm2-135m", *overrides]
    )
    display = Display("plain", 0, 0)
    folder, _ = model_of(config.model)
    tokenizer = load_tokenizer(folder)
    grammar = fit_grammar(grammar_of(config), tokenizer)

    prompts: list[Prompt] = []
    for split in _splits(config):
        examples = load_data(config, split, config.data.num_train, config.seed, display)
        if not prompts:
            first = config.data.request_first
            prompts = [
                build_prompt(example, grammar, tokenizer, noun, request_first=first)
                for example in examples
            ]
        display.say(f"{split}: {_summary(examples)}")

    lengths = [len(prompt.ids) for prompt in prompts]
    low, middle, high = np.percentile(lengths, [0, 50, 100]).astype(int)
    display.say(f"prompt tokens of train ({config.model.name}): {low} to {high}, median {middle}")
    for prompt in prompts[:3]:
        display.say(f"\n--- {prompt.id}\n{prompt.text}")


def _splits(config: Config) -> tuple[str, ...]:
    """A file has all three; elsewhere those that a run would read."""
    if config.data.source == "path":
        return ("train", "validation", "test")
    return (config.data.train_split, config.data.eval_split)


def _summary(examples: Sequence[Example]) -> str:
    num_golds = np.array([len(example.golds) for example in examples])
    strata = Counter(example.stratum for example in examples if example.stratum)
    return (
        f"{len(examples)} rows, golds {num_golds.mean():.2f} ({num_golds.min()} to "
        f"{num_golds.max()}) {dict(strata) or ''}"
    )


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))

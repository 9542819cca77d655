"""Look at a task before training on it.

It prints the rows of each split, kept and dropped; gold-set sizes; prompt lengths in tokens; and
three prompts as the model that would be trained reads them, with their golds. The words are those of
the training command; a task's name stands for its experiment.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mar.answers.grammar import grammar_of
from mar.answers.prompts import build_prompt, fit_grammar
from mar.answers.tokenizer import load_tokenizer
from mar.config import Config
from mar.errors import UserError
from mar.records import Example, Prompt
from mar.run.compose import compose, require_choice
from mar.run.console import Display
from mar.run.from_run import model_of
from mar.run.setup import announce, load_data, say_few_rows
from mar.run.words import Command, NoOptions, Words, choices_of, run_command
from mar.tasks.registry import get_task

# Questions of a task that draws them without end.
NUM_DRAWN = 500
# Prompts, and golds of each of them.
NUM_SHOWN = 3
MOST_GOLDS = 5


def words_of_training(words: Words[NoOptions]) -> list[str]:
    """The settings of the training command that these words look at."""
    if not words.places:
        require_choice(words.settings)
        return words.settings
    task = words.places[0]
    if task in choices_of("experiment"):
        return [f"+experiment={task}", *words.settings]
    if Path(task).is_file():
        raise UserError(f"{task} is a file and no task: did you mean jsonl data.path={task}?")
    get_task(task)  # refuses an unknown name
    return ["+experiment=jsonl", f"data.task={task}", *words.settings]


def run(words: Words[NoOptions]) -> None:
    """Print what a run with these words would read."""
    display = Display("plain", 0, 0)
    config = announce(compose(words_of_training(words)), display)
    noun = get_task(config.data.task).noun
    folder, _ = model_of(config.model)
    tokenizer = load_tokenizer(folder)
    grammar = fit_grammar(grammar_of(config), tokenizer)

    prompts: list[Prompt] = []
    trained: Sequence[Example] = ()
    for split in _splits(config):
        num = config.data.num_train
        if num is None and get_task(config.data.task).endless:
            num = NUM_DRAWN
        examples = load_data(config, split, num, config.seed, display)
        if not prompts:
            trained = examples
            first = config.data.request_first
            explain = config.model.explain_decimals
            prompts = [
                build_prompt(
                    example,
                    grammar,
                    tokenizer,
                    noun,
                    request_first=first,
                    explain_decimals=explain,
                )
                for example in examples
            ]
        display.say(f"{split}: {_summary(examples)}")
        say_few_rows(config, split, len(examples), display)

    lengths = [len(prompt.ids) for prompt in prompts]
    low, middle, high = np.percentile(lengths, [0, 50, 100]).astype(int)
    display.say(f"prompt tokens of train ({config.model.name}): {low} to {high}, median {middle}")
    for prompt, example in zip(prompts[:NUM_SHOWN], trained[:NUM_SHOWN], strict=True):
        display.say(f"\n--- {prompt.id}\n{prompt.text}\ngolds: {_golds(example)}")


def _splits(config: Config) -> tuple[str, ...]:
    """A file that is cut has all three; elsewhere those that a run would read."""
    if config.data.path is not None:
        return ("train", "validation", "test")
    return (config.data.train_split, config.data.eval_split)


def _golds(example: Example) -> str:
    """The golds as they were read, the most probable first."""
    golds = sorted(example.golds, key=lambda gold: gold.probability or 0.0, reverse=True)
    shown = []
    for gold in golds[:MOST_GOLDS]:
        text = gold.name
        if gold.probability is not None:
            text += f" {gold.probability:.2f}"
        if gold.aliases:
            text += f" (also {', '.join(gold.aliases)})"
        shown.append(text)
    if len(golds) > MOST_GOLDS:
        shown.append(f"and {len(golds) - MOST_GOLDS} more")
    return "; ".join(shown)


def _summary(examples: Sequence[Example]) -> str:
    num_golds = np.array([len(example.golds) for example in examples])
    strata = Counter(example.stratum for example in examples if example.stratum)
    return (
        f"{len(examples)} rows, golds {num_golds.mean():.2f} ({num_golds.min()} to "
        f"{num_golds.max()}) {dict(strata) or ''}"
    )


COMMAND = Command(
    name="mar.tasks",
    about=__doc__,
    places="[TASK]",
    options=NoOptions,
    settings=("data.path", "model.path", "reward.num_answers", "seed"),
    examples=(
        "medqa                                                # the rehearsal on the clinic",
        "jsonl data.path=<your file> model=smollm2-135m",
        "ddxplus data.source=path data.path=<file> model=hf model.path=<folder>",
    ),
)


def main(words: Sequence[str]) -> int:
    return run_command(COMMAND, words, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

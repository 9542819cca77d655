"""Look at a task before training on it.

It prints the rows of each split, kept and dropped; gold-set sizes; prompt lengths in tokens; and
three prompts as the model that would be trained reads them. The words are those of the training
command; a task's name stands for its experiment.
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
    for split in _splits(config):
        num = config.data.num_train
        if num is None and get_task(config.data.task).endless:
            num = NUM_DRAWN
        examples = load_data(config, split, num, config.seed, display)
        if not prompts:
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
    for prompt in prompts[:3]:
        display.say(f"\n--- {prompt.id}\n{prompt.text}")


def _splits(config: Config) -> tuple[str, ...]:
    """A file that is cut has all three; elsewhere those that a run would read."""
    if config.data.path is not None:
        return ("train", "validation", "test")
    return (config.data.train_split, config.data.eval_split)


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

"""Measure a policy, or texts from anywhere, with every metric and its interval.

What is measured: a run (its newest checkpoint, and baselines of its untrained model), a folder with
config.json, `base` (the model that the settings name, untrained), or completions=<file>.

It writes `eval_items.jsonl`, one line per arm and item, and `evaluation.json`. The same command
goes on where it was interrupted; draws depend on seed and item alone.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mar.answers.grammar import grammar_of
from mar.answers.prompts import fit_grammar
from mar.answers.tokenizer import load_tokenizer
from mar.config import number, option
from mar.errors import UserError
from mar.files import write_json
from mar.measure.answer_sets import Item
from mar.measure.baselines import Arm, build_arms
from mar.measure.comparison import compare_arms
from mar.run.answering import (
    answer_questions,
    compare_with,
    find_target,
    prepare_questions,
    read_given_texts,
)
from mar.run.compose import require_choice
from mar.run.console import Display
from mar.run.summary import show_evaluation
from mar.run.words import Command, Words, read_words, run_command

MAX_SET_SIZE = 10


@dataclass
class EvaluateOptions:
    """Words of this command alone."""

    k: int = number(30, low=1, high=9999, help="answers of a question, in sets of K")
    num_answers: str = option("1..6", help="sets of other sizes, too; empty for none")
    arms: str = option("", help="such as policy,base: these alone, not all that apply")
    completions: Path | None = option(None, help="texts from anywhere: jsonl rows of {id, text}")
    against: Path | None = option(None, help="another evaluation's folder, compared in pairs")
    out: Path | None = option(None, help="folder of the results; the run's, or runs/evaluation/...")


def parse_sizes(text: str) -> list[int]:
    """`1..6` or `2,4` as numbers from 1 to 10; empty for none."""
    if not re.fullmatch(r"(\d+\.\.\d+|\d+(,\d+)*)?", text):
        raise UserError(f"num_answers={text} is no list of sizes: write 1..6 or 2,4")
    if ".." in text:
        first, last = text.split("..")
        sizes = list(range(int(first), int(last) + 1))
    else:
        sizes = [int(size) for size in text.split(",") if size]
    if not all(1 <= size <= MAX_SET_SIZE for size in sizes):
        raise UserError(f"num_answers={text}: a set has 1 to {MAX_SET_SIZE} answers")
    return sizes


def choose_arms(arms: Sequence[Arm], chosen: str) -> list[Arm]:
    """The policy, and the arms that `chosen` names; all of them where it is empty."""
    known = [arm.name for arm in arms]
    names = chosen.split(",") if chosen else known
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(f"arms={','.join(unknown)} is unknown here: choose of {','.join(known)}")
    return [arm for arm in arms if arm.name in {"policy", *names}]


def run(words: Sequence[str], display: Display) -> Path:
    """Measure what a command line names; returns the folder with the results."""
    return evaluate(read_words(COMMAND, words), display)


def evaluate(words: Words[EvaluateOptions], display: Display) -> Path:
    """Measure what the words name; returns the folder with the results."""
    options = words.options
    given = options.completions
    if len(words.places) + bool(given) != 1:
        raise UserError(
            "name one thing to measure: a run, a checkpoint folder, base or completions=<file>, "
            f"not {words.places or 'nothing'}"
        )
    name = words.places[0] if words.places else ""
    if not name or name == "base":
        require_choice(words.settings)
    target = find_target(name, words.settings, options.out, given, display)
    k = options.k
    config = target.config

    tokenizer = load_tokenizer(target.model_folder)
    grammar = fit_grammar(grammar_of(config), tokenizer)
    sizes = parse_sizes(options.num_answers)
    arms = build_arms(grammar, k, sizes, trained=target.run is not None)
    arms = choose_arms(arms, options.arms)
    if given:
        arms = arms[:1]
    questions = prepare_questions(config, arms, tokenizer, display)

    items: dict[str, list[Item]]
    if given:
        arm, read = read_given_texts(target, given, arms[0], questions, display)
        arms = [arm]
        items = {arm.name: read}
    else:
        items = answer_questions(target, arms, questions, display)

    document: dict[str, Any] = {
        "task": config.data.task,
        "target": target.name,
        "step": target.step,
        **compare_arms(arms, items, questions.examples, k),
    }
    if options.against:
        pair = f"policy - {options.against}"
        document["paired"][pair] = compare_with(options.against, items["policy"], grammar.confident)
    write_json(target.out / "evaluation.json", document)
    show_evaluation(document, display)
    display.say(f"wrote {target.out / 'evaluation.json'} and eval_items.jsonl")
    return target.out


COMMAND = Command(
    name="mar.evaluate",
    about=__doc__,
    places="[RUN|FOLDER|base]",
    options=EvaluateOptions,
    settings=("eval.num_items", "data.eval_split", "data.path", "seed", "device"),
    examples=(
        "runs/medqa/seed0 eval.num_items=500",
        "runs/medqa/seed1 against=runs/medqa/seed0",
        "completions=texts.jsonl +experiment=clinic",
    ),
)


def main(words: Sequence[str]) -> int:
    display = Display("plain", 0, 0)
    return run_command(
        COMMAND,
        words,
        lambda read: evaluate(read, display),
        "interrupted: the same command goes on",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Measure a policy, or texts from anywhere, with every metric and its interval:

    python -m mar.evaluate runs/medqa/seed0
        the newest checkpoint of a run, and baselines of its untrained model
    python -m mar.evaluate <folder with config.json> +experiment=clinic
        a Hugging Face checkpoint
    python -m mar.evaluate base +experiment=clinic
        the model that the config names, untrained
    python -m mar.evaluate completions=file.jsonl +experiment=clinic
        rows of {id, text}; several rows of one id are several samples

Options:
    k=30               answers per question, in sets of K
    num_answers=1..6   sets of other sizes; empty for none
    arms=policy,base   which arms, of those that are compared by default
    out=<folder>       where the results go
    against=<folder>   a paired comparison with another evaluation
All other words are settings, e.g. eval.num_items=500.

It writes `eval_items.jsonl`, one line per arm and item, and `evaluation.json`. The same command
goes on where it was interrupted; draws depend on seed and item alone.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mar.answers.grammar import grammar_of
from mar.answers.prompts import fit_grammar
from mar.answers.tokenizer import load_tokenizer
from mar.errors import UserError, exit_code
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
from mar.run.console import Display
from mar.run.summary import show_evaluation

# Option -> its default.
OPTIONS = {
    "k": "30",
    "num_answers": "1..6",
    "arms": "",
    "completions": "",
    "against": "",
    "out": "",
}

MAX_SET_SIZE = 10


def split_words(words: Sequence[str]) -> tuple[str, dict[str, str], list[str]]:
    """(target, options, settings) of a command line."""
    targets: list[str] = []
    given: dict[str, str] = {}
    settings: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        # A folder of a sweep has = in its name.
        if not equals or Path(word).exists():
            targets.append(word)
        elif key in OPTIONS:
            given[key] = value
        else:
            settings.append(word)
    if len(targets) + bool(given.get("completions")) != 1:
        raise UserError(
            "name one thing to measure: a run, a checkpoint folder, base or completions=<file>, "
            f"not {targets or 'nothing'}"
        )
    target = targets[0] if targets else ""
    return target, {**OPTIONS, **given}, settings


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
    """Measure what the words name; returns the folder with the results."""
    name, options, settings = split_words(words)
    target = find_target(name, settings, options["out"], options["completions"], display)
    if not re.fullmatch(r"[1-9]\d{0,3}", options["k"]):
        raise UserError(f"k={options['k']} is no whole number from 1 to 9999")
    k = int(options["k"])
    config = target.config

    tokenizer = load_tokenizer(target.model_folder)
    grammar = fit_grammar(grammar_of(config), tokenizer)
    sizes = parse_sizes(options["num_answers"])
    arms = build_arms(grammar, k, sizes, trained=target.run is not None)
    arms = choose_arms(arms, options["arms"])
    if options["completions"]:
        arms = arms[:1]
    questions = prepare_questions(config, arms, tokenizer, display)

    items: dict[str, list[Item]]
    if options["completions"]:
        file = Path(options["completions"])
        arm, read = read_given_texts(target, file, arms[0], questions, display)
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
    if options["against"]:
        other = Path(options["against"])
        pair = f"policy - {options['against']}"
        document["paired"][pair] = compare_with(other, items["policy"], grammar.confident)
    write_json(target.out / "evaluation.json", document)
    show_evaluation(document, display)
    display.say(f"wrote {target.out / 'evaluation.json'} and eval_items.jsonl")
    return target.out


def main(words: Sequence[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    return exit_code(
        lambda: run(words, Display("plain", 0, 0)), "interrupted: the same command goes on"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Measure a policy, or texts from anywhere, with every metric and its interval.

What is measured: a run (its newest checkpoint, and baselines of its untrained model), a folder with
config.json, `base` (the model that the settings name, untrained), or completions=<file>.

It writes `eval_items.jsonl`, one line per arm and item, and `evaluation.json`. The same command
goes on where it was interrupted; draws depend on seed and item alone. An evaluation with other
settings that is there already moves to `evaluation~1` in the folder, and comes back when it is
asked for again. In a pipe the last line of stdout is one JSON document.
"""

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mar.answers.grammar import grammar_of
from mar.answers.prompts import fit_grammar
from mar.answers.tokenizer import load_tokenizer
from mar.config import number, option
from mar.errors import UserError
from mar.files import stable_hash, write_json
from mar.measure.answer_sets import Item
from mar.measure.baselines import Arm, build_arms
from mar.measure.comparison import compare_arms, paired_differences, write_confidences
from mar.policy.distributed import compute_device
from mar.run.answering import (
    answer_questions,
    find_target,
    prepare_models,
    prepare_questions,
    protocol_of,
    read_given_texts,
    read_other,
    require_another,
    require_common,
    write_given_texts,
)
from mar.run.compose import require_choice
from mar.run.console import Display, hint_where_busy
from mar.run.evaluation_folder import (
    ITEMS_FILE,
    RESULT_FILE,
    claimed,
    earlier_pairs,
    require_writable,
)
from mar.run.summary import (
    evaluation_summary,
    say_last_line,
    say_next_commands,
    show_evaluation,
)
from mar.run.words import Command, Words, read_words, run_command

MAX_SET_SIZE = 10


@dataclass
class EvaluateOptions:
    """Words of this command alone."""

    k: int = number(
        30, low=1, high=9999, help="answers of a question, in sets of K: the largest multiple of K"
    )
    num_answers: str = option(
        "1..6", help="the policy asked for sets of other sizes, too; empty for none"
    )
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
    if text and not sizes:
        raise UserError(f"num_answers={text} is empty: write the smaller number first")
    if not all(1 <= size <= MAX_SET_SIZE for size in sizes):
        raise UserError(f"num_answers={text}: a set has 1 to {MAX_SET_SIZE} answers")
    return sizes


def whole_sets(k: int, set_size: int, say: Callable[[str], object]) -> int:
    """The largest multiple of a set's size up to k: all arms are compared at as many answers."""
    if k < set_size:
        raise UserError(
            f"k={k} is less than one set of this policy: take k={set_size}, or a multiple of it"
        )
    rounded = k - k % set_size
    if rounded != k:
        say(
            f"k={k} is no multiple of the {set_size} answers of a set: "
            f"{rounded} answers for each question are compared"
        )
    return rounded


def choose_arms(arms: Sequence[Arm], chosen: str, sizes_asked: bool = False) -> list[Arm]:
    """The policy, and the arms that `chosen` names; all of them where it is empty. `sizes_asked`:
    sets of other sizes were asked for, and need not be named again."""
    known = [arm.name for arm in arms]
    names = [name.strip() for name in chosen.split(",") if name.strip()] or known
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(f"arms={','.join(unknown)} is unknown here: choose of {','.join(known)}")
    kept = {"policy", *names}
    if sizes_asked:
        kept |= {name for name in known if name.startswith("K=")}
    return [arm for arm in arms if arm.name in kept]


def require_a_model(words: Words[EvaluateOptions]) -> None:
    """Raises UserError for options that ask a model something, where texts are measured."""
    for key in ("arms", "num_answers"):
        value = getattr(words.options, key)
        if key in words.given and value not in ("", "policy"):
            raise UserError(
                f"{key}={value} asks a model and completions= has its texts: leave it out"
            )


def require_sizes_fit(words: Words[EvaluateOptions], several: bool) -> None:
    """Raises UserError for sizes that a policy of single answers is asked for."""
    sizes = words.options.num_answers
    if "num_answers" in words.given and sizes and not several:
        raise UserError(
            f"num_answers={sizes} asks for sets and this policy gives one answer: leave it out"
        )


def run(words: Sequence[str], display: Display) -> Path:
    """Measure what a command line names; returns the folder with the results."""
    return evaluate(read_words(COMMAND, words), display)


def evaluate(words: Words[EvaluateOptions], display: Display) -> Path:
    """Measure what the words name; returns the folder with the results.

    All that can be refused is refused before anything is measured, or written.
    """
    began = time.perf_counter()
    options = words.options
    texts = options.completions
    if len(words.places) + bool(texts) != 1:
        both = f"{words.places[0]} and completions={texts} are two: " if words.places else ""
        raise UserError(
            f"{both}name one thing to measure, a run, a checkpoint folder, base or "
            "completions=<file>"
        )
    name = words.places[0] if words.places else ""
    if not name or name == "base" or (Path(name) / "config.json").is_file():
        require_choice(words.settings)
    k = options.k
    sizes = parse_sizes(options.num_answers)
    target = find_target(name, words.settings, options.out, texts, display)
    config = target.config
    require_writable(target.out)
    other = options.against
    others = read_other(other, target.out) if other else []
    device = compute_device(config.device)
    hint_where_busy(display, device.type, config.model.threads)

    tokenizer = load_tokenizer(target.model_folder)
    grammar = fit_grammar(grammar_of(config), tokenizer)
    if texts:
        require_a_model(words)
    else:
        require_sizes_fit(words, grammar.multi)
        k = whole_sets(k, grammar.num_answers, display.say)
    arms = build_arms(grammar, k, sizes, trained=target.run is not None)
    arms = choose_arms(arms, options.arms, "num_answers" in words.given)
    if texts:
        arms = arms[:1]
    questions = prepare_questions(config, arms, tokenizer, display)

    items: dict[str, list[Item]]
    if texts:
        arm, read = read_given_texts(target, texts, arms[0], questions, display)
        arms = [arm]
        items = {arm.name: read}
        answered = [item.id for item in read]
        digest = f"{stable_hash(texts.read_text(errors='replace')):016x}"
        protocol = protocol_of(target, arms, questions.examples, len(read), digest)
    else:
        answered = [example.id for example in questions.examples]
        models = prepare_models(target, arms, questions)
        protocol = protocol_of(target, arms, questions.examples, len(questions.examples))
    if other:
        require_common(other, others, answered)
        require_another(other, target.out, protocol)

    with claimed(target.out, protocol, display.say):
        if texts:
            write_given_texts(target.out, protocol, arms[0], items["policy"])
        else:
            items = answer_questions(target, arms, questions, models, protocol, display)
        document: dict[str, Any] = {
            "task": config.data.task,
            "target": target.name,
            "step": target.step,
            **compare_arms(arms, items, questions.examples, k),
        }
        if other:
            confident = grammar.confident and write_confidences(others)
            differences = paired_differences(items["policy"], others, confident)
            document["paired"][f"policy - {other}"] = differences
        document["paired"] = earlier_pairs(target.out) | document["paired"]
        write_json(target.out / RESULT_FILE, document)
    show_evaluation(document, display)
    if target.run is not None:
        say_next_commands(Path(target.name), display)
    display.say(f"  {target.out / ITEMS_FILE}")
    seconds = time.perf_counter() - began
    numbers = {"out": str(target.out), "job_s": round(seconds, 1), **evaluation_summary(document)}
    say_last_line(numbers, target.out / RESULT_FILE, display)
    return target.out


COMMAND = Command(
    name="mar.evaluate",
    about=__doc__,
    places="[RUN|FOLDER|base]",
    options=EvaluateOptions,
    unread=("train.", "optim.", "checkpoint."),
    settings=("eval.num_items", "data.eval_split", "data.path", "seed", "device"),
    examples=(
        "runs/medqa/seed0 eval.num_items=500",
        "runs/medqa/seed1 against=runs/medqa/seed0",
        "completions=texts.jsonl +experiment=clinic",
    ),
)


def main(words: Sequence[str]) -> int:
    display = Display("auto", 0, 0)
    return run_command(
        COMMAND,
        words,
        lambda read: evaluate(read, display),
        "interrupted: the same command goes on",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

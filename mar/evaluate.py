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
    k=30               answers per question, in sets of K: at most so many, as a multiple of K
    num_answers=1..6   the policy asked for sets of other sizes, too; empty for none
    arms=policy,base   which arms, of those that are compared by default; sizes that num_answers=
                       gives are measured beside them
    out=<folder>       where the results go
    against=<folder>   a paired comparison with another evaluation
All other words are settings, e.g. eval.num_items=500.

It writes `eval_items.jsonl`, one line per arm and item, and `evaluation.json`. The same command
goes on where it was interrupted; draws depend on seed and item alone. An evaluation with other
settings that is there already moves to `evaluation~1` in the folder.
"""

import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mar.answers.grammar import grammar_of
from mar.answers.prompts import fit_grammar
from mar.answers.tokenizer import load_tokenizer
from mar.errors import UserError, exit_code
from mar.files import stable_hash, write_json
from mar.measure.answer_sets import Item
from mar.measure.baselines import Arm, build_arms
from mar.measure.comparison import compare_arms, paired_differences
from mar.policy.distributed import compute_device
from mar.run.answering import (
    answer_questions,
    find_target,
    prepare_models,
    prepare_questions,
    protocol_of,
    read_given_texts,
    read_other,
    require_common,
    write_given_texts,
)
from mar.run.console import Display
from mar.run.evaluation_folder import (
    ITEMS_FILE,
    RESULT_FILE,
    claimed,
    earlier_pairs,
    require_writable,
)
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
    if text and not sizes:
        raise UserError(f"num_answers={text} is empty: write the smaller number first")
    if not all(1 <= size <= MAX_SET_SIZE for size in sizes):
        raise UserError(f"num_answers={text}: a set has 1 to {MAX_SET_SIZE} answers")
    return sizes


def parse_k(text: str) -> int:
    """A number of answers for each question."""
    if not re.fullmatch(r"[1-9]\d{0,3}", text):
        raise UserError(f"k={text} is no whole number from 1 to 9999")
    return int(text)


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
    names = chosen.split(",") if chosen else known
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(f"arms={','.join(unknown)} is unknown here: choose of {','.join(known)}")
    kept = {"policy", *names}
    if sizes_asked:
        kept |= {name for name in known if name.startswith("K=")}
    return [arm for arm in arms if arm.name in kept]


def require_a_model(options: Mapping[str, str], given: Collection[str]) -> None:
    """Raises UserError for options that ask a model something, where texts are measured."""
    for key in ("arms", "num_answers"):
        if key in given and options[key] not in ("", "policy"):
            raise UserError(
                f"{key}={options[key]} asks a model and completions= has its texts: leave it out"
            )


def require_sizes_fit(options: Mapping[str, str], given: Collection[str], several: bool) -> None:
    """Raises UserError for sizes that a policy of single answers is asked for."""
    sizes = options["num_answers"]
    if "num_answers" in given and sizes and not several:
        raise UserError(
            f"num_answers={sizes} asks for sets and this policy gives one answer: leave it out"
        )


def run(words: Sequence[str], display: Display) -> Path:
    """Measure what the words name; returns the folder with the results.

    All that can be refused is refused before anything is measured, or written.
    """
    name, options, settings = split_words(words)
    given = {word.partition("=")[0] for word in words}
    texts = options["completions"]
    k = parse_k(options["k"])
    sizes = parse_sizes(options["num_answers"])
    target = find_target(name, settings, options["out"], texts, display)
    config = target.config
    require_writable(target.out)
    other = Path(options["against"])
    others = read_other(other, target.out) if options["against"] else []
    compute_device(config.device)

    tokenizer = load_tokenizer(target.model_folder)
    grammar = fit_grammar(grammar_of(config), tokenizer)
    if texts:
        require_a_model(options, given)
    else:
        require_sizes_fit(options, given, grammar.multi)
        k = whole_sets(k, grammar.num_answers, display.say)
    arms = build_arms(grammar, k, sizes, trained=target.run is not None)
    arms = choose_arms(arms, options["arms"], "num_answers" in given)
    if texts:
        arms = arms[:1]
    questions = prepare_questions(config, arms, tokenizer, display)
    if others:
        require_common(other, others, [example.id for example in questions.examples])

    items: dict[str, list[Item]]
    if texts:
        arm, read = read_given_texts(target, Path(texts), arms[0], questions, display)
        arms = [arm]
        items = {arm.name: read}
        digest = f"{stable_hash(Path(texts).read_text(errors='replace')):016x}"
        protocol = protocol_of(target, arms, len(read), digest)
    else:
        models = prepare_models(target, arms, questions)
        protocol = protocol_of(target, arms, len(questions.examples))

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
        if others:
            differences = paired_differences(items["policy"], others, grammar.confident)
            document["paired"][f"policy - {options['against']}"] = differences
        document["paired"] = earlier_pairs(target.out) | document["paired"]
        write_json(target.out / RESULT_FILE, document)
    show_evaluation(document, display)
    display.say(f"wrote {target.out / RESULT_FILE} and {ITEMS_FILE}")
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

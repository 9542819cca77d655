"""Does a trained policy know which of its answers are right, where its confidences do not say so?

    python -m experiments.real_model.known multi_rlcr_own 0 data.path=<folder of DDXPlus> [out=<folder>]

The row of that method and seed has to be there (row.py, the same out=). Its sets for the first
QUESTIONS test questions are rated anew: each answer with the probability that a model gives to it
when asked for one answer. The model is the policy itself, or the warm-up that it began from. What
such ratings are worth is compared with the confidences that were written, and with the exact
probabilities, which are the best that there is. Logs: logs/known/.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from experiments.claims.confidences import rated
from experiments.common.commands import write_log
from experiments.common.tables import Log, markdown_table, read_logs_by
from experiments.real_model.row import LOGS as ROW_LOGS
from experiments.real_model.row import METHODS, Rows, out_and_words
from experiments.real_model.summary import shown
from mar.answers.tokenizer import load_tokenizer, num_tokens
from mar.errors import exit_code
from mar.learn.warm_up import answer_masses
from mar.measure.answer_sets import AnswerSet, Item
from mar.measure.bootstrap import paired_difference, resample_weights, with_interval
from mar.measure.metrics import AnswerArrays, compute_metrics
from mar.policy.lora import adapted
from mar.policy.model import Decoder
from mar.policy.sources import environment
from mar.policy.weights import load_model
from mar.records import Example
from mar.run import checkpoint
from mar.run.answering import Target, find_target, read_other
from mar.run.console import Display
from mar.run.setup import load_data
from mar.run.warm_up import asking_of
from mar.verify.normaliser import normalise

LOGS = ROW_LOGS.parent / "known"
QUESTIONS = 200
WRITTEN = "as written"
NAMES = "as written, but 0 for a repeat and for no condition"
POLICY = "the policy's single answer"
WARM_UP = "the warm-up's single answer"
EXACT = "exact probability"
Confidences = tuple[float | None, ...]
# The methods that write confidences.
CONFIDENT = [name for name in METHODS if "rlcr" in name]
METRICS = ("auroc", "ece", "brier", "q_mse")


def load(target: Target, trained: bool) -> Decoder:
    """The run's policy, or with `trained` False what its training began from.

    Both have adapters, so that the weights below are bfloat16 as in training.
    """
    ids = num_tokens(load_tokenizer(target.model_folder))
    model = adapted(load_model(target.model_folder, num_tokens=ids), target.config.model)
    if trained and target.run:
        checkpoint.restore_weights(target.run, model)
    return model


def beliefs_of(
    model: Decoder, target: Target, examples: Sequence[Example]
) -> list[dict[str, float]]:
    """Of each question: condition -> the probability that a single answer is it."""
    asking = asking_of(target.config, load_tokenizer(target.model_folder))
    masses = answer_masses(model, examples, asking)
    return [
        {gold.name: float(row[place]) for place, gold in enumerate(example.golds)}
        for example, row in zip(examples, masses, strict=True)
    ]


def rated_by_name(items: Sequence[Item], conditions: Iterable[str]) -> list[Item]:
    """The confidences as written, but 0 for a repeat and for what names no condition.

    The ratings by a model have a 0 there, too (`rated`): this shows what that alone is worth.
    """
    keys = {normalise(name) for name in conditions}

    def rate(one: AnswerSet) -> Confidences:
        said = zip(one.confidences, one.keys, one.repeated, strict=True)
        return tuple(q if key in keys and not again else 0.0 for q, key, again in said)

    return [_with_confidences(item, rate) for item in items]


def rated_exactly(items: Sequence[Item]) -> list[Item]:
    """The items with each confidence replaced by the probability of its answer; 0 for a repeat."""
    return [_with_confidences(item, lambda one: one.mass) for item in items]


def _with_confidences(item: Item, rate: Callable[[AnswerSet], Confidences]) -> Item:
    sets = [one if one.reason else replace(one, confidences=rate(one)) for one in item.sets]
    return replace(item, sets=tuple(sets))


def mean_confidence(items: Sequence[Item]) -> float:
    """Over all answers of sets with the right form."""
    said = [one.confidences for item in items for one in item.sets if not one.reason]
    return float(np.array(said, dtype=float).mean())


def spread_in_slots(items: Sequence[Item]) -> float:
    """Standard deviation of the confidences about the mean of their slot; 0 for one number a slot."""
    said = [one.confidences for item in items for one in item.sets if not one.reason]
    return float(np.sqrt(np.array(said, dtype=float).var(axis=0).mean()))


def compared(ratings: dict[str, list[Item]]) -> dict[str, dict[str, list[float | None]]]:
    """Of each rating its metrics, and their differences to the confidences as written.

    Each is [value, low, high], the interval over questions.
    """
    weights = resample_weights(len(ratings[WRITTEN]))
    statistics = {
        name: compute_metrics(AnswerArrays(items, True)) for name, items in ratings.items()
    }
    written = statistics[WRITTEN]
    found = {}
    for name, of_rating in statistics.items():
        values = {metric: with_interval(of_rating[metric], weights) for metric in METRICS}
        if name != WRITTEN:
            for metric in METRICS:
                difference = paired_difference(of_rating[metric], written[metric], weights)
                values[f"{metric} - written"] = difference
        found[name] = values
    return found


def measure(rows: Rows, method: str, seed: int) -> None:
    """Rate the sets of one row in every way, and write its log."""
    run = rows.folder(method, seed)
    display = Display("plain", 0, 0)
    target = find_target(str(run), rows.words, None, None, display)
    torch.set_num_threads(target.config.model.threads or torch.get_num_threads())
    examples = load_data(target.config, "test", QUESTIONS, 0, display)
    said = {item.id: item for item in read_other(run, LOGS)}
    items = [said[example.id] for example in examples]
    conditions = {gold.name for example in examples for gold in example.golds}
    ratings = {WRITTEN: items, NAMES: rated_by_name(items, conditions)}
    for name, trained in ((POLICY, True), (WARM_UP, False)):
        ratings[name] = rated(items, beliefs_of(load(target, trained), target, examples))
    ratings[EXACT] = rated_exactly(items)
    log = {
        "method": method,
        "seed": seed,
        **environment(),
        "num_items": len(items),
        "ratings": compared(ratings),
        "mean_confidence": {
            name: mean_confidence(of_rating) for name, of_rating in ratings.items()
        },
        "spread": {name: spread_in_slots(of_rating) for name, of_rating in ratings.items()},
    }
    write_log(LOGS / f"{method}_seed{seed}.json", log)


def markdown() -> str:
    """A line for each row and rating."""
    lines = []
    for method, logs in read_logs_by(LOGS, "method", METHODS).items():
        for log in logs:
            lines += lines_of(method, log)
    columns = ["mean", "spread", *METRICS, "auroc - written"]
    return markdown_table(["method", "seed", "rated by", *columns], lines)


def lines_of(method: str, log: Log) -> list[list[str]]:
    """The table's lines of one log, one for each rating."""
    lines = []
    for name, values in log["ratings"].items():
        cells = [f"{log[key][name]:.3f}" for key in ("mean_confidence", "spread")]
        cells += [shown(values[metric]) for metric in METRICS]
        cells.append(shown(values.get("auroc - written")))
        lines.append([method, str(log["seed"]), name, *cells])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("method", choices=CONFIDENT)
    add("seed", type=int)
    add("words", nargs="*", metavar="WORD", help="data.path=FOLDER, and out=FOLDER of the runs")
    args = parser.parse_args()
    out, words = out_and_words(args.words)
    measure(Rows(out, words), args.method, args.seed)


if __name__ == "__main__":
    sys.exit(exit_code(main))

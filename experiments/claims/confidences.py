"""What q_mse is made of, and what the model knows.

    python -m experiments.claims.confidences runs/claims/multi_rlcr_700/seed0

takes a run of run.py and writes confidences.jsonl. Its policies:

- `as trained`: the run's, on held-out patients, ten sets each, drawn as in training or at a low
  temperature;
- `rated by ...`: the former, each answer rated with the probability that the untrained model
  gives to it when asked for one answer;
- `... most probable answers`: these, a set a patient.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.common.tables import markdown_table
from mar.answers.grammar import Grammar, render
from mar.answers.prompts import build_prompt
from mar.answers.tokenizer import load_tokenizer
from mar.errors import UserError, exit_code
from mar.files import read_jsonl, write_jsonl
from mar.measure.answer_sets import Item, item_of_rollouts, item_of_texts
from mar.measure.bounds import coverage_bounds, gap_closed
from mar.measure.metrics import AnswerArrays, compute_metrics
from mar.policy.model import Decoder
from mar.policy.packing import pack_groups
from mar.policy.sources import environment, resolve_model
from mar.policy.weights import load_model
from mar.records import Example, Prompt
from mar.run import checkpoint
from mar.run.compose import load_config
from mar.run.console import Display
from mar.run.setup import Training, build_training
from mar.sample.rollout import judge_groups, sample
from mar.tasks.registry import get_task
from mar.verify.normaliser import normalise

RESULT = Path(__file__).parent / "confidences.jsonl"
WHOLE = ("gap_closed", "coverage@3", "coverage@30", "ece", "q_mse", "tv_distance")
# Sets of each held-out patient.
SETS = 10
LOW_TEMPERATURE = 0.3
# Added to the run's seed, for other patients than its own.
FRESH = 1000


def whole(items: Sequence[Item], examples: Sequence[Example]) -> dict[str, float | None]:
    """The metrics of WHOLE; None where one set a patient does not have them."""
    found = {}
    for name, statistic in compute_metrics(AnswerArrays(items, True)).items():
        found[name] = statistic.value(statistic.columns.sum(0)).item()
    known = coverage_bounds(examples, 3)
    closed = None
    if known:
        closed = gap_closed(found["coverage@3"], known["floor"][2], known["ceiling"][2])
    return {"gap_closed": closed, **{name: found.get(name) for name in WHOLE[1:]}}


@torch.no_grad()
def written(
    training: Training,
    model: Decoder,
    prompts: Sequence[Prompt],
    num_sets: int,
    stage: str,
    step: int,
    temperature: float = 1.0,
) -> list[Item]:
    """Sets that the model writes, judged; each answer with its exact probability."""
    held_out = training.held_out
    scorer = held_out.scorer
    groups, _ = sample(
        model,
        prompts,
        num_sets,
        replace(held_out.params, temperature=temperature),
        held_out.kv_budget_tokens,
        (training.config.seed, stage, step),
        decode=scorer.decode,
    )
    items = []
    for prompt, rollouts in zip(prompts, judge_groups(prompts, groups, scorer), strict=True):
        items.append(item_of_rollouts(prompt, rollouts))
    return items


def parts(items: Sequence[Item], slots: Sequence[int]) -> dict[str, float | None]:
    """The mean of (q - p)^2 over the answers in these slots, and what it is made of.

    Over the answers that a patient got twice or more in the same slot (None if nobody did), it is
    the sum of two parts, both estimated without bias: `drawn`, the variance of q, and `expected`,
    the squared error of its mean. `constant` is the least that one confidence for all patients can
    have: the variance of p in a slot.
    """
    # (patient, slot, answer) -> (q, p) of each time that it was given.
    given: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for item in items:
        for answer_set in item.sets:
            if answer_set.reason is not None:
                continue
            for slot in slots:
                q = answer_set.confidences[slot] or 0.0
                given[item.id, slot, answer_set.keys[slot]].append((q, answer_set.mass[slot]))
    squared_errors = [(q - p) ** 2 for pairs in given.values() for q, p in pairs]

    of_slot: dict[int, list[float]] = {slot: [] for slot in slots}
    for (_, slot, _), pairs in given.items():
        of_slot[slot] += [p for _, p in pairs]

    drawn, expected = _drawn_and_expected(list(given.values()))
    return {
        "q_mse": float(np.mean(squared_errors)),
        "drawn": drawn,
        "expected": expected,
        "constant": float(np.mean([np.var(masses) for masses in of_slot.values()])),
    }


def _drawn_and_expected(
    given: Sequence[Sequence[tuple[float, float]]],
) -> tuple[float | None, float | None]:
    """The two parts of `parts`, over answers given at least twice, weighted by how often."""
    several = [np.array(pairs) for pairs in given if len(pairs) > 1]
    if not several:
        return None, None
    counts = np.array([len(pairs) for pairs in several])
    variance = np.array([pairs[:, 0].var(ddof=1) for pairs in several])
    squared_error = np.array([(pairs[:, 0] - pairs[:, 1]).mean() ** 2 for pairs in several])
    # The squared error of a mean of n draws holds variance / n of its own.
    drawn = np.average(variance, weights=counts)
    expected = np.average(squared_error - variance / counts, weights=counts)
    return float(drawn), float(expected)


def ids_of(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a completion, the stop token included."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


@torch.no_grad()
def known(training: Training, base: Decoder, tokenizer: Any) -> list[dict[str, float]]:
    """What the untrained model believes of each held-out patient.

    Condition -> the probability that the model gives to it when asked for one answer.
    """
    single = Grammar("rlvr_single", 1, thinking=False)
    noun = get_task(training.config.data.task).noun
    prompts = training.held_out.prompts
    names = sorted({gold.name for prompt in prompts for gold in prompt.example.golds})
    rows = [ids_of(render(single, [name]), tokenizer) for name in names]
    lengths = [len(row) for row in rows]
    beliefs = []
    for prompt in prompts:
        asked = build_prompt(prompt.example, single, tokenizer, noun)
        logprobs = base(pack_groups([asked.ids.tolist()], [rows]))[0]
        belief = {}
        for name, of_name in zip(names, logprobs.split(lengths), strict=True):
            belief[name] = of_name.sum().exp().item()
        beliefs.append(belief)
    return beliefs


def rated(items: Sequence[Item], beliefs: Sequence[dict[str, float]]) -> list[Item]:
    """The items with each confidence replaced by the model's probability of its answer.

    0 for a repeat, and for what is no condition.
    """
    found = []
    for item, belief in zip(items, beliefs, strict=True):
        of_key = {normalise(name): p for name, p in belief.items()}
        sets = []
        for answer_set in item.sets:
            if answer_set.reason:
                sets.append(answer_set)
                continue
            confidences = []
            for key, is_repeat in zip(answer_set.keys, answer_set.repeated, strict=True):
                confidences.append(0.0 if is_repeat else of_key.get(str(key), 0.0))
            sets.append(replace(answer_set, confidences=tuple(confidences)))
        found.append(replace(item, sets=tuple(sets)))
    return found


def most_probable(training: Training, beliefs: Sequence[dict[str, float]]) -> list[Item]:
    """One set a patient: the answers that the model finds most probable, with what it believes."""
    held_out = training.held_out
    grammar = held_out.scorer.grammar
    verifier = held_out.scorer.verifier
    assert isinstance(verifier, str)  # the clinic's, a rule for words
    items = []
    for prompt, belief in zip(held_out.prompts, beliefs, strict=True):
        ascending = sorted(belief, key=belief.__getitem__)
        names = ascending[::-1][: grammar.num_answers]
        text = render(grammar, names, [belief[name] for name in names])
        items.append(item_of_texts(prompt, [(text, 0)], grammar, verifier))
    return items


def policies(folder: Path) -> Iterator[tuple[str, list[Item], list[Example]]]:
    """Name, held-out sets and patients of each policy."""
    display = Display("plain", 0, 0)
    display.console.quiet = True
    config = load_config(folder / "config.yaml", [])
    fresh = replace(config, seed=config.seed + FRESH, train=replace(config.train, steps=1))
    base, _ = resolve_model(config.model.source, config.model.name, config.model.path)
    training = build_training(fresh, base, display)
    tokenizer = load_tokenizer(base)
    found = checkpoint.newest(folder / "checkpoints")
    grammar = training.scorer.grammar
    if found is None or not (grammar.confident and grammar.multi):
        raise UserError(
            f"{folder} has no checkpoint, or a policy without sets and confidences: "
            "take a finished run of multi_rlcr"
        )
    policy = training.learner.policy
    checkpoint.restore_weights(found, policy)
    prompts = training.held_out.prompts
    examples = [prompt.example for prompt in prompts]

    def held_out_sets(model: Decoder, temperature: float = 1.0) -> list[Item]:
        return written(training, model, prompts, SETS, "held out", 0, temperature)

    items = held_out_sets(policy)
    beliefs = known(training, load_model(base), tokenizer)
    yield "as trained", items, examples
    cool_items = held_out_sets(policy, LOW_TEMPERATURE)
    yield f"as trained, temperature {LOW_TEMPERATURE}", cool_items, examples
    yield "rated by the untrained model's answers", rated(items, beliefs), examples
    probable = most_probable(training, beliefs)
    yield "the untrained model's most probable answers", probable, examples


def shown(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def markdown(file: Path = RESULT) -> str:
    """A line for each policy of each run."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        columns = {name: row[name] for name in WHOLE if name != "coverage@3"}
        columns["first slot"] = row["slots"][0]["q_mse"]
        columns["drawn"] = row["parts"]["drawn"]
        columns["of the mean"] = row["parts"]["expected"]
        columns["one for all"] = row["parts"]["constant"]
        cells = [shown(value) for value in columns.values()]
        lines.append([row["run"], row["policy"], *cells])
    return markdown_table(["run", "policy", *columns], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    args = parser.parse_args()
    run = f"{args.run.parent.name}/{args.run.name}"
    rows = {}
    if RESULT.exists():
        for row in read_jsonl(RESULT)[0]:
            rows[row["run"], row["policy"]] = row
    for name, items, examples in policies(args.run):
        row = {
            "run": run,
            "policy": name,
            **environment(),
            **whole(items, examples),
            "parts": parts(items, (0, 1, 2)),
            "slots": [parts(items, (slot,)) for slot in range(3)],
        }
        rows[run, name] = row
        write_jsonl(RESULT, rows.values())
        print(json.dumps({key: row[key] for key in ("policy", *WHOLE, "parts")}), flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))

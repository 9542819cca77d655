"""What q_mse is made of, what the model knows, and what supervision would make of its confidences.

    python -m experiments.claims.confidences runs/claims/multi_rlcr_700_exact/seed0 [--steps 500]      # a run of run.py; writes confidences.jsonl

`as trained`: the policy on held-out patients, ten sets each, drawn as in training or at a low temperature. `rated by ...`: the former, each answer
rated with the probability that the untrained model gives to it when asked for one answer; `... most probable answers`: these, a set a patient. The
`taught` are copies of the policy that learn by supervision: sets that the policy writes for fresh patients, each confidence replaced by the exact
probability of its answer.
"""

import argparse
import copy
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.claims.summary import grid
from mar.answers.grammar import Grammar, render
from mar.answers.prompts import build_prompt, load_tokenizer
from mar.errors import UserError, exit_code
from mar.files import read_jsonl, write_jsonl
from mar.learn.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from mar.measure.answer_sets import Item, item_of_rollouts, item_of_texts
from mar.measure.bounds import coverage_bounds, gap_closed
from mar.measure.metrics import AnswerArrays, compute_metrics
from mar.policy.attention import pack_groups
from mar.policy.lora import merge
from mar.policy.model import Decoder
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
SETS, COOL = 10, 0.3  # sets per held-out patient, a low temperature
FRESH = 1000  # added to the run's seed for other patients than its own


def whole(items: Sequence[Item], examples: Sequence[Example]) -> dict[str, float | None]:
    """The metrics of WHOLE; None: one set has no coverage@30."""
    found = {
        name: statistic.value(statistic.columns.sum(0)).item()
        for name, statistic in compute_metrics(AnswerArrays(items, True)).items()
    }
    known = coverage_bounds(examples, 3)
    closed = (
        gap_closed(found["coverage@3"], known["floor"][2], known["ceiling"][2]) if known else None
    )
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
    p = training.held_out
    params = replace(p.params, temperature=temperature)
    groups, _ = sample(
        model,
        prompts,
        num_sets,
        params,
        p.kv_budget_tokens,
        (training.config.seed, stage, step),
        decode=p.scorer.decode,
    )
    judged = judge_groups(prompts, groups, p.scorer)
    return [
        item_of_rollouts(prompt, group, p.scorer.verifier)
        for prompt, group in zip(prompts, judged, strict=True)
    ]


def parts(items: Sequence[Item], slots: Sequence[int]) -> dict[str, float | None]:
    """The mean of (q - p)^2 over answers in these slots, and its two parts over those that a patient got twice or more (None: nobody did), both
    unbiased: `drawn`, the variance of what is said of one answer in the same slot, and `expected`, the squared error of its mean. `constant`: the
    least that one confidence for all patients can have, the variance of p in a slot."""
    of_one: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for item in items:
        for s in (s for s in item.sets if s.reason is None):
            for slot in slots:
                of_one[item.id, slot, s.keys[slot]].append(
                    (s.confidences[slot] or 0.0, s.mass[slot])
                )
    several = [np.array(values) for values in of_one.values() if len(values) > 1]
    counts = np.array([len(v) for v in several])
    drawn = np.array([v[:, 0].var(ddof=1) for v in several])
    error = np.array([(v[:, 0] - v[:, 1]).mean() ** 2 for v in several])
    mass = {
        slot: [p for (_, at, _), values in of_one.items() if at == slot for _, p in values]
        for slot in slots
    }
    return {
        "q_mse": float(np.mean([(q - p) ** 2 for values in of_one.values() for q, p in values])),
        "drawn": float(np.average(drawn, weights=counts)) if several else None,
        "expected": float(np.average(error - drawn / counts, weights=counts)) if several else None,
        "constant": float(np.mean([np.var(values) for values in mass.values()])),
    }


def teach(
    training: Training, student: Decoder, trainable: str, peak: float, steps: int, tokenizer: Any
) -> None:
    """Cross-entropy to sets of the run's policy with exact confidences; as many patients and sets a step as the run had. Answers are taught
    along: left alone they would drift."""
    optimizer = make_optimizer(student, peak, (0.9, 0.95), 1e-8, 0.0, trainable)
    grammar, stop = training.scorer.grammar, tokenizer.eos_token_id
    for step in range(steps):
        prompts = training.prompts.of_step(step)
        items = written(
            training,
            training.learner.policy,
            prompts,
            training.config.algo.group_size,
            "taught",
            step,
        )
        texts = [
            [render(grammar, [*map(str, s.answers)], s.mass) for s in item.sets if s.reason is None]
            for item in items
        ]
        rows = [
            [[*tokenizer(text, add_special_tokens=False)["input_ids"], stop] for text in group]
            for group in texts
        ]
        loss = -student(pack_groups([p.ids for p in prompts], rows))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(student, 1.0)
        set_learning_rate(optimizer, learning_rate(step, steps, peak, 0.05, "linear"))
        optimizer.step()
        if (step + 1) % 25 == 0:
            print(f"  step {step + 1}/{steps}  nats a token {loss.item():.4f}", flush=True)


@torch.no_grad()
def known(training: Training, base: Decoder, tokenizer: Any) -> list[dict[str, float]]:
    """For each held-out patient the probability that the untrained model, asked for one answer, gives to each condition."""
    single, noun = (
        Grammar("rlvr_single", 1, thinking=False),
        get_task(training.config.data.task).noun,
    )
    names = sorted(
        {gold.name for prompt in training.held_out.prompts for gold in prompt.example.golds}
    )
    rows = [
        [
            *tokenizer(render(single, [name]), add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        for name in names
    ]
    out = []
    for prompt in training.held_out.prompts:
        logprobs = base(
            pack_groups([build_prompt(prompt.example, single, tokenizer, noun).ids], [rows])
        )[0]
        out.append(
            {
                name: row.sum().exp().item()
                for name, row in zip(names, logprobs.split([len(row) for row in rows]), strict=True)
            }
        )
    return out


def rated(items: Sequence[Item], beliefs: Sequence[dict[str, float]]) -> list[Item]:
    """The items with each confidence replaced by the model's probability of the answer before it; 0 for a repeat, and for what is no condition."""
    out = []
    for item, belief in zip(items, beliefs, strict=True):
        of_key = {normalise(name): p for name, p in belief.items()}
        said = (
            [
                0.0 if again else of_key.get(str(key), 0.0)
                for key, again in zip(s.keys, s.repeated, strict=True)
            ]
            for s in item.sets
        )
        sets = (
            s if s.reason else replace(s, confidences=tuple(q))
            for s, q in zip(item.sets, said, strict=True)
        )
        out.append(replace(item, sets=tuple(sets)))
    return out


def most_probable(training: Training, beliefs: Sequence[dict[str, float]]) -> list[Item]:
    """One set a patient: the answers that the model finds the most probable, with these probabilities."""
    p = training.held_out
    chosen = [
        sorted(belief, key=belief.__getitem__)[::-1][: p.scorer.grammar.num_answers]
        for belief in beliefs
    ]
    texts = [
        render(p.scorer.grammar, names, [belief[name] for name in names])
        for names, belief in zip(chosen, beliefs, strict=True)
    ]
    return [
        item_of_texts(prompt, [(text, 0)], p.scorer.grammar, p.scorer.verifier)
        for prompt, text in zip(p.prompts, texts, strict=True)
    ]


def policies(folder: Path, steps: int) -> Iterator[tuple[str, int, list[Item], list[Example]]]:
    """Name, steps of supervision, held-out sets and patients of each policy."""
    display = Display("plain", 0, 0)
    display.console.quiet = True
    config = load_config(folder / "config.yaml", [])
    fresh = replace(
        config, seed=config.seed + FRESH, train=replace(config.train, steps=max(1, steps))
    )
    base, _ = resolve_model(config.model.source, config.model.name, config.model.path)
    training, tokenizer, found = (
        build_training(fresh, base, display),
        load_tokenizer(base),
        checkpoint.newest(folder / "checkpoints"),
    )
    if found is None or not (training.scorer.grammar.confident and training.scorer.grammar.multi):
        raise UserError(
            f"{folder} has no checkpoint, or a policy without sets and confidences: take a finished run of multi_rlcr"
        )
    checkpoint.restore_weights(found, training.learner.policy)
    prompts = training.held_out.prompts
    examples = [p.example for p in prompts]
    items, beliefs = (
        written(training, training.learner.policy, prompts, SETS, "held out", 0),
        known(training, load_model(base), tokenizer),
    )
    yield "as trained", 0, items, examples
    yield (
        f"as trained, temperature {COOL}",
        0,
        written(training, training.learner.policy, prompts, SETS, "held out", 0, COOL),
        examples,
    )
    yield "rated by the untrained model's answers", 0, rated(items, beliefs), examples
    yield (
        "the untrained model's most probable answers",
        0,
        most_probable(training, beliefs),
        examples,
    )
    rates = {
        "same parameters": (config.model.lr, config.model.trainable),
        "all parameters": (4e-4, ""),
    }
    for name, (peak, trainable) in rates.items() if steps else ():
        print(name, flush=True)
        student = (
            copy.deepcopy(training.learner.policy)
            if name == "same parameters"
            else merge(copy.deepcopy(training.learner.policy))
        )
        teach(training, student, trainable, peak, steps, tokenizer)
        yield (
            f"taught, {name}",
            steps,
            written(training, student, prompts, SETS, "held out", 0),
            examples,
        )


def markdown(file: Path = RESULT) -> str:
    """A line for each policy of each run."""
    lines = []
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        columns = {name: row[name] for name in WHOLE if name != "coverage@3"} | {
            "first slot": row["slots"][0]["q_mse"]
        }
        columns |= {
            "drawn": row["parts"]["drawn"],
            "of the mean": row["parts"]["expected"],
            "one for all": row["parts"]["constant"],
        }
        lines.append(
            [
                row["run"],
                row["policy"],
                *(
                    "–" if v is None else f"{v:.3f}" if v >= 0.1 else f"{v:.4f}"
                    for v in columns.values()
                ),
            ]
        )
    return grid(("run", "policy", *columns), lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--steps", type=int, default=500, help="of supervision; 0: none of it")
    args = parser.parse_args()
    run = f"{args.run.parent.name}/{args.run.name}"
    rows = {
        (row["run"], row["policy"]): row
        for row in (read_jsonl(RESULT)[0] if RESULT.exists() else [])
    }
    for name, steps, items, examples in policies(args.run, args.steps):
        told = {
            "run": run,
            "policy": name,
            "steps": steps,
            **environment(),
            **whole(items, examples),
        }
        rows[run, name] = told | {
            "parts": parts(items, (0, 1, 2)),
            "slots": [parts(items, (slot,)) for slot in range(3)],
        }
        write_jsonl(RESULT, rows.values())
        print(
            json.dumps({key: rows[run, name][key] for key in ("policy", *WHOLE, "parts")}),
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""What the embedded model does in every form that it was taught: the last table of README.md.

    python -m experiments.embedded_model.measure [--items 200] [--model FOLDER]

Also printed: the KL divergence of its single answers from the exact posterior.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mar.answers.grammar import Grammar
from mar.answers.prompts import build_prompt
from mar.answers.rewards import RewardSpec
from mar.answers.tokenizer import load_tokenizer
from mar.learn.demonstrations import make_demonstration_batch, piece_encoder, soft_target_loss
from mar.measure.bounds import floor_coverage
from mar.measure.held_out import HeldOut, measure
from mar.policy.model import Decoder
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model
from mar.records import Example, Rollout
from mar.sample.draws import SamplingParams
from mar.sample.rollout import Scorer, make_decode
from mar.tasks import clinic
from mar.tasks.registry import get_task

FORMS: list[tuple[str, Grammar, str]] = [
    ("rlvr_single", Grammar("rlvr_single", 1, thinking=False), "ranked"),
    ("rlvr_single, thinking", Grammar("rlvr_single", 1), "ranked"),
    ("rlcr_single", Grammar("rlcr_single", 1, thinking=False), "ranked"),
    ("rlcr_single, thinking, analysis", Grammar("rlcr_single", 1, analysis=True), "ranked"),
    *(
        (f"rlvr_multi, K={k}", Grammar("rlvr_multi", k, thinking=False), "ranked")
        for k in (1, 3, 10)
    ),
    *(
        (f"rlcr_multi, K={k}", Grammar("rlcr_multi", k, thinking=False), "ranked")
        for k in range(1, 11)
    ),
    ("rlcr_multi, K=3, thinking", Grammar("rlcr_multi", 3), "ranked"),
    ("rlcr_multi, K=3, split", Grammar("rlcr_multi", 3, "split", thinking=False), "ranked"),
    (
        "rlcr_multi, K=3, split, thinking, analysis",
        Grammar("rlcr_multi", 3, "split", analysis=True),
        "ranked",
    ),
    ("rlcr_multi, K=3, `<other>`", Grammar("rlcr_multi", 3, thinking=False, other=True), "ranked"),
    ("prompted-for-K, K=3", Grammar("rlvr_multi", 3, thinking=False), "prompted_k"),
    ("verbalised sampling, K=3", Grammar("rlcr_multi", 3, thinking=False), "verbalized"),
]


def posterior_kl(
    model: Decoder, tokenizer: Any, examples: list[Example], bare: bool = False
) -> float:
    """Nats per patient, exact: no answer is drawn. `bare`: without the request for a form."""
    rng = np.random.default_rng(1)
    encode = piece_encoder(tokenizer)
    batch = make_demonstration_batch(
        examples, clinic.NOUN, tokenizer, encode, rng, others=[], mixture="plain", bare=bare
    )
    with torch.no_grad():
        excess = soft_target_loss(model, batch).item() - batch.entropy
    return excess * batch.num_counted / len(examples)


def confidences_and_truths(rollouts: list[Rollout]) -> tuple[np.ndarray, np.ndarray]:
    """[K, sets] each, over right-formed sets: what was written, and the exact probability of the
    answer; a repeat has none left.
    """
    said, truths = [], []
    for rollout in (r for r in rollouts if r.reason is None):
        probability: dict[str | None, float | None] = {
            gold.name: gold.probability for gold in rollout.prompt.example.golds
        }
        of_answers = zip(rollout.answers, rollout.repeated, strict=True)
        truths.append([0.0 if again else probability.get(a, 0.0) for a, again in of_answers])
        said.append(rollout.confidences)
    return np.array(said, dtype=np.float64).T, np.array(truths, dtype=np.float64).T


def slot_correlations(rollouts: list[Rollout]) -> list[float]:
    """[K] Pearson correlation of confidence and truth in each slot."""
    pairs = zip(*confidences_and_truths(rollouts), strict=True)
    return [float(np.corrcoef(said, truth)[0, 1]) for said, truth in pairs]


def slot_errors(rollouts: list[Rollout]) -> list[float]:
    """[K] mean squared error of the confidences in each slot."""
    said, truths = confidences_and_truths(rollouts)
    return ((said - truths) ** 2).mean(axis=1).tolist()


def run(
    model: Decoder, tokenizer: Any, examples: list[Example], grammar: Grammar, style: str
) -> tuple[dict[str, Any], list[Rollout]]:
    """One set for each example."""
    scorer = Scorer(
        grammar,
        RewardSpec(brier="paper" if grammar.confident else "none"),
        get_task("clinic").verifier,
        make_decode(tokenizer),
    )
    held_out = HeldOut(
        prompts=tuple(build_prompt(e, grammar, tokenizer, clinic.NOUN, style) for e in examples),
        scorer=scorer,
        params=SamplingParams(320, 1.0, (tokenizer.eos_token_id,)),
        kv_budget_tokens=65536,
        seed=0,
    )
    return measure(model, held_out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument(
        "--model", type=Path, default=resolve_model("embedded", "embedded", None)[0]
    )
    args = parser.parse_args()
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    examples = clinic.load("validation", args.items)
    posterior = np.array(
        [[gold.probability for gold in example.golds] for example in examples], dtype=np.float64
    )
    print(f"KL to the posterior, one answer: {posterior_kl(model, tokenizer, examples):.3f} nats\n")
    print(
        "| form | format rate | coverage@K | floor | repeats per set | tokens per set |\n|---|---|---|---|---|---|"
    )
    for name, grammar, style in FORMS:
        metrics, _ = run(model, tokenizer, examples, grammar, style)
        K = grammar.num_answers
        row = [
            metrics["format_rate"],
            metrics[f"coverage@{K}"],
            floor_coverage(posterior, K).mean(),
            metrics["repeats_per_set"],
        ]
        print(
            f"| {name} | {' | '.join(f'{x:.3f}' for x in row)} | {metrics['tokens_per_set']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

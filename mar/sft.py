"""Supervised fine-tuning on the grammar, before reinforcement learning makes the answers good.

    python -m mar.sft --task clinic --model FOLDER --out FOLDER      (any supported checkpoint)

experiments/embedded_model/recreate.sh makes the embedded model out of such stages. The result knows
the grammar and the task's answers, but does not rank them, and rates them only as far as --hint
says: the rest is left to the reward. `mar/learn/demonstrations.py` says what is taught.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mar.answers.tokenizer import copy_tokenizer, load_tokenizer, num_tokens
from mar.errors import exit_code
from mar.learn.demonstrations import (
    MIXTURES,
    SFT_SEED,
    ConfidenceHint,
    make_demonstration_batch,
    piece_encoder,
    soft_target_loss,
)
from mar.learn.optim import clip_gradients, make_optimizers, require_finite, set_learning_rate
from mar.policy.model import Decoder
from mar.policy.weights import load_model, save_model
from mar.records import Example
from mar.tasks.loading import Source
from mar.tasks.registry import get_task

# Embedded tasks draw new examples after so many steps.
STEPS_PER_LOAD = 200

# A low rate, and most of the way spent lowering it, did better than a higher one.
LR = 1e-3
WARMUP_STEPS = 50
DECAY_FRAC = 0.7


def rate_factor(step: int, num_steps: int) -> float:
    """What the peak learning rate is multiplied by at `step` (from 0): a trapezoid."""
    warmup = (step + 1) / WARMUP_STEPS
    decay = (num_steps - step) / (DECAY_FRAC * num_steps)
    return min(1.0, warmup, decay)


def train(
    model: Decoder,
    tokenizer: Any,
    load: Callable[[int], list[Example]],
    noun: str,
    args: argparse.Namespace,
) -> None:
    """Minimise the soft-target loss of demonstrations; save the model now and then.

    `load(n)` gives the n-th set of examples. The log shows `kl`: how many nats a completion lies
    above the least possible.
    """
    optimizers = make_optimizers(model, args.lr, args.muon)
    hint = ConfidenceHint(args.hint, args.hint_counts, args.hint_spread)
    rng = np.random.default_rng(args.seed)
    encode = piece_encoder(tokenizer)
    began = time.perf_counter()
    recent_kl: list[float] = []
    examples: list[Example] = []
    for step in range(args.steps):
        new_examples_due = step % STEPS_PER_LOAD == 0 and not args.path  # a file is read once
        if not examples or new_examples_due:
            examples = load(step // STEPS_PER_LOAD)
            names = [gold.name for example in examples for gold in example.golds]
            others = list(dict.fromkeys(names))
        first = step * args.prompts
        batch = make_demonstration_batch(
            [examples[(first + i) % len(examples)] for i in range(args.prompts)],
            noun=noun,
            tokenizer=tokenizer,
            encode=encode,
            rng=rng,
            others=others,
            mixture="plain" if step < args.plain_steps else args.mixture,
            hint=hint,
            rows=args.rows,
        )

        loss = soft_target_loss(model, batch)
        model.zero_grad()
        loss.backward()
        norm = clip_gradients(model, 1.0)
        require_finite(norm, step + 1, "lower --lr; what was saved last is whole")
        factor = rate_factor(step, args.steps)
        for optimizer, peak in optimizers:
            set_learning_rate(optimizer, peak * factor)
            optimizer.step()

        excess = loss.item() - batch.entropy  # nats a counted token
        num_completions = args.prompts * args.rows
        recent_kl.append(excess * batch.token_weights.sum().item() / num_completions)
        last = step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or last:
            line = {
                "step": step + 1,
                "kl": round(float(np.mean(recent_kl)), 4),
                "lr": round(args.lr * factor, 6),
                "seconds": round(time.perf_counter() - began),
            }
            print(json.dumps(line), flush=True)
            recent_kl.clear()
        if (step + 1) % args.save_every == 0 or last:
            save_model(model, args.out, getattr(torch, args.dtype))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", default="clinic")
    add("--path", help="jsonl of the task's examples; without it the embedded ones")
    add("--model", type=Path, required=True, help="folder of the model to start from")
    add("--out", type=Path, required=True)
    add("--steps", type=int, default=2000)
    add("--mixture", default="all", choices=MIXTURES, help="of forms: all of them, or short ones")
    add("--plain-steps", type=int, default=0, help="so many first steps teach single answers only")
    add("--prompts", type=int, default=32, help="prompts per step")
    add("--rows", type=int, default=1, help="completions per prompt")
    add("--lr", type=float, default=LR)
    add("--muon", action="store_true", help="Muon for the matrices inside the blocks")
    add(
        "--hint",
        type=float,
        default=0.0,
        help="share of a confidence's mass that lies near the truth",
    )
    add(
        "--hint-counts",
        type=float,
        default=1.0,
        help="what each token of a confidence counts in the loss",
    )
    add(
        "--hint-spread",
        type=float,
        default=ConfidenceHint.spread,
        help="how far from the truth",
    )
    add("--seed", type=int, default=0)
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the saved weights",
    )
    add("--log-every", type=int, default=100)
    add("--save-every", type=int, default=500)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    task = get_task(args.task)

    def load(chunk: int) -> list[Example]:
        """All of the file, or embedded examples that no other chunk has."""
        source = Source(
            kind="path" if args.path else "embedded",
            split="train",
            num=None if args.path else args.prompts * STEPS_PER_LOAD,
            seed=SFT_SEED + 1000 * args.seed + chunk,
            path=args.path,
        )
        return list(task.load(source).examples)

    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, num_tokens=num_tokens(tokenizer))
    copy_tokenizer(args.model, args.out)
    sizes = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
    }
    print(json.dumps(sizes | vars(args), default=str))
    train(model, tokenizer, load, task.noun, args)


if __name__ == "__main__":
    sys.exit(exit_code(main))

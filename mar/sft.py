"""Supervised warm-up on the grammar: the model learns to answer in every form before reinforcement learning makes the answers good.

    python -m mar.sft --task clinic --model FOLDER --out FOLDER      (any supported checkpoint)

experiments/embedded_model/recreate.sh makes the embedded model out of such stages. The result knows the grammar and the task's answers, but does
not rank them, and rates them only as far as --hint says: the rest is left to the reward. `mar/learn/demonstrations.py` says what is taught.
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

from mar.answers.prompts import load_tokenizer
from mar.errors import exit_code
from mar.learn.demonstrations import MIXTURES, Hint, lesson_loss, make_encode, make_lesson
from mar.learn.optim import make_optimizers, set_learning_rate
from mar.policy.model import Decoder
from mar.policy.weights import load_model, save_model
from mar.records import Example
from mar.tasks.loading import Source
from mar.tasks.registry import get_task

STEPS_PER_LOAD, SFT_SEED = 200, 1_000_000

LR, DECAY = (
    1e-3,
    0.7,
)  # a low rate, and most of the way spent lowering it, did better than a higher one


def train(
    model: Decoder,
    tokenizer: Any,
    load: Callable[[int], list[Example]],
    noun: str,
    args: argparse.Namespace,
) -> None:
    """Minimise the lessons' loss. The log shows `kl`: how many nats a completion lies above the least possible."""
    optimizers, hint = (
        make_optimizers(model, args.lr, args.muon),
        Hint(args.hint, args.hint_counts, args.hint_spread),
    )
    rng, began, encode = (
        np.random.default_rng(args.seed),
        time.perf_counter(),
        make_encode(tokenizer),
    )
    recent: list[float] = []
    examples: list[Example] = []
    for step in range(args.steps):
        if not examples or (
            step % STEPS_PER_LOAD == 0 and not args.path
        ):  # a file is read once, as a whole
            examples = load(step // STEPS_PER_LOAD)
            others = list(
                dict.fromkeys(gold.name for example in examples for gold in example.golds)
            )
        first = step * args.prompts
        chosen = [examples[(first + i) % len(examples)] for i in range(args.prompts)]
        mixture = "plain" if step < args.plain_steps else args.mixture
        lesson = make_lesson(chosen, noun, tokenizer, encode, rng, others, mixture, hint, args.rows)
        loss = lesson_loss(model, lesson)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = min(1.0, (step + 1) / 50, (args.steps - step) / (DECAY * args.steps))  # trapezoid
        for optimizer, peak in optimizers:
            set_learning_rate(optimizer, peak * rate)
            optimizer.step()
        recent.append(
            (loss.item() - lesson.entropy) * lesson.counts.sum().item() / (args.prompts * args.rows)
        )
        last = step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or last:
            line = {
                "step": step + 1,
                "kl": round(float(np.mean(recent)), 4),
                "lr": round(args.lr * rate, 6),
            }
            print(json.dumps(line | {"seconds": round(time.perf_counter() - began)}), flush=True)
            recent.clear()
        if (step + 1) % args.save_every == 0 or last:
            save_model(model, args.out, getattr(torch, args.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="clinic")
    parser.add_argument("--path", help="jsonl of the task's examples; without it the embedded ones")
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of the model to start from"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--mixture",
        default="all",
        choices=MIXTURES,
        help="of forms: all that there are, or the short ones",
    )
    parser.add_argument(
        "--plain-steps",
        type=int,
        default=0,
        help="of these, how many of the first teach single answers only",
    )
    parser.add_argument("--prompts", type=int, default=32, help="prompts per step")
    parser.add_argument("--rows", type=int, default=1, help="completions per prompt")
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument(
        "--muon", action="store_true", help="Muon for the matrices inside the blocks"
    )
    parser.add_argument(
        "--hint",
        type=float,
        default=0.0,
        help="share of a confidence's mass that lies near the truth",
    )
    parser.add_argument(
        "--hint-counts",
        type=float,
        default=1.0,
        help="what each token of a confidence counts in the loss",
    )
    parser.add_argument("--hint-spread", type=float, default=Hint.spread, help="how far from it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the saved weights"
    )
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()
    task = get_task(args.task)

    def load(
        chunk: int,
    ) -> list[Example]:  # fresh patients all the time; the seeds of training runs are small numbers
        kind, num = ("path", None) if args.path else ("embedded", args.prompts * STEPS_PER_LOAD)
        return task.load(
            Source(kind, "train", num, SFT_SEED + 1000 * args.seed + chunk, args.path)
        ).examples

    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    for key in ("is_local", "local_files_only"):  # how it was loaded is no property of it
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(args.out)
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "vocabulary": len(tokenizer),
                **vars(args),
            },
            default=str,
        )
    )
    train(model, tokenizer, load, task.noun, args)


if __name__ == "__main__":
    sys.exit(exit_code(main))

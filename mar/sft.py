"""Supervised warm-up on the grammar: the model learns to answer in every form before reinforcement learning makes the answers good.

    python -m mar.sft --task clinic --scratch --out mar/embedded/model      (re-creates the embedded model and its tokenizer)

Answers are distinct draws from the known posterior (where there is none: the gold among other items' golds), confidences are uniform noise, so the
result knows the grammar and the task's answers but neither ranks nor rates them: that is left to the reward. From scratch, a first stage teaches
the posterior itself: one answer per completion, each completion weighted with its exact probability, so without sampling noise.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mar.attention import pack_groups
from mar.grammar import Grammar, render
from mar.model import Decoder, ModelConfig
from mar.optim import set_learning_rate
from mar.prompts import STYLES, build_prompt, instructions, load_tokenizer
from mar.records import Example, UserError
from mar.tasks import get_task
from mar.tasks.common import Source
from mar.weights import load_model, save_model

ANALYSES = (
    "The first answer fits best.",
    "Several answers stay possible.",
    "The findings leave room for doubt.",
    "No answer is certain here.",
)
STEPS_PER_LOAD, SFT_SEED = 200, 1_000_000
LIKELY_ANSWERS = 12
NOISE = re.compile(r"<(?:think|analysis|confidence[0-9]*|other)>(.*?)</")
NOISE_WEIGHT = 0.1
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def draw_grammar(rng: np.random.Generator) -> tuple[Grammar, str]:
    """One grammar and prompt style of the mixture: every form, layout, K and switch occurs, K=3 interleaved most often."""
    form = str(rng.choice(["rlcr_multi", "rlvr_multi", "rlcr_single", "rlvr_single"], p=[0.55, 0.15, 0.15, 0.15]))
    multi, confident = form.endswith("multi"), form.startswith("rlcr")
    layout = "split" if multi and confident and rng.random() < 0.25 else "interleaved"
    num_answers = 1 if not multi else 3 if rng.random() < 0.5 else int(rng.integers(1, 11))
    analysis = bool(confident and (layout == "split" or not multi) and rng.random() < 0.5)
    other = bool(confident and rng.random() < 0.1)
    style = str(rng.choice(list(STYLES), p=[0.8, 0.1, 0.1])) if multi else "ranked"
    return Grammar(form, num_answers, layout, bool(rng.random() < 0.3), analysis, other), style


def draw_answers(example: Example, num_answers: int, others: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Distinct answers: draws from the golds' probabilities where known, else one gold at a random place among `others`."""
    probabilities = np.array([gold.probability or 0.0 for gold in example.golds])
    if probabilities.sum() > 0:
        keys = rng.exponential(size=len(probabilities)) / np.maximum(
            probabilities, 1e-12
        )  # the first arrivals are draws without replacement
        return [example.golds[i].name for i in np.argsort(keys)[:num_answers]]
    gold = example.golds[int(rng.integers(len(example.golds)))].name
    pool = [name for name in dict.fromkeys(others) if name not in {g.name for g in example.golds}]
    answers = [pool[i] for i in rng.permutation(len(pool))[: num_answers - 1]]
    answers.insert(int(rng.integers(len(answers) + 1)), gold)
    return answers


def demonstration(
    example: Example, grammar: Grammar, others: Sequence[str], rng: np.random.Generator, think_open: bool = False
) -> str:
    """A right-formed completion: thoughts that quote the question, drawn answers, noise for confidences."""
    clauses = [c.strip() for c in re.split(r"[.:,;?]\s", example.question) if 2 < len(c.strip()) < 40] or [
        "the question"
    ]
    quoted = [clauses[i] for i in rng.permutation(len(clauses))[:2]]
    return render(
        grammar,
        draw_answers(example, grammar.num_answers, others, rng),
        list(rng.integers(0, 101, grammar.num_answers) / 100),
        thinking=f"Notable: {', '.join(quoted)}.",
        analysis=str(rng.choice(ANALYSES)),
        other=float(rng.integers(0, 101)) / 100,
        think_open=think_open,
    )


def train_tokenizer(examples: Sequence[Example], noun: str, vocab_size: int, folder: Path) -> None:
    """A byte-level BPE tokenizer with a chat template. A confidence is written in digits, tags and most names are several tokens, and a
    token may cross the border between two tags, as in large models."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng, texts, names = np.random.default_rng(0), [], [gold.name for example in examples for gold in example.golds]
    for example in examples:
        grammar, style = draw_grammar(rng)
        texts += [example.question, instructions(grammar, noun, style), demonstration(example, grammar, names, rng)]
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"[0-9]+>(?:</?[a-z]+)?|>?</?[a-z]+|0?\.(?=[0-9])|[0-9]| ?[A-Za-z]+|\n| ?[^\sA-Za-z0-9<>]+|\s|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def embedded_config(vocab_size: int) -> ModelConfig:
    """The shape of the embedded model: Qwen3 in small."""
    return ModelConfig.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        }
    )


@dataclass(frozen=True)
class Lesson:
    """Prompts, tokenised completions of each, and what each completion token counts, flat in the order of the model's output."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    weights: list[float]


def posterior_lesson(examples: Sequence[Example], noun: str, tokenizer: Any) -> Lesson:
    """Every likely answer of each example as a completion of its own, weighted with its exact probability."""
    lesson = Lesson([], [], [])
    grammar = Grammar("rlvr_single", 1, thinking=False)
    for example in examples:
        likely = sorted(example.golds, key=lambda gold: -(gold.probability or 0.0))[:LIKELY_ANSWERS]
        ids = tokenizer([render(grammar, [gold.name]) + tokenizer.eos_token for gold in likely])["input_ids"]
        lesson.prompts.append(list(build_prompt(example, grammar, tokenizer, noun).ids))
        lesson.completions.append(ids)
        for gold, row in zip(likely, ids, strict=True):
            lesson.weights.extend([gold.probability or 0.0] * len(row))
    return lesson


def grammar_lesson(
    examples: Sequence[Example], noun: str, tokenizer: Any, per_prompt: int, rng: np.random.Generator
) -> Lesson:
    """`per_prompt` demonstrations of a form that each example draws from the mixture. Noise (confidences, thoughts) counts a tenth."""
    lesson, others = Lesson([], [], []), [example.golds[0].name for example in examples]
    for example in examples:
        grammar, style = draw_grammar(rng)
        prompt = build_prompt(example, grammar, tokenizer, noun, style)
        texts = [demonstration(example, grammar, others, rng, prompt.think_open) for _ in range(per_prompt)]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        lesson.prompts.append(list(prompt.ids))
        lesson.completions.append([[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]])
        for text, offsets in zip(texts, encoded["offset_mapping"], strict=True):
            noise = {i for match in NOISE.finditer(text) for i in range(*match.span(1))}
            lesson.weights.extend([NOISE_WEIGHT if start in noise else 1.0 for start, _ in offsets] + [1.0])
    return lesson


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon), in float32: torch.optim.Muon
    computes in bfloat16, which a CPU does far slower. From scratch it needs fewer steps than AdamW to learn which finding speaks for what."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"])
                x = x / (x.norm() + 1e-7)
                x = x.T if (tall := x.shape[0] > x.shape[1]) else x
                for _ in range(5):
                    square = x @ x.T
                    x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
                p.add_(x.T if tall else x, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def make_optimizers(model: Decoder, lr: float, scratch: bool) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak rates: AdamW for all, or from scratch Muon for the matrices inside the blocks."""
    inside = [p for p in model.blocks.parameters() if p.ndim == 2] if scratch else []
    rest = [p for p in model.parameters() if not any(p is q for q in inside)]
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [(adamw, lr), (Muon(inside, lr=10 * lr), 10 * lr)] if scratch else [(adamw, lr)]


def train(
    model: Decoder, tokenizer: Any, load: Callable[[int], list[Example]], noun: str, args: argparse.Namespace
) -> None:
    """Weighted next-token training on the completions; each prompt is computed once for all of its completions. After the posterior stage
    the two kinds of lessons alternate."""
    optimizers = make_optimizers(model, args.lr, args.scratch)
    rng, began, num_steps = np.random.default_rng(args.seed), time.perf_counter(), args.posterior_steps + args.steps
    running: dict[str, float] = {}
    examples: list[Example] = []
    for step in range(num_steps):
        if step % STEPS_PER_LOAD == 0:
            examples = load(step // STEPS_PER_LOAD)
        chosen = [examples[(step * args.prompts + i) % len(examples)] for i in range(args.prompts)]
        kind = "posterior" if step < args.posterior_steps or (args.scratch and step % 2 == 0) else "grammar"
        lesson = (
            posterior_lesson(chosen, noun, tokenizer)
            if kind == "posterior"
            else grammar_lesson(chosen, noun, tokenizer, args.per_prompt, rng)
        )
        weights = torch.tensor(lesson.weights)
        logprobs, _, _ = model(pack_groups(lesson.prompts, lesson.completions), 1.0)
        loss = -(weights * logprobs).sum() / weights.sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = min(1.0, (step + 1) / 50) * min(1.0, (num_steps - step) / (0.4 * num_steps))  # trapezoid
        for optimizer, peak in optimizers:
            set_learning_rate(optimizer, peak * rate)
            optimizer.step()
        running[kind] = 0.95 * running.get(kind, loss.item()) + 0.05 * loss.item()
        last = step + 1 == num_steps
        if (step + 1) % args.log_every == 0 or last:
            line = {"step": step + 1, **{k: round(v, 4) for k, v in running.items()}, "lr": round(args.lr * rate, 6)}
            print(json.dumps(line | {"seconds": round(time.perf_counter() - began)}), flush=True)
        if (step + 1) % args.save_every == 0 or last:
            save_model(model, args.out, getattr(torch, args.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="clinic")
    parser.add_argument("--model", type=Path, help="folder of the model to start from")
    parser.add_argument(
        "--scratch",
        action="store_true",
        help="start the embedded shape from random weights, with a tokenizer of its own",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--posterior-steps", type=int, default=0, help="steps of the first stage")
    parser.add_argument("--steps", type=int, default=1200, help="steps of the second stage")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step")
    parser.add_argument("--per-prompt", type=int, default=6, help="demonstrations per prompt")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the saved weights")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()
    if args.scratch == (args.model is not None):
        raise UserError("give either --scratch or --model FOLDER")
    task = get_task(args.task)

    def load(chunk: int) -> list[Example]:  # fresh patients all the time; the seeds of training runs are small numbers
        return task.load(Source("embedded", "train", args.prompts * STEPS_PER_LOAD, seed=SFT_SEED + chunk)).examples

    torch.manual_seed(args.seed)
    if args.scratch:
        train_tokenizer(load(-1)[:4000], task.noun, args.vocab, args.out)
        tokenizer = load_tokenizer(args.out)
        model = Decoder(embedded_config(len(tokenizer)))
    else:
        model, tokenizer = load_model(args.model), load_tokenizer(args.model)
        tokenizer.save_pretrained(args.out)
    print(
        json.dumps(
            {"parameters": sum(p.numel() for p in model.parameters()), "vocabulary": len(tokenizer), **vars(args)},
            default=str,
        )
    )
    train(model, tokenizer, load, task.noun, args)


if __name__ == "__main__":
    main()

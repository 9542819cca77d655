"""One side of the comparison of whole RL steps (sample, verify, update).

    python -m experiments.bench.rl_step ours|trl random|smollm2 P G R RUNS

Says {"ready": ...} when it is warm, then makes one step for each line of its input and answers with
{"seconds": ..., "bytes": ...}: how long it took, and the peak of resident memory in it over what
was resident before the warm-up (optimizer state, activations, caches). `step.py` asks both in turn.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from experiments.bench.common import reset_peak, resident_bytes
from mar.learn.losses import policy_gradient
from mar.policy.model import Decoder, ModelConfig
from mar.policy.packing import pack_groups
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model, save_model
from mar.run.compose import compose
from mar.sample.draws import SamplingParams, stream_key
from mar.sample.engine import Request, generate
from mar_kernels import answer_advantages

VOCAB, LR, BETAS, CLIP = 8192, 1e-4, (0.9, 0.999), 1.0
SHAPE = ModelConfig(
    "Qwen3ForCausalLM", VOCAB, 256, 768, 6, 4, 2, 64, qk_norm=True, tied_embeddings=True
)


def policy() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SHAPE)


@contextmanager
def checkpoint(model: str) -> Iterator[Path]:
    """The folder of `smollm2`, or of the random model."""
    if model == "smollm2":
        options = compose(["+experiment=clinic", "model=smollm2-135m"]).model
        yield resolve_model(options.source, options.name, options.path)[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(policy(), Path(folder))
        yield Path(folder)


class Steps:
    """Waits for a line of input before a step and reports after it; the first step warms up."""

    def __init__(self) -> None:
        self.warm = False
        self.before = 0

    def begin(self) -> None:
        if self.warm:
            sys.stdin.readline()
        self.before = self.before or resident_bytes("VmRSS")
        reset_peak()
        self.began = time.perf_counter()

    def end(self, note: dict[str, Any]) -> None:
        taken = time.perf_counter() - self.began
        answer: dict[str, Any] = {"ready": note}
        if self.warm:
            answer = {"seconds": taken, "bytes": resident_bytes("VmHWM") - self.before}
        self.warm = True
        print(json.dumps(answer, default=str), flush=True)


def random_prompt(length: int, seed: int) -> list[int]:
    """Ids that every vocabulary here has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()


def verify(ids: list[int]) -> float:
    """A reward that costs nothing: the share of even tokens."""
    return sum(i % 2 == 0 for i in ids) / len(ids)


def steps_of_ours(folder: Path, P: int, G: int, R: int, runs: int) -> None:
    model = load_model(folder)
    steps = Steps()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0)
    params = SamplingParams(R, 1.0, ())

    def step(index: int) -> None:
        prompt = random_prompt(P, index)
        keys = tuple(stream_key("bench", index, g) for g in range(G))
        generated = generate(model, [Request(tuple(prompt), keys)], params, 10**7)
        completions = [sampled.ids.tolist() for sampled in generated.groups[0]]
        rewards = torch.tensor([[verify(ids)] for ids in completions], dtype=torch.float64)
        weight = torch.ones(1, dtype=torch.float64)
        zeros = torch.zeros(G, R, dtype=torch.int64)
        advantages = answer_advantages(rewards, weight, zeros[:, :1], zeros, zeros[:, 0])
        logprobs, _, _ = model(pack_groups([prompt], [completions]))
        token_weights = torch.full_like(logprobs, 1 / (G * R))
        optimizer.zero_grad()
        policy_gradient(logprobs, advantages.flatten().float(), token_weights).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    for index in range(runs + 1):
        steps.begin()
        step(index)
        steps.end({"parameters": sum(p.numel() for p in model.parameters())})


def word_tokenizer(vocab: int) -> Any:
    """One word a token, so that a prompt of P words is P tokens."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocab)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def steps_of_trl(folder: Path, P: int, G: int, R: int, runs: int) -> None:
    """TRL at its best CPU settings: float32, no activation checkpointing, no reference model, one
    update a batch.
    """
    import datasets
    import transformers
    import trl

    steps = Steps()

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            # Paths and names of this run are left out.
            told = {}
            for key, value in config.to_dict().items():
                if not key.endswith(("_dir", "run_name")):
                    told[key] = value
            steps.end(told)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [verify(ids) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as out:
        config = trl.GRPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            beta=0.0,
            num_iterations=1,
            num_generations=G,
            per_device_train_batch_size=G,
            gradient_accumulation_steps=1,
            max_steps=runs + 1,
            max_completion_length=R,
            generation_kwargs={"min_new_tokens": R},
            temperature=1.0,
            scale_rewards="none",
            learning_rate=LR,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=0.0,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompts = [" ".join(f"w{i}" for i in random_prompt(P, index)) for index in range(runs + 1)]
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=word_tokenizer(model.config.vocab_size),
            callbacks=[Clock()],
        )
        trainer.train()


SIDES = {"ours": steps_of_ours, "trl": steps_of_trl}


if __name__ == "__main__":
    torch.set_num_threads(1)
    side, name, *numbers = sys.argv[1:]
    with checkpoint(name) as where:
        SIDES[side](where, *map(int, numbers))

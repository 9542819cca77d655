"""One whole RL step (sample, verify, update) of mar or of TRL on the same random model:  python -m experiments.bench.rl_step ours|trl P G R runs

The last line of stdout is {"seconds": median of a step, "bytes": peak resident memory of a step over what was resident before it}.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from experiments.bench.common import peak_bytes
from mar.attention import pack_groups
from mar.draw import SamplingParams, stream_key
from mar.losses import reinforce
from mar.model import Decoder, ModelConfig
from mar.sampler import Request, generate
from mar.weights import save_model
from mar_kernels import answer_advantages

VOCAB, LR, BETAS, CLIP = 8192, 1e-4, (0.9, 0.999), 1.0
SHAPE = ModelConfig("Qwen3ForCausalLM", VOCAB, 256, 768, 6, 4, 2, 64, qk_norm=True, tied_embeddings=True)


def policy() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SHAPE)


def random_prompt(length: int, seed: int) -> list[int]:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def verify(ids: list[int]) -> float:
    """A reward that costs nothing: the share of even tokens."""
    return sum(i % 2 == 0 for i in ids) / len(ids)


def steps_of_ours(P: int, G: int, R: int, runs: int) -> tuple[list[float], int]:
    model, times = policy(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0)
    params = SamplingParams(R, 1.0, ())

    def step(index: int) -> None:
        prompt = random_prompt(P, index)
        request = Request(tuple(prompt), tuple(stream_key("bench", index, g) for g in range(G)))
        completions = [s.ids.tolist() for s in generate(model, [request], params, 10**7).groups[0]]
        rewards = torch.tensor([[verify(ids)] for ids in completions], dtype=torch.float64)
        zeros = torch.zeros(G, R, dtype=torch.int64)
        advantages = answer_advantages(rewards, torch.ones(1, dtype=torch.float64), zeros[:, :1], zeros, zeros[:, 0])
        logprobs, _, _ = model(pack_groups([prompt], [completions]))
        optimizer.zero_grad()
        reinforce(logprobs, advantages.flatten().float(), torch.full_like(logprobs, 1 / (G * R))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    step(0)
    with peak_bytes() as peak:
        for index in range(1, runs + 1):
            began = time.perf_counter()
            step(index)
            times.append(time.perf_counter() - began)
    return times, peak[0]


def word_tokenizer() -> Any:
    """One word a token, so that a prompt of P words is P tokens."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def steps_of_trl(P: int, G: int, R: int, runs: int) -> tuple[list[float], int]:
    """TRL at its best CPU settings: float32, no activation checkpointing, no reference model, one update a batch."""
    import datasets
    import transformers
    import trl

    times: list[float] = []
    clock = {"began": 0.0}

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock["began"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - clock["began"])
            if len(times) == 1:  # the first step has warmed up
                peak.append(measured.__enter__())

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [verify(ids) for ids in completion_ids]

    peak: list[list[int]] = []
    measured = peak_bytes()
    with tempfile.TemporaryDirectory() as folder:
        save_model(policy(), Path(folder))
        config = trl.GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0, num_iterations=1,
            num_generations=G, per_device_train_batch_size=G, gradient_accumulation_steps=1, max_steps=runs + 1,
            max_completion_length=R, generation_kwargs={"min_new_tokens": R}, temperature=1.0, scale_rewards="none",
            learning_rate=LR, adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=0.0, max_grad_norm=CLIP,
            lr_scheduler_type="constant", save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        prompts = [" ".join(f"w{i}" for i in random_prompt(P, index)) for index in range(runs + 1)]
        trainer = trl.GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward,
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=word_tokenizer(),
            callbacks=[Clock()],
        )
        trainer.train()
    measured.__exit__(None, None, None)
    return times[1:], peak[0][0]


SIDES = {"ours": steps_of_ours, "trl": steps_of_trl}


if __name__ == "__main__":
    torch.set_num_threads(1)
    seconds, peak = SIDES[sys.argv[1]](*map(int, sys.argv[2:]))
    print(json.dumps({"seconds": statistics.median(seconds), "bytes": peak}))

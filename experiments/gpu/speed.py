"""How fast, beside what the device could do and what `mar.plan` predicts."""

import importlib.util
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from experiments.gpu.machine import copied_per_second, flops_per_second
from experiments.gpu.measuring import (
    GB,
    Place,
    Record,
    fill_at_random,
    random_decoder,
    random_requests,
    shape_of,
)
from experiments.gpu.sampler_values import without_triton
from mar.config import Config
from mar.learn.batch import Batch, make_batch
from mar.learn.learner import Learner
from mar.learn.update import compute_advantages, update
from mar.policy.distributed import join
from mar.policy.model import Decoder
from mar.records import Completion, Example, Prompt, Rollout
from mar.run.compose import compose
from mar.run.planning import plan
from mar.run.setup import learner_of
from mar.sample.draws import SamplingParams
from mar.sample.engine import Request, generate
from mar_kernels import linear_logprobs

PLENTY = 10**7
GROUP = 32
LONG = "+experiment=paper scale=h100x1 algo.prompts_per_step=1 algo.group_size=32".split()
# The paper's lengths are those of conf/model/qwen3-8b.yaml.
STEPS = {
    "8B": [*LONG, "model=qwen3-8b", "model.lora_rank=16"],
    "1.7B": [
        *LONG,
        "model=qwen3-1.7b",
        "model.max_prompt_tokens=3072",
        "model.max_completion_tokens=1536",
    ],
}
SHORT = [
    "model.max_prompt_tokens=9",
    "model.max_completion_tokens=6",
    "algo.group_size=4",
    "device=cpu",
    "scale.dtype=float32",
]


def measure(place: Place, record: Record) -> None:
    record.attempt("linear_logprobs", lambda: log_probabilities(place, record))
    bandwidth = copied_per_second(place)
    for size in ("0.6B", "8B"):
        record.attempt(f"sampler, {size}", partial(sampling, place, record, size, bandwidth))
    for size, words in STEPS.items():
        record.attempt(f"one step, {size}", partial(step, place, record, size, words))


# ---------------------------------------------------------------------- log-probabilities


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What a plain trainer computes: log_softmax of [N, V] in float32."""
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]


def sides(place: Place) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The sum of log-probabilities, by who computes it; the dearest in memory last."""
    ours = "triton" if place.is_gpu else "reference"
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        f"ours, {ours}": lambda *case: linear_logprobs(*case, backend=ours)[0].sum(),
        "ours, reference": lambda *case: linear_logprobs(*case, backend="reference")[0].sum(),
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["liger"] = lambda hidden, weight, targets: -liger(weight, hidden, targets)
    found["full logits"] = lambda *case: full_logits(*case).sum()
    compiled = torch.compile(full_logits)
    found["torch.compile of full logits"] = lambda *case: compiled(*case).sum()
    return found


def log_probabilities(place: Place, record: Record) -> None:
    """Forward and backward in bfloat16. TFLOP/s count the three products of 2NVD that are needed,
    whoever computes more of them."""
    n, d, v = place.size(8192, 8), place.size(4096, 16), place.size(151_936, 97)
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=place.device, dtype=torch.bfloat16).mul_(d**-0.25)
    weight = torch.randn(v, d, device=place.device, dtype=torch.bfloat16).mul_(d**-0.25)
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = torch.randint(v, (n,), device=place.device)
    reached = flops_per_second(place, torch.bfloat16)
    record(f"a product in bfloat16, before N {n:,} D {d:,} V {v:,}", reached / 1e12, "TFLOP/s")
    for name, side in sides(place).items():

        def both(side: Callable[..., Tensor] = side) -> None:
            hidden.grad = weight.grad = None
            side(hidden, weight, targets).backward()

        def one_side(name: str = name, both: Callable[[], None] = both) -> None:
            seconds = place.seconds(both, runs=3)
            record(f"{name}: forward and backward", 6 * n * d * v / seconds / 1e12, "TFLOP/s")
            hidden.grad = weight.grad = None
            before = torch.cuda.memory_allocated() if place.is_gpu else 0
            with place.peak() as peak:
                both()
            most = peak()
            if most is not None:
                record(f"{name}: memory beyond the inputs", (most - before) / GB, "GB")

        record.attempt(name, one_side)


# ---------------------------------------------------------------------- the sampler


def sampling(place: Place, record: Record, size: str, bandwidth: float) -> None:
    """One group: tokens a second of whole calls, and of the decode steps alone (the difference of
    calls of two lengths) beside the least that reading weights and cache takes; with the Triton
    kernels of decode steps and without them."""
    model = random_decoder(place, size, torch.bfloat16)
    tokens = place.size(64, 3)
    rows = place.size(GROUP, 4)
    for prompt_tokens in (place.size(512, 7), place.size(3072, 11)):
        requests = random_requests(model.config.vocab_size, [prompt_tokens], rows)

        def call(num_tokens: int, requests: list[Request] = requests) -> None:
            generate(model, requests, SamplingParams(num_tokens), PLENTY)

        name = f"sampler, {size}, P {prompt_tokens} G {rows}"
        for way, context in (("", nullcontext), (", without Triton", without_triton)):
            with context():
                short = place.seconds(lambda: call(tokens), runs=1)
                long = place.seconds(lambda: call(2 * tokens), runs=1)
            whole = rows * 2 * tokens / long
            record(f"{name}{way}: calls of {2 * tokens} tokens", whole, "tokens/s")
            alone = rows * tokens / (long - short)
            record(f"{name}{way}: decode steps alone", alone, "tokens/s")
        least = bytes_of_a_step(model, prompt_tokens, rows, 3 * tokens // 2) / bandwidth
        record(f"{name}: limit of the bandwidth", rows / least, "tokens/s")


def bytes_of_a_step(model: Decoder, prompt_tokens: int, rows: int, own_tokens: int) -> float:
    """Weights once, the prompt's keys and values once, those of each row."""
    shape = model.config
    weights = sum(parameter.numel() for parameter in model.parameters())
    of_a_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    numbers = weights + of_a_token * (prompt_tokens + rows * own_tokens)
    return numbers * model.head_weight.element_size()


# ---------------------------------------------------------------------- one step


def step(place: Place, record: Record, size: str, words: list[str]) -> None:
    """One prompt with its group: seconds and peak memory by part, beside the plan's. What is
    written is nonsense of full length, its rewards are random."""
    config = compose([*words, *SHORT] if place.tiny else words)
    planned = plan(config)
    adapters = f"adapters of rank {config.model.lora_rank}"
    trained = adapters if config.model.lora_rank else "all parameters"
    name = f"one step, {size}, {trained}"
    scale = config.scale
    if not place.is_gpu:
        # the plan is of GPUs, this rehearsal has none
        scale = replace(scale, num_gpus=0)
    world = join(config.device, scale)
    with place.peak() as peak:
        learner = learner_of(config, shape_of(place, size), world, fill_at_random)
        beside(record, f"{name}: peak of loading", peak(), planned["peak_bytes"]["loading"])

    with place.peak() as peak:
        place.wait()
        began = time.perf_counter()
        requests, completions = sample(learner)
        place.wait()
        seconds = time.perf_counter() - began
        expected = planned["seconds"]["prefill"] + planned["seconds"]["decode"]
        record(f"{name}: sampling (planned {expected:.1f})", seconds, "s")
        beside(record, f"{name}: peak of sampling", peak(), planned["peak_bytes"]["sampling"])

    batch = batch_of(requests, completions, world.device)
    for number in ("first", "second"):  # the first compiles
        with place.peak() as peak:
            place.wait()
            began = time.perf_counter()
            adjusted, columns = compute_advantages(learner, batch, step=0)
            update(learner, adjusted, columns, step=0)
            place.wait()
            seconds = time.perf_counter() - began
            expected = planned["seconds"]["update"]
            record(f"{name}: {number} update (planned {expected:.1f})", seconds, "s")
            planned_peak = planned["peak_bytes"]["update"]
            beside(record, f"{name}: peak of the {number} update", peak(), planned_peak)


def beside(record: Record, what: str, found: float | None, planned: float) -> None:
    if found is None:
        record(f"{what} (planned {planned / GB:.1f} GB)", "not measured on a CPU")
    else:
        record(f"{what} (planned {planned / GB:.1f})", found / GB, "GB")


def sample(learner: Learner) -> tuple[list[Request], list[list[Completion]]]:
    config: Config = learner.config
    options = config.model
    with learner.sampling_policy() as policy:
        vocabulary = policy.config.vocab_size
        group_size = config.algo.group_size
        requests = random_requests(vocabulary, [options.max_prompt_tokens], group_size)
        params = SamplingParams(options.max_completion_tokens)
        generation = generate(policy, requests, params, config.sampler.kv_budget_tokens)
    return requests, generation.groups


def batch_of(
    requests: list[Request], groups: list[list[Completion]], device: torch.device
) -> Batch:
    """The completions with one random reward each."""
    rng = np.random.default_rng(0)
    rollouts = []
    for index, (request, group) in enumerate(zip(requests, groups, strict=True)):
        example = Example(id=str(index), task="none", question="", golds=())
        prompt = Prompt(example, text="", ids=np.array(request.prompt_ids))
        rollouts.append([rollout_of(prompt, completion, rng.random()) for completion in group])
    first_open = np.zeros(1, np.int64)
    return make_batch(rollouts, first_open, device)


def rollout_of(prompt: Prompt, completion: Completion, reward: float) -> Rollout:
    return Rollout(
        prompt=prompt,
        completion=completion,
        text="",
        answers=(None,),
        confidences=(None,),
        hits=(0.0,),
        repeated=(False,),
        reason="random tokens",
        components=np.array([reward]),
        segment_ids=np.zeros(len(completion.ids), np.int64),
        total=reward,
    )

"""What a run will need: memory and seconds by part, computed without a GPU and without weights.

All of it holds for the worst case: every prompt and completion as long as the config allows. The
shape of the model comes from a folder's config.json, or SHAPES has it. `experiments/plan` compares
the memory of a training step with FSDP2's own count of it, under fake tensors. Read `plan`, then
upwards.
"""

import json
from math import ceil
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mar.config import AlgoOptions, Config, ModelOptions, run_of_path
from mar.errors import UserError
from mar.files import at_home, read_json_object
from mar.learn.optim import make_optimizer
from mar.policy.critic import Critic
from mar.policy.lora import adapted, trainable_pattern
from mar.policy.model import Decoder, ModelConfig
from mar.policy.sources import EMBEDDED
from mar.run.compose import load_config
from mar.sample.kv_cache import capacity

# ---------------------------------------------------------------------- what is assumed

# An H100 of 80 GB; what is not usable goes to CUDA's context, NCCL and fragments.
GPU_BYTES = 79 * 2**30
USABLE = 0.9

# NVIDIA's data sheet (SXM): dense bfloat16 FLOP/s, and bytes per second of the memory.
PEAK_FLOPS = 989e12
BANDWIDTH = 3.35e12

# The assumed shares of these that matrix products and memory reach.
MFU = 0.4
BANDWIDTH_USED = 0.6

# Bytes of the log-probability kernel's largest block (mar_kernels.triton_logprobs).
LOGIT_BLOCK = 1 << 28

ASSUMED = (
    f"H100 SXM: {PEAK_FLOPS / 1e12:.0f} TFLOP/s at {MFU:.0%}, {BANDWIDTH / 1e12} TB/s at "
    f"{BANDWIDTH_USED:.0%}",
    "every prompt and completion has its largest length",
    "seconds leave out verification, evaluation, communication that does not overlap, the passes "
    "of a critic and a reference, what sampling and offloading move",
)

# (hidden size, intermediate size, layers, heads)
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16),
    "1.7B": (2048, 6144, 28, 16),
    "4B": (2560, 9728, 36, 32),
    "8B": (4096, 12288, 36, 32),
}

# The shapes in config.json at the hub, by hub id.
SHAPES: dict[str, ModelConfig] = {}
for _size, _numbers in QWEN3.items():
    SHAPES[f"Qwen/Qwen3-{_size}"] = ModelConfig(
        "Qwen3ForCausalLM",
        151_936,
        *_numbers,
        num_kv_heads=8,
        head_dim=128,
        qk_norm=True,
        tied_embeddings=_size != "8B",
    )
SHAPES["HuggingFaceTB/SmolLM2-135M-Instruct"] = ModelConfig(
    "LlamaForCausalLM", 49_152, 576, 1536, 30, 9, 3, 64, tied_embeddings=True
)


# ---------------------------------------------------------------------- the model's shape


def model_shape(options: ModelOptions) -> ModelConfig:
    """The shape of the config's model. Raises UserError for a hub id that SHAPES does not have."""
    if options.source == "embedded":
        return ModelConfig.from_hf(read_json_object(EMBEDDED / "config.json"))
    if options.source == "folder":
        folder = at_home(str(options.path))
        return ModelConfig.from_hf(read_json_object(folder / "config.json"))
    if options.source == "run":
        return model_shape(load_config(run_of_path(str(options.path)) / "config.yaml").model)
    if options.path not in SHAPES:
        raise UserError(
            f"model.path={options.path}: shape unknown here; give a folder with its config.json, "
            f"or one of {', '.join(SHAPES)}"
        )
    return SHAPES[options.path]


def empty_model(shape: ModelConfig) -> Decoder:
    """A model without memory (on the meta device)."""
    with torch.device("meta"):
        return Decoder(shape)


def empty_policy(config: Config) -> Decoder:
    """The policy without memory, with its adapters; what is not trained needs no gradient."""
    model = adapted(empty_model(model_shape(config.model)), config.model)
    trainable = trainable_pattern(config.model)
    make_optimizer(model, 0.0, (0.0, 0.0), 0.0, 0.0, trainable)  # freezes the others
    return model


def num_parameters(model: nn.Module, trained: bool = False, shards: int = 1) -> int:
    """The number of parameters, or of those that are trained.

    With `shards`, of one rank's share: FSDP2 cuts axis 0 and pads.
    """
    parameters = [p for p in model.parameters() if p.requires_grad or not trained]
    return sum(ceil(p.shape[0] / shards) * p[0].numel() for p in parameters)


# ---------------------------------------------------------------------- memory


def saved_per_token(shape: ModelConfig) -> int:
    """Numbers that the backward pass of a block keeps of each token.

    x, its norm and qkv; q and k rotated, and before that normed; attention's output; then again x
    and its norm, gate_up, silu(gate), and the product.
    """
    D, wide = shape.hidden_size, shape.intermediate_size
    query = shape.num_heads * shape.head_dim
    key = shape.num_kv_heads * shape.head_dim
    qkv = query + 2 * key
    rotated_and_normed = (1 + shape.qk_norm) * (query + key)
    return 4 * D + qkv + rotated_and_normed + query + 4 * wide


def update_memory(
    model: Decoder,
    tokens: int,
    shards: int,
    checkpointed: bool,
    compute_bytes: int,
    stored_bytes: int = 4,
) -> dict[str, int]:
    """Bytes per GPU, by part, at the worst moment of a training pass over `tokens` packed tokens.

    Computation is in numbers of `compute_bytes`, parameters in numbers of `stored_bytes`.
    `gathered` are whole parameters: the block's at work and the one that is fetched ahead;
    `activations` what the forward pass kept; `backward` what this moment needs; `reduce` gradients
    on their way to the shards. The worst of three moments:

    1. the backward pass of the log-probabilities;
    2. the backward pass of a block;
    3. the reduction of the gradients of what belongs to no block (FSDP's root).
    """
    shape, head = model.config, model.head_weight
    D, V, L = shape.hidden_size, shape.vocab_size, shape.num_layers
    block = num_parameters(model.blocks[0])
    root = num_parameters(model) - num_parameters(model.blocks)
    trained_block = num_parameters(model.blocks[0], trained=True)
    trained_root = num_parameters(model, trained=True) - num_parameters(model.blocks, trained=True)

    hidden = compute_bytes * tokens * D
    wide = compute_bytes * tokens * shape.intermediate_size
    saved = compute_bytes * tokens * saved_per_token(shape)
    if checkpointed:  # the input of each block, and one block computed again
        kept, recomputed = L * hidden, saved - hidden
    else:
        kept, recomputed = L * saved, 0

    # The head's gradient stays from the first moment to the last.
    head_gradient = compute_bytes * head.numel() if head.requires_grad else 0
    # The kernel's block of logits; beside it the hidden states' gradient and a product.
    width = min(V, LOGIT_BLOCK // (compute_bytes * tokens))
    longest_product = max(tokens, width) if head_gradient else tokens
    logits = compute_bytes * tokens * width
    logits_backward = logits + head_gradient + stored_bytes * D * (tokens + longest_product)

    fetched_ahead = 1 if shards > 1 else 0
    of_logprobs = {
        "gathered": compute_bytes * (root + fetched_ahead * block),
        "activations": kept + 2 * hidden,
        "backward": logits_backward,
        "reduce": 0,
    }
    of_a_block = {
        "gathered": compute_bytes * (root + (1 + fetched_ahead) * block),
        "activations": kept + recomputed,
        "backward": hidden + 2 * wide + head_gradient + compute_bytes * trained_block,
        "reduce": stored_bytes * trained_block,
    }
    of_root = {
        "gathered": 0,
        "activations": 0,
        "backward": max(compute_bytes, stored_bytes // shards) * trained_root,
        "reduce": stored_bytes * trained_root,
    }
    worst = max(of_logprobs, of_a_block, of_root, key=lambda moment: sum(moment.values()))
    trained_bytes = stored_bytes * num_parameters(model, trained=True, shards=shards)
    return {
        "weights": stored_bytes * num_parameters(model, shards=shards),
        "gradients": trained_bytes,
        "optimizer": 2 * trained_bytes,
        **worst,
    }


def decode_memory(
    shape: ModelConfig,
    num_rows: int,
    row_tokens: int,
    num_prompts: int,
    prompt_tokens: int,
    group_size: int,
    compute_bytes: int,
) -> int:
    """Bytes that a decode step of the sampler works in.

    Worst is a layer's attention to the prompts, that to the rows' own tokens, or the MLP. Scores are
    in float32, and for a moment there are two of each: before and after they are scaled, or
    normalised. The rows of a prompt stand side by side, `group_size` places for each prompt.

    This is of the plain operators. The Triton kernels keep no scores and need less.
    """
    D, H, d = shape.hidden_size, shape.num_heads, shape.head_dim
    qkv = (H + 2 * shape.num_kv_heads) * d
    precise_bytes = max(compute_bytes, 4)
    places = num_prompts * group_size
    biases = compute_bytes * (num_rows * row_tokens + num_prompts * prompt_tokens)
    # x and its norm, qkv, and q and k rotated
    of_a_row = compute_bytes * num_rows * (2 * D + 2 * qkv)
    mixed = precise_bytes * num_rows * H * d
    queries = compute_bytes * places * H * d
    to_prompts = of_a_row + mixed + queries + 2 * precise_bytes * places * H * prompt_tokens
    to_own = of_a_row + 2 * precise_bytes * num_rows * H * row_tokens
    # x before and after attention and its norm; gate and up, silu(gate), the product
    mlp = compute_bytes * num_rows * (3 * D + 4 * shape.intermediate_size)
    return biases + max(to_prompts, to_own, mlp)


def draw_memory(algo: AlgoOptions, num_rows: int, vocab_size: int) -> int:
    """Bytes that a draw of the sampler works in, for more tokens than `draws.invert` sums in one go.

    Counted in [rows, vocabulary] tensors of float32; an index, and a sum in float64, is two.
    """
    # logits, log-probabilities, probabilities, and these in blocks
    tensors = 4
    if (algo.top_k, algo.top_p, algo.min_p) != (0, 1.0, 0.0):
        # logits, log-probabilities; sorted ones and their order, masses and their sums, masks; kept
        # ones, before and after they are normalised
        tensors = 12
    if algo.temperature != 1:
        # logits before and after the division
        tensors += 1
    return 4 * tensors * num_rows * vocab_size


def memory_beside_policy(
    config: Config, shape: ModelConfig, shards: int, stored_bytes: int
) -> dict[str, int]:
    """Bytes per GPU of the reference's weights, and of the critic's weights and training state.

    A critic has the policy's shape with another head, and is trained whole: its gradients and two
    moments are three times its weights.
    """
    plain = empty_model(shape)
    reference = critic = 0
    if config.algo.kl_coef:
        reference = stored_bytes * num_parameters(plain, shards=shards)
    if config.algo.baseline == "value":
        critic = stored_bytes * num_parameters(Critic(plain), shards=shards)
    return {"reference": reference, "critic": critic, "critic_training": 3 * critic}


def memory_per_gpu(config: Config, model: Decoder) -> dict[str, Any]:
    """Bytes per GPU by part, the peaks of loading, sampling and the update, and the largest group.

    Raises UserError where a group exceeds the KV budget.
    """
    shape, scale = model.config, config.scale
    P, R = config.model.max_prompt_tokens, config.model.max_completion_tokens
    G, kv_budget = config.algo.group_size, config.sampler.kv_budget_tokens
    dtype = getattr(torch, scale.dtype)
    compute_bytes = dtype.itemsize
    tokens = max(P + R, config.train.micro_batch_tokens)
    shards = scale.num_gpus // scale.replicas
    stored_bytes = torch.promote_types(dtype, torch.float32).itemsize
    parts = update_memory(
        model,
        tokens=tokens,
        shards=shards,
        checkpointed=config.train.checkpoint_activations,
        compute_bytes=compute_bytes,
        stored_bytes=stored_bytes,
    )
    beside = memory_beside_policy(config, shape, shards, stored_bytes)
    if config.algo.lag:
        one = stored_bytes * num_parameters(model, trained=True, shards=shards)
        beside["past_weights"] = config.algo.lag * one
    if scale.offload:  # they live in CPU memory
        parts |= {"weights": 0, "gradients": 0, "optimizer": 0}
        beside = dict.fromkeys(beside, 0)
    parts |= beside

    # Loading: the shards of all models, one after another, then the copy for sampling. Past weights
    # (algo.lag) come with the first steps.
    copy = compute_bytes * num_parameters(model)
    loading_peak = parts["weights"] + parts["reference"] + parts["critic"] + copy

    # The update: everything above, and the copy where it is kept.
    update_peak = sum(parts.values()) + (copy if scale.keep_copy else 0)

    # Sampling: what stays resident, the copy, the KV cache, and what a decode step or a draw works
    # in: the pool that their CUDA graphs share.
    training_state = parts["weights"] + parts["gradients"] + parts["optimizer"]
    resident = copy + training_state + sum(beside.values())
    num_prompts = ceil(config.algo.prompts_per_step / scale.num_gpus)
    prompt_slots, row_slots = capacity([P] * num_prompts, [G] * num_prompts, R, kv_budget)
    kv_bytes = compute_bytes * _kv_numbers_per_token(shape)
    kv_cache = kv_bytes * (prompt_slots * P + row_slots * R)
    of_decode_step = decode_memory(
        shape,
        num_rows=row_slots,
        row_tokens=R,
        num_prompts=prompt_slots,
        prompt_tokens=P,
        group_size=G,
        compute_bytes=compute_bytes,
    )
    graph_pool = max(of_decode_step, draw_memory(config.algo, row_slots, shape.vocab_size))
    sampling_peak = resident + kv_cache + graph_pool

    # The largest group: its prompt once and its rows, in what memory or the budget leaves.
    tokens_in_memory = max(0, int(GPU_BYTES * USABLE) - resident - graph_pool) // kv_bytes
    largest_group = max(0, (min(tokens_in_memory, kv_budget) - P) // R)
    return {
        "bytes": parts | {"sampling_copy": copy, "kv_cache": kv_cache, "decode_graphs": graph_pool},
        "peak_bytes": {"loading": loading_peak, "sampling": sampling_peak, "update": update_peak},
        "fits": max(loading_peak, sampling_peak, update_peak) <= GPU_BYTES * USABLE,
        "rows_at_once": row_slots,
        "activations_without_checkpointing": (
            compute_bytes * tokens * shape.num_layers * saved_per_token(shape)
        ),
        "largest_group": largest_group,
        "kv_budget_binds": kv_budget < tokens_in_memory,
    }


def _kv_numbers_per_token(shape: ModelConfig) -> int:
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim


# ---------------------------------------------------------------------- time


def step_seconds(config: Config, model: Decoder, rows_at_once: int) -> dict[str, float]:
    """Seconds of a step by part, by a roofline: each is the slower of arithmetic and memory.

    A forward pass takes 2 FLOPs a parameter and token, its backward pass 4 (2 where the weight is
    frozen); checkpointing is one more forward pass. Attention comes on top.
    """
    work = _Work(config, model)
    flops_per_s, bytes_per_s = PEAK_FLOPS * MFU, BANDWIDTH * BANDWIDTH_USED
    decode_flops, decode_bytes = work.decode_step(rows_at_once)
    slower = max(decode_bytes / bytes_per_s, decode_flops / flops_per_s)
    rounds = ceil(work.num_prompts * work.G / rows_at_once)
    return {
        "prefill": max(work.prefill_flops() / flops_per_s, work.weight_bytes / bytes_per_s),
        "decode": rounds * work.R * slower,
        "update": work.update_flops() / flops_per_s,
    }


class _Work:
    """FLOPs and bytes of one GPU's part of a step: prompts of P tokens, G completions of R tokens."""

    def __init__(self, config: Config, model: Decoder) -> None:
        shape = model.config
        self.config, self.shape = config, shape
        self.P, self.R = config.model.max_prompt_tokens, config.model.max_completion_tokens
        self.G = config.algo.group_size
        self.num_prompts = ceil(config.algo.prompts_per_step / config.scale.num_gpus)
        # Parameters of matrix products: looking up an embedding is none.
        looked_up = 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size
        self.products = num_parameters(model) - looked_up
        self.trained = min(num_parameters(model, trained=True), self.products)
        self.number_bytes = getattr(torch, config.scale.dtype).itemsize
        self.weight_bytes = self.number_bytes * self.products
        self.flops_per_pair = 4 * shape.num_layers * shape.num_heads * shape.head_dim

    def prefill_flops(self) -> float:
        pairs = self.P * self.P / 2
        return self.num_prompts * (2 * self.products * self.P + self.flops_per_pair * pairs)

    def decode_step(self, rows: int) -> tuple[float, float]:
        """(FLOPs, bytes read) of one token for each of `rows` rows, halfway through a completion."""
        own_entries = rows * self.R / 2
        prompt_entries = ceil(rows / self.G) * self.P  # each prompt is read once
        kv_numbers = _kv_numbers_per_token(self.shape) * (own_entries + prompt_entries)
        flops = 2 * self.products * rows + self.flops_per_pair * rows * (self.P + self.R / 2)
        return flops, self.number_bytes * (self.products + kv_numbers)

    def update_flops(self) -> float:
        """All epochs. A group that no micro-batch holds is cut; each part reads the prompt again."""
        P, R, G = self.P, self.R, self.G
        rows_per_part = max(1, (self.config.train.micro_batch_tokens - P) // R)
        num_parts = ceil(G / rows_per_part)
        tokens = num_parts * P + G * R
        pairs = num_parts * P * P / 2 + G * (R * R / 2 + R * P)
        again = 1 if self.config.train.checkpoint_activations else 0
        of_products = (4 + 2 * again) * self.products + 2 * self.trained
        of_attention = (3 + again) * self.flops_per_pair * pairs
        algo = self.config.algo
        flops = algo.epochs * (of_products * tokens + of_attention)
        # Log-probabilities before the first update, in each packing (score_before_updates).
        num_packings = algo.epochs if algo.minibatches > 1 else 1
        if algo.epochs * algo.minibatches > 1:
            flops += num_packings * (2 * self.products * tokens + self.flops_per_pair * pairs)
        return self.num_prompts * flops


# ---------------------------------------------------------------------- the plan


def plan(config: Config) -> dict[str, Any]:
    """The document that the command prints.

    Raises UserError for a scale without GPUs, an unknown shape, and a group above the KV budget.
    """
    num_gpus = config.scale.num_gpus
    if not num_gpus:
        raise UserError(
            f"scale={config.scale.name} has no GPU to plan for: take scale=h100x1 or scale=h100x8"
        )
    model = empty_policy(config)
    memory = memory_per_gpu(config, model)
    seconds = step_seconds(config, model, memory["rows_at_once"])
    step_s = sum(seconds.values())
    return {
        "model": config.model.path or config.model.name,
        "gpus": num_gpus,
        "lora_rank": config.model.lora_rank,
        "parameters": num_parameters(empty_model(model.config)),
        "trained": num_parameters(model, trained=True),
        **memory,
        "seconds": seconds,
        "step_s": step_s,
        "gpu_hours": step_s * config.train.steps * num_gpus / 3600,
        "source": "computed, not measured",
        "assumed": ASSUMED,
    }


def print_plan(document: dict[str, Any], console: Console) -> None:
    """A table and sentences for people; the last line of stdout is the document as JSON."""
    d, GiB = document, 2**30
    title = f"{d['model']} on {d['gpus']} H100, computed, not measured"
    table = Table("per GPU", "GiB", title=title, title_justify="left")
    for name, value in d["bytes"].items():
        table.add_row(name, f"{value / GiB:.2f}")
    for name, value in d["peak_bytes"].items():
        table.add_row(f"peak of {name}", f"{value / GiB:.2f}")
    console.print(table)

    advice = (
        "a lower scale.kv_budget_tokens for sampling; for the update "
        "train.checkpoint_activations=true, fewer micro_batch_tokens, scale.keep_copy=false; for "
        "both model.lora_rank=16 or scale.offload=true"
    )
    verdict = "fits" if d["fits"] else f"DOES NOT FIT: {advice}"
    console.print(verdict, f"in {USABLE:.0%} of {GPU_BYTES >> 30} GiB")
    without = d["activations_without_checkpointing"] / GiB
    limit = "the KV budget" if d["kv_budget_binds"] else "memory"
    console.print(
        f"activations without checkpointing {without:.2f} GiB; largest group "
        f"{d['largest_group']}, by {limit}"
    )
    times = ", ".join(f"{name} {value:.1f} s" for name, value in d["seconds"].items())
    console.print(
        f"{d['parameters']:,} parameters, {d['trained']:,} trained; a step {d['step_s']:.1f} s "
        f"({times}); {d['gpu_hours']:.0f} GPU-hours"
    )
    console.print(f"assumed: {'; '.join(ASSUMED)}")
    print(json.dumps(document))

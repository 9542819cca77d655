"""What a run will need, before a GPU is rented:  python -m mar.plan +experiment=paper scale=h100x8

Computed, not measured, without a GPU and without weights, for the worst case: every prompt and completion as long as the config allows. The shape
comes from a folder's config.json, or SHAPES has it. `experiments/plan` holds the memory of a training step against FSDP2's own, under fake tensors.
The last line of stdout is one JSON document.
"""

import json
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mar.config import Config, ModelOptions
from mar.errors import UserError
from mar.learn.optim import make_optimizer
from mar.policy.model import Decoder, ModelConfig
from mar.policy.sources import EMBEDDED
from mar.policy.weights import read_json_object
from mar.run.setup import adapted
from mar.sample.kv_cache import capacity

GPU_BYTES, USABLE = (
    79 * 2**30,
    0.9,
)  # an H100 of 80 GB; the rest goes to CUDA's context, NCCL and fragments

PEAK_FLOPS, BANDWIDTH = (
    989e12,
    3.35e12,
)  # dense bfloat16, bytes per second (NVIDIA's data sheet, SXM)

MFU, BANDWIDTH_USED = 0.4, 0.6  # assumed, of matrix products and of memory

LOGIT_BLOCK = (
    1 << 28
)  # bytes of the log-probability kernel's largest block (mar_kernels.triton_logprobs)

ASSUMED = (
    f"H100 SXM: {PEAK_FLOPS / 1e12:.0f} TFLOP/s at {MFU:.0%}, {BANDWIDTH / 1e12} TB/s at {BANDWIDTH_USED:.0%}",
    "every prompt and completion has its largest length",
    "not counted: verification, evaluation, communication that does not overlap, a critic, a reference, what sampling and offloading move",
)

QWEN3 = {
    "0.6B": (1024, 3072, 28, 16),
    "1.7B": (2048, 6144, 28, 16),
    "4B": (2560, 9728, 36, 32),
    "8B": (4096, 12288, 36, 32),
}

SHAPES = {  # of config.json at the hub
    f"Qwen/Qwen3-{name}": ModelConfig(
        "Qwen3ForCausalLM", 151_936, *sizes, 8, 128, qk_norm=True, tied_embeddings=name != "8B"
    )
    for name, sizes in QWEN3.items()
} | {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ModelConfig(
        "LlamaForCausalLM", 49_152, 576, 1536, 30, 9, 3, 64, tied_embeddings=True
    )
}


def shape_of(model: ModelOptions) -> ModelConfig:
    """UserError for a hub id whose shape is not known here."""
    if model.source in ("embedded", "folder"):
        folder = EMBEDDED if model.source == "embedded" else Path(str(model.path)).expanduser()
        return ModelConfig.from_hf(read_json_object(folder / "config.json"))
    if model.path not in SHAPES:
        raise UserError(
            f"model.path={model.path}: shape unknown here; give a folder with its config.json, or one of {', '.join(SHAPES)}"
        )
    return SHAPES[model.path]


def policy_of(config: Config) -> Decoder:
    """The policy without memory (meta device), with its adapters; what is not trained needs no gradient."""
    with torch.device("meta"):
        model = Decoder(shape_of(config.model))
    trainable = config.model.trainable or ("lora_" if config.model.lora_rank else "")
    make_optimizer(adapted(model, config.model), 0.0, (0.0, 0.0), 0.0, 0.0, trainable)
    return model


def count(model: nn.Module, trained: bool = False, shards: int = 1) -> int:
    """Parameters, or those that are trained; of a rank's shard (FSDP2 cuts axis 0 and pads)."""
    chosen = [p for p in model.parameters() if p.requires_grad or not trained]
    return sum(ceil(p.shape[0] / shards) * p[0].numel() for p in chosen)


def saved_per_token(c: ModelConfig) -> int:
    """Elements that a block's backward keeps of each token: x, its norm, qkv; the rotated q and k, before them the normed; attention's output; x, its
    norm, gate_up, silu(gate) and the product."""
    query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return (
        4 * c.hidden_size
        + (query + 2 * key)
        + (1 + c.qk_norm) * (query + key)
        + query
        + 4 * c.intermediate_size
    )


def update_memory(
    model: Decoder, tokens: int, shards: int, checkpointed: bool, compute: int, stored: int = 4
) -> dict[str, int]:
    """Bytes per GPU, by part, at the worst of three moments of a pass over `tokens` packed tokens, in numbers of `compute` bytes with parameters of
    `stored` bytes: the log-probabilities' backward, a block's, and that of what belongs to no block (FSDP's root) when its gradients are reduced.
    `gathered` are whole parameters, the block's and the one fetched ahead; `reduce` holds gradients on their way to the shards."""
    c, V, head = model.config, model.config.vocab_size, model.head_weight
    block, root = count(model.blocks[0]), count(model) - count(model.blocks)
    of_block, of_root = count(model.blocks[0], True), count(model, True) - count(model.blocks, True)
    x, wide, saved = (
        compute * tokens * n for n in (c.hidden_size, c.intermediate_size, saved_per_token(c))
    )
    kept, recomputed = (c.num_layers * x, saved - x) if checkpointed else (c.num_layers * saved, 0)
    of_head = (
        compute * head.numel() if head.requires_grad else 0
    )  # from the first moment to the last
    width = min(
        V, LOGIT_BLOCK // (compute * tokens)
    )  # of the kernel's block, beside the hidden states' gradient and a product
    logits = (
        compute * tokens * width
        + of_head
        + stored * c.hidden_size * (tokens + (max(tokens, width) if of_head else tokens))
    )
    ahead = 2 if shards > 1 else 1
    moments = (
        (compute * (root + (ahead - 1) * block), kept + 2 * x, logits, 0),
        (
            compute * (root + ahead * block),
            kept + recomputed,
            x + 2 * wide + of_head + compute * of_block,
            stored * of_block,
        ),
        (0, 0, max(compute, stored // shards) * of_root, stored * of_root),
    )
    trained = stored * count(model, True, shards)
    resident = {
        "weights": stored * count(model, shards=shards),
        "gradients": trained,
        "optimizer": 2 * trained,
    }
    return resident | dict(
        zip(("gathered", "activations", "backward", "reduce"), max(moments, key=sum), strict=True)
    )


def memory(config: Config, model: Decoder) -> dict[str, Any]:
    """Bytes per GPU by part, the peaks of sampling and of the update, and the largest group. Raises UserError where a group exceeds the KV budget."""
    c, m, budget = model.config, config.model, config.sampler.kv_budget_tokens
    P, R, G = m.max_prompt_tokens, m.max_completion_tokens, config.algo.group_size
    dtype, tokens = getattr(torch, config.scale.dtype), max(P + R, config.train.micro_batch_tokens)
    compute, stored = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    shards, prompts = (
        config.scale.num_gpus // config.scale.replicas,
        ceil(config.algo.prompts_per_step / config.scale.num_gpus),
    )
    parts = update_memory(
        model, tokens, shards, config.train.checkpoint_activations, compute, stored
    )
    if config.scale.offload:  # in CPU memory
        parts |= dict.fromkeys(("weights", "gradients", "optimizer"), 0)
    with torch.device("meta"):
        copy = compute * count(Decoder(c))
    resident, update = (
        copy + parts["weights"] + parts["gradients"] + parts["optimizer"],
        copy * config.scale.keep_copy + sum(parts.values()),
    )
    num_prompts, rows = capacity([P] * prompts, [G] * prompts, R, budget)
    per_token = 2 * compute * c.num_layers * c.num_kv_heads * c.head_dim
    room = max(0, int(GPU_BYTES * USABLE) - resident) // per_token
    parts |= {"sampling_copy": copy, "kv_cache": per_token * (num_prompts * P + rows * R)}
    peaks = {"sampling": resident + parts["kv_cache"], "update": update}
    out = {
        "bytes": parts,
        "peak_bytes": peaks,
        "fits": max(peaks.values()) <= GPU_BYTES * USABLE,
        "rows_at_once": rows,
    }
    out["activations_without_checkpointing"] = compute * tokens * c.num_layers * saved_per_token(c)
    return {
        **out,
        "largest_group": max(0, (min(room, budget) - P) // R),
        "kv_budget_binds": budget < room,
    }


def seconds(config: Config, model: Decoder, rows_at_once: int) -> dict[str, float]:
    """A step's parts by a roofline: prefill and decoding are the slower of arithmetic and memory; training is 6 FLOPs per parameter and token
    (4 where the weight is frozen, a forward pass of 2 more with checkpointing) and attention; each part of a group reads its prompt."""
    c, m, t = model.config, config.model, config.train
    P, R, G = m.max_prompt_tokens, m.max_completion_tokens, config.algo.group_size
    prompts = ceil(config.algo.prompts_per_step / config.scale.num_gpus)
    products = count(model) - (
        0 if c.tied_embeddings else c.vocab_size * c.hidden_size
    )  # looking up is none
    size, trained = getattr(torch, config.scale.dtype).itemsize, min(count(model, True), products)
    rate, speed = PEAK_FLOPS * MFU, BANDWIDTH * BANDWIDTH_USED
    attended = 4 * c.num_layers * c.num_heads * c.head_dim  # FLOPs per pair of tokens
    entries = (
        rows_at_once * R / 2 + ceil(rows_at_once / G) * P
    )  # that a decode step reads, each prompt once
    bytes_read = size * (products + 2 * c.num_layers * c.num_kv_heads * c.head_dim * entries)
    work = 2 * products * rows_at_once + attended * rows_at_once * (P + R / 2)
    parts = ceil(G / max(1, (t.micro_batch_tokens - P) // R))  # of a group, in micro-batches
    tokens, pairs = parts * P + G * R, parts * P * P / 2 + G * (R * R / 2 + R * P)
    again = 1 if t.checkpoint_activations else 0
    update = (
        config.algo.epochs
        * prompts
        * (((4 + 2 * again) * products + 2 * trained) * tokens + (3 + again) * attended * pairs)
    )
    prefill = prompts * (2 * products * P + attended * P * P / 2)
    decode = ceil(prompts * G / rows_at_once) * R * max(bytes_read / speed, work / rate)
    return {
        "prefill": max(prefill / rate, size * products / speed),
        "decode": decode,
        "update": update / rate,
    }


def plan(config: Config) -> dict[str, Any]:
    """The document that the command prints. Raises UserError for a scale without GPUs, an unknown shape, and a group above the KV budget."""
    m, gpus = config.model, config.scale.num_gpus
    if not gpus:
        raise UserError(
            f"scale={config.scale.name} has no GPU to plan for: take scale=h100x1 or scale=h100x8"
        )
    model = policy_of(config)
    held = memory(config, model)
    times = seconds(config, model, held["rows_at_once"])
    step, trained = sum(times.values()), count(model, True)
    with torch.device("meta"):
        shape = {
            "model": m.path or m.name,
            "gpus": gpus,
            "lora_rank": m.lora_rank,
            "parameters": count(Decoder(model.config)),
        }
    time = {"seconds": times, "step_s": step, "gpu_hours": step * config.train.steps * gpus / 3600}
    return {
        **shape,
        "trained": trained,
        **held,
        **time,
        "source": "computed, not measured",
        "assumed": ASSUMED,
    }


def show(document: dict[str, Any], console: Console) -> None:
    d, GiB = document, 2**30
    table = Table(
        "per GPU",
        "GiB",
        title=f"{d['model']} on {d['gpus']} H100, computed, not measured",
        title_justify="left",
    )
    for name, value in {
        **d["bytes"],
        **{f"peak of {name}": value for name, value in d["peak_bytes"].items()},
    }.items():
        table.add_row(name, f"{value / GiB:.2f}")
    console.print(table)
    advice = "a lower scale.kv_budget_tokens for sampling; for the update train.checkpoint_activations=true, fewer micro_batch_tokens, "
    advice += "scale.keep_copy=false; for both model.lora_rank=16 or scale.offload=true"
    console.print(
        "fits" if d["fits"] else f"DOES NOT FIT: {advice}",
        f"in {USABLE:.0%} of {GPU_BYTES >> 30} GiB",
    )
    without, limit = (
        d["activations_without_checkpointing"] / GiB,
        "the KV budget" if d["kv_budget_binds"] else "memory",
    )
    console.print(
        f"activations without checkpointing {without:.2f} GiB; largest group {d['largest_group']}, by {limit}"
    )
    times = ", ".join(f"{name} {value:.1f} s" for name, value in d["seconds"].items())
    console.print(
        f"{d['parameters']:,} parameters, {d['trained']:,} trained; a step {d['step_s']:.1f} s ({times}); {d['gpu_hours']:.0f} GPU-hours"
    )
    console.print(f"assumed: {'; '.join(ASSUMED)}")
    print(json.dumps(document))

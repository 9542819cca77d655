"""What a run will need, before a GPU is rented:  python -m mar.plan +experiment=paper scale=h100x8 train.checkpoint_activations=true

Computed, not measured, without a GPU and without weights, for the worst case: every prompt and completion as long as model.max_prompt_tokens and
max_completion_tokens allow. The shape comes from a folder's config.json, or SHAPES has it. `experiments/plan` holds the memory of a training step
against FSDP2's own, under fake tensors. Ends with one JSON document on stdout.
"""

import json
import sys
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mar.cache import capacity
from mar.compose import compose
from mar.config import Config, ModelOptions
from mar.fetch import EMBEDDED
from mar.job import adapted
from mar.model import Decoder, ModelConfig
from mar.optim import make_optimizer
from mar.records import UserError
from mar.weights import read_json

GPU_BYTES, USABLE = 79 * 2**30, 0.9  # an H100 of 80 GB; the rest goes to CUDA's context, NCCL and fragments
PEAK_FLOPS, BANDWIDTH = 989e12, 3.35e12  # dense bfloat16, bytes per second (NVIDIA's data sheet, SXM)
MFU, BANDWIDTH_USED = 0.4, 0.6  # assumed, of matrix products and of memory
LOGIT_BLOCK = 1 << 28  # bytes of the log-probability kernel's largest block (mar_kernels.triton_logprobs)
ASSUMED = (
    f"H100 SXM: {PEAK_FLOPS / 1e12:.0f} TFLOP/s at {MFU:.0%}, {BANDWIDTH / 1e12} TB/s at {BANDWIDTH_USED:.0%}",
    "every prompt and completion has its largest length",
    "not counted: verification, evaluation, communication that does not overlap, a critic, a reference model",
)


def _qwen3(size: int, wide: int, layers: int, heads: int, tied: bool) -> ModelConfig:
    return ModelConfig("Qwen3ForCausalLM", 151_936, size, wide, layers, heads, 8, 128, qk_norm=True, tied_embeddings=tied)


SHAPES = {  # of config.json at the hub
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ModelConfig("LlamaForCausalLM", 49_152, 576, 1536, 30, 9, 3, 64, tied_embeddings=True),
}


def shape_of(model: ModelOptions) -> ModelConfig:
    """UserError for a hub id whose shape is not known here."""
    if model.source in ("embedded", "folder"):
        folder = EMBEDDED if model.source == "embedded" else Path(str(model.path)).expanduser()
        return ModelConfig.from_hf(read_json(folder / "config.json"))
    if model.path not in SHAPES:
        raise UserError(
            f"model.path={model.path}: its shape is not known here; give a folder with its config.json, or one of {', '.join(SHAPES)}"
        )
    return SHAPES[model.path]


def policy_of(config: Config) -> Decoder:
    """The policy without memory (meta device), with its adapters; what is not trained needs no gradient."""
    with torch.device("meta"):
        model = Decoder(shape_of(config.model))
    m, o = config.model, config.optim
    make_optimizer(
        adapted(model, m), o.lr, (o.betas[0], o.betas[1]), o.eps, o.weight_decay, m.trainable or ("lora_" if m.lora_rank else "")
    )
    return model


def count(model: nn.Module, trained: bool = False, shards: int = 1) -> int:
    """Parameters, or those that are trained; of a rank's shard (FSDP2 cuts axis 0 and pads)."""
    chosen = [p for p in model.parameters() if p.requires_grad or not trained]
    return sum(ceil(p.shape[0] / shards) * p[0].numel() for p in chosen)


def saved_per_token(c: ModelConfig) -> int:
    """Elements that a block's backward keeps of each token: x, its norm, qkv; the normed and the rotated q and k; attention's output; x, its norm,
    gate_up, silu(gate) and the product."""
    query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return 4 * c.hidden_size + (query + 2 * key) + 2 * (query + key) + query + 4 * c.intermediate_size


def update_memory(model: Decoder, tokens: int, shards: int, checkpointed: bool, compute: int, stored: int = 4) -> dict[str, int]:
    """Bytes per GPU of a pass over `tokens` packed tokens in numbers of `compute` bytes, parameters of `stored` bytes. `gathered`: whole layers that
    FSDP holds (the root's, this block and the next); `head`: what log-probabilities and their gradient hold; `reduce`: gradients before they
    are scattered, which the root's are when nothing else is left."""
    c, blocks = model.config, model.blocks
    root, block = count(model) - count(blocks), count(blocks[0])
    root_trained = count(model, True) - count(blocks, True)
    kept = c.num_layers * c.hidden_size + saved_per_token(c) if checkpointed else c.num_layers * saved_per_token(c)
    head = LOGIT_BLOCK + tokens * c.hidden_size * (2 * compute + 2 * stored)  # after the norm, those that predict; wide, and their gradient
    head += stored * model.head_weight.numel() if model.head_weight.requires_grad else 0
    trained = stored * count(model, True, shards)
    parts = {"weights": stored * count(model, shards=shards), "gradients": trained, "optimizer": 2 * trained, "head": head}
    parts |= {"gathered": compute * (root + 2 * block), "activations": compute * tokens * kept}
    return parts | {"reduce": (compute + stored) * root_trained}


def memory(config: Config, model: Decoder) -> dict[str, Any]:
    """Bytes per GPU by part, the peak of sampling and of the update, and the largest group. Raises UserError where a group exceeds the KV budget."""
    c, m, gpus = model.config, config.model, config.scale.num_gpus
    P, R, G = m.max_prompt_tokens, m.max_completion_tokens, config.algo.group_size
    dtype = getattr(torch, config.scale.dtype)
    sizes = (dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize)
    tokens = max(P + R, config.train.micro_batch_tokens)
    shards, prompts = gpus // config.scale.replicas, ceil(config.algo.prompts_per_step / gpus)
    parts = update_memory(model, tokens, shards, config.train.checkpoint_activations, *sizes)
    num_prompts, rows = capacity([P] * prompts, [G] * prompts, R, config.sampler.kv_budget_tokens)
    per_token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * sizes[0]
    with torch.device("meta"):
        copy = sizes[0] * count(Decoder(c))
    parts |= {"sampling_copy": copy, "kv_cache": per_token * (num_prompts * P + rows * R)}
    resident = sum(parts[name] for name in ("weights", "gradients", "optimizer", "sampling_copy"))
    backward = parts["gathered"] + max(parts["activations"] + parts["head"], parts["reduce"])
    peaks = {"sampling": resident + parts["kv_cache"], "update": resident + max(backward, parts["gradients"])}  # AdamW's temporaries
    room = max(0, int(GPU_BYTES * USABLE) - resident) // per_token
    largest = max(0, (min(room, config.sampler.kv_budget_tokens) - P) // R)
    out = {"bytes": parts, "peak_bytes": peaks, "fits": max(peaks.values()) <= GPU_BYTES * USABLE, "rows_at_once": rows}
    out["activations_without_checkpointing"] = sizes[0] * tokens * c.num_layers * saved_per_token(c)
    return {**out, "largest_group": largest, "kv_budget_binds": config.sampler.kv_budget_tokens < room}


def seconds(config: Config, model: Decoder, rows_at_once: int) -> dict[str, float]:
    """A step's parts by a roofline: prefill and decoding are the slower of arithmetic and memory; training is 6 FLOPs per parameter and token
    (4 where the weight is frozen, a forward pass of 2 more with checkpointing) and attention."""
    c, m, gpus = model.config, config.model, config.scale.num_gpus
    P, R, G, prompts = m.max_prompt_tokens, m.max_completion_tokens, config.algo.group_size, ceil(config.algo.prompts_per_step / gpus)
    products = count(model) - (0 if c.tied_embeddings else c.vocab_size * c.hidden_size)  # looking up is none
    trained = min(count(model, True), products)
    size, rows = getattr(torch, config.scale.dtype).itemsize, prompts * G
    rate, speed = PEAK_FLOPS * MFU, BANDWIDTH * BANDWIDTH_USED
    attended = 4 * c.num_layers * c.num_heads * c.head_dim  # FLOPs per pair of tokens
    pairs = prompts * (P * P / 2 + G * (R * R / 2 + R * P))
    entries = min(rows_at_once, rows) * R / 2 + ceil(rows_at_once / G) * P  # that a decode step reads, each prompt once
    bytes_read = size * (products + 2 * c.num_layers * c.num_kv_heads * c.head_dim * entries)
    work = 2 * products * rows_at_once + attended * rows_at_once * (P + R / 2)
    again, passes = 1 if config.train.checkpoint_activations else 0, config.algo.epochs
    update = passes * ((4 + 2 * again) * products + 2 * trained) * prompts * (P + G * R) + passes * (3 + again) * attended * pairs
    prefill = prompts * (2 * products * P + attended * P * P / 2)
    decode = ceil(rows / rows_at_once) * R * max(bytes_read / speed, work / rate)
    return {"prefill": max(prefill / rate, size * products / speed), "decode": decode, "update": update / rate}


def plan(config: Config) -> dict[str, Any]:
    """The document that the command prints. Raises UserError for a scale without GPUs, an unknown shape, and a group above the KV budget."""
    if not config.scale.num_gpus:
        raise UserError(f"scale={config.scale.name} has no GPU to plan for: take scale=h100x1 or scale=h100x8")
    model = policy_of(config)
    held = memory(config, model)
    times = seconds(config, model, held["rows_at_once"])
    step = sum(times.values())
    hours = step * config.train.steps * config.scale.num_gpus / 3600
    shape = {"model": config.model.path or config.model.name, "gpus": config.scale.num_gpus, "lora_rank": config.model.lora_rank}
    with torch.device("meta"):
        shape |= {"parameters": count(Decoder(model.config)), "trained": count(model, True)}
    return {**shape, **held, "seconds": times, "step_s": step, "gpu_hours": hours, "source": "computed, not measured", "assumed": ASSUMED}


def show(document: dict[str, Any], console: Console) -> None:
    table = Table("per GPU", "GiB", title=f"{document['model']} on {document['gpus']} H100, computed, not measured", title_justify="left")
    peaks = {f"peak of {name}": value for name, value in document["peak_bytes"].items()}
    for name, value in {**document["bytes"], **peaks}.items():
        table.add_row(name, f"{value / 2**30:.2f}")
    console.print(table)
    advice = "try train.checkpoint_activations=true, fewer train.micro_batch_tokens, or model.lora_rank=16"
    without, limit = document["activations_without_checkpointing"] / 2**30, "the KV budget" if document["kv_budget_binds"] else "memory"
    console.print("fits" if document["fits"] else f"DOES NOT FIT: {advice}", f"in {USABLE:.0%} of {GPU_BYTES >> 30} GiB")
    console.print(f"activations without checkpointing {without:.2f} GiB; largest group {document['largest_group']}, by {limit}")
    console.print(f"{document['parameters']:,} parameters, {document['trained']:,} trained")
    times = ", ".join(f"{name} {value:.1f} s" for name, value in document["seconds"].items())
    console.print(f"a step {document['step_s']:.1f} s ({times}); {document['gpu_hours']:.0f} GPU-hours; assumed: {'; '.join(ASSUMED)}")


def main(words: Sequence[str]) -> int:
    try:
        document = plan(compose(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(document, Console(highlight=False))
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

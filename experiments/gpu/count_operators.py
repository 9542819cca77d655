"""How many kernels a decode step and a draw start on CUDA, counted without a GPU.

    PYTHONPATH=.:kernels python experiments/gpu/count_operators.py

Each operator that computes (no view) counts as one kernel. The step takes CUDA's way through the
code: attention in plain operators, RMSNorm as one (PyTorch has a kernel for it there), logsumexp as
nine. Types are float32, so that no cast of the CPU's counts. A replayed graph starts as many
kernels, but the host issues the graph alone.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.sampler import CountOps
from mar.policy.model import Decoder, ModelConfig
from mar.sample import kv_cache
from mar.sample.draws import SamplingParams, stream_key
from mar.sample.engine import Engine, Request

QWEN3 = ModelConfig("Qwen3ForCausalLM", 97, 32, 48, 2, 4, 2, 8, qk_norm=True, tied_embeddings=True)
LLAMA = ModelConfig("LlamaForCausalLM", 97, 32, 48, 2, 4, 2, 8, tied_embeddings=True)
PLENTY = 10**6

# Operators that are another number of kernels on CUDA than a CPU's dispatcher sees. ATen composes
# logsumexp of amax, abs, eq, masked_fill, sub, exp, sum, log and add.
ON_CUDA = {torch.ops.aten.rms_norm.default: 1, torch.ops.aten.logsumexp.default: 9}


class CountKernels(CountOps):
    """CountOps, with the kernels that operators are on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ON_CUDA:
            self.computing += ON_CUDA[func]
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def kernels_of(work: Callable[[], None]) -> int:
    with CountKernels() as counter:
        work()
    return counter.computing


@torch.inference_mode()
def count(shape: ModelConfig, num_layers: int) -> tuple[int, int]:
    """Kernels of one decode step, and of one draw, of a decoder with so many layers."""
    torch.manual_seed(0)
    model = Decoder(replace(shape, num_layers=num_layers))
    keys = tuple(stream_key("count", row) for row in range(4))
    request = Request((1, 2, 3, 4, 5), keys)
    with patch.object(kv_cache, "_mix_cpu", kv_cache._mix):
        engine = Engine(model, [request, request], SamplingParams(8), PLENTY)
        engine.admit()
        drawn = kernels_of(engine.draw)
        fed = kernels_of(engine.feed)
    return fed, drawn


def main() -> None:
    for name, shape in (("Llama", LLAMA), ("Qwen3", QWEN3)):
        few, drawn = count(shape, 2)
        more, _ = count(shape, 3)
        a_layer = more - few
        beside = few - 2 * a_layer
        print(f"{name}: {a_layer} a layer, {beside} beside the layers, {drawn} in the draw")


if __name__ == "__main__":
    main()

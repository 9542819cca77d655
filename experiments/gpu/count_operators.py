"""How many kernels a decode step and a draw start on CUDA, counted without a GPU.

    PYTHONPATH=.:kernels python experiments/gpu/count_operators.py

Each operator that computes (no view, no empty tensor) counts as one kernel, and so does each launch
of a Triton kernel, which is not run. The step takes CUDA's way through the code: RMSNorm is one
(PyTorch has a kernel for it there), logsumexp nine; attention, norm and rotation of queries and
keys in Triton, and in plain operators as where there is no Triton. Types are float32, so that no
cast of the CPU's counts. A replayed graph starts as many kernels, but the host issues the graph
alone.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mar_kernels
from experiments.bench.sampler import CountOps
from mar.policy.model import Decoder, ModelConfig
from mar.sample import engine, kv_cache
from mar.sample.draws import SamplingParams, stream_key
from mar.sample.engine import Engine, Request

QWEN3 = ModelConfig("Qwen3ForCausalLM", 97, 32, 48, 2, 4, 2, 8, qk_norm=True, tied_embeddings=True)
LLAMA = ModelConfig("LlamaForCausalLM", 97, 32, 48, 2, 4, 2, 8, tied_embeddings=True)
PLENTY = 10**6

# a context in which decode steps go some way through the code
Way = Callable[[], Any]

# Operators that are another number of kernels on CUDA than a CPU's dispatcher sees. ATen composes
# logsumexp of amax, abs, eq, masked_fill, sub, exp, sum, log and add.
ON_CUDA = {
    torch.ops.aten.rms_norm.default: 1,
    torch.ops.aten.logsumexp.default: 9,
    torch.ops.aten.empty.memory_format: 0,
}

# the Triton kernels of a decode step
TRITON = ("prompt_kernel", "own_kernel", "rotate_kernel")


class CountKernels(CountOps):
    """CountOps, with the kernels that operators are on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ON_CUDA:
            self.computing += ON_CUDA[func]
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class NotRun:
    """Stands in for a Triton kernel: counts its launches and keeps their arguments."""

    def __init__(self, name: str, launches: Counter[str], arguments: list[Any]) -> None:
        self.name = name
        self.launches = launches
        self.arguments = arguments

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, **constants: Any) -> None:
        self.launches[self.name] += 1
        self.arguments += [*arguments, *constants.values()]


@contextmanager
def in_triton() -> Iterator[tuple[Counter[str], list[Any]]]:
    """Decode steps take their Triton kernels, which do not run: their results are whatever lies in
    the memory. Gives the launches by name, and all that the kernels were called with.
    """
    from mar_kernels import triton_decode

    launches: Counter[str] = Counter()
    arguments: list[Any] = []
    with ExitStack() as patches:
        patches.enter_context(patch.object(mar_kernels, "_problem", lambda *_: None))
        patches.enter_context(patch.object(engine, "BACKEND", "triton"))
        for name in TRITON:
            kernel = NotRun(name, launches, arguments)
            patches.enter_context(patch.object(triton_decode, name, kernel))
        yield launches, arguments


@contextmanager
def in_operators() -> Iterator[tuple[Counter[str], list[Any]]]:
    """Decode steps take the plain operators that a GPU without Triton takes."""
    with patch.object(kv_cache, "_mix_cpu", kv_cache._mix):
        yield Counter(), []


def kernels_of(work: Callable[[], None], launches: Counter[str]) -> int:
    before = launches.total()
    with CountKernels() as counter:
        work()
    return counter.computing + launches.total() - before


@torch.inference_mode()
def count(shape: ModelConfig, num_layers: int, way: Way) -> tuple[int, int]:
    """Kernels of one decode step, and of one draw, of a decoder with so many layers."""
    torch.manual_seed(0)
    model = Decoder(replace(shape, num_layers=num_layers))
    keys = tuple(stream_key("count", row) for row in range(4))
    request = Request((1, 2, 3, 4, 5), keys)
    with way() as (launches, _):
        running = Engine(model, [request, request], SamplingParams(8), PLENTY)
        running.admit()
        drawn = kernels_of(running.draw, launches)
        with model.for_sampling(engine.BACKEND):
            fed = kernels_of(running.feed, launches)
    return fed, drawn


def main() -> None:
    for name, shape in (("Llama", LLAMA), ("Qwen3", QWEN3)):
        for way in (in_operators, in_triton):
            few, drawn = count(shape, 2, way)
            more, _ = count(shape, 3, way)
            a_layer = more - few
            beside = few - 2 * a_layer
            found = f"{a_layer} a layer, {beside} beside the layers, {drawn} in the draw"
            print(f"{name}, {way.__name__.replace('_', ' ')}: {found}")


if __name__ == "__main__":
    main()

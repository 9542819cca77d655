"""Memory of mar's own FSDP2 step without memory: fake tensors, a fake process group, and PyTorch's
FSDPMemTracker, against mar.plan.

    python experiments/plan/fake_step.py [--model Qwen/Qwen3-8B] [--ranks 8] [--tokens 16384] [--lora-rank 16] [--no-checkpointing] [--cpu-paths]

Runs mar.policy.distributed.shard, the decoder over packed groups, the log-probabilities, backward
and AdamW, with gradients and optimizer state of an earlier step already there. Fake tensors of a
CPU take the CPU's paths; two of them hold other things than a GPU's and make way for it: norms hold
what CUDA's fused kernel does (their input and one number a row), and log-probabilities are the
Triton module's own code, whose kernels are not launched, so that it needs triton. `--cpu-paths`
leaves both as they are. Attention pads and repeats keys for a while where FlexAttention does not.
The last line of stdout is one JSON document.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mar_kernels
from mar.config import ModelOptions, ScaleOptions
from mar.learn.optim import make_optimizer
from mar.policy.distributed import World, shard
from mar.policy.lora import adapted, trainable_pattern
from mar.policy.model import Decoder, ModelConfig
from mar.policy.packing import PackedGroups, pack_groups
from mar.run.planning import SHAPES, update_memory
from mar_kernels import triton_logprobs

ROWS = 8  # of the one group; its prompt has a quarter of the tokens
RESIDENT = {"weights": "Sharded Param", "gradients": "Sharded Grad", "optimizer": "OptState"}


class Peaks(FSDPMemTracker):
    """The tracker, with a peak for each phase and no statistics per module: those take most of its
    time.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.phases: dict[str, dict[str, int]] = {}

    def _update_peak_stats(self, peak_state: Any) -> None:
        phase = (
            "optimizer" if self._in_opt else "backward" if self._mod_tracker.is_bw else "forward"
        )
        for held in self._curr_mem_snap.values():
            if phase not in self.phases or held["Total"] > self.phases[phase]["Total"]:
                self.phases[phase] = {
                    str(getattr(kind, "value", kind)): int(size) for kind, size in held.items()
                }


class _FusedNorm(torch.autograd.Function):
    """What F.rms_norm holds on CUDA. Nothing is computed: a fake tensor has no values."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


class _NoKernel:
    """A Triton kernel that is launched and does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **constants: None


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    def norm(
        x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        return _FusedNorm.apply(x, weight)

    launches: dict[str, Any] = {
        "sums_kernel": _NoKernel(),
        "grads_kernel": _NoKernel(),
        "tiles_for": lambda x, weight: triton_logprobs.TILES[x.dtype, 90],
    }
    with (
        mock.patch.object(F, "rms_norm", norm),
        mock.patch.object(mar_kernels, "linear_logprobs", triton_logprobs.linear_logprobs),
        mock.patch.multiple(triton_logprobs, **launches),
    ):
        yield


def packed(tokens: int) -> PackedGroups:
    prompt = tokens // 4
    return pack_groups([[0] * prompt], [[[0] * ((tokens - prompt) // ROWS + 1)] * ROWS])


def tracked(
    shape: ModelConfig, ranks: int, tokens: int, lora_rank: int, checkpointed: bool, dtype: str
) -> dict[str, dict[str, int]]:
    """Phase -> bytes of rank 0 at its peak, by the tracker's kinds."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with FakeTensorMode() as mode:
        options = ModelOptions(name="fake", source="hub", lr=1e-6, lora_rank=lora_rank)
        model = adapted(Decoder(shape), options)
        model.checkpoint_blocks = checkpointed
    shard(
        model, World(0, ranks), ScaleOptions(name="fake", dtype=dtype)
    )  # a device mesh reads real ranks; its parameters stay fake
    with mode:
        trainable = trainable_pattern(options)
        optimizer = make_optimizer(model, 1e-6, (0.9, 0.999), 1e-8, 0.0, trainable)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        tracker, batch = Peaks(model, optimizer), packed(tokens)
        tracker.track_inputs((batch.ids, batch.positions, batch.predict_from, batch.targets))
        with tracker:
            logprobs, *_ = model(batch)
            logprobs.sum().backward()
            optimizer.step()
    dist.destroy_process_group()
    return tracker.phases


def fake_step(
    shape: ModelConfig,
    ranks: int,
    tokens: int,
    lora_rank: int,
    checkpointed: bool,
    cpu_paths: bool = False,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Bytes of rank 0 by mar.plan's parts: at the tracked peak, and planned.

    `pass` is all that is neither resident nor gathered parameters.
    """
    with nullcontext() if cpu_paths else as_on_a_gpu():
        phases = tracked(shape, ranks, tokens, lora_rank, checkpointed, dtype)
    peak = max(phases.values(), key=lambda held: held["Total"])
    said = {part: peak[kind] for part, kind in RESIDENT.items()} | {
        "gathered": peak["Unsharded Param"] + peak["All Gather"]
    }
    said |= {"pass": peak["Total"] - sum(said.values()), "total": peak["Total"]}
    with torch.device("meta"):
        model = Decoder(shape)
    options = ModelOptions(name="fake", source="hub", lr=1e-6, lora_rank=lora_rank)
    model = adapted(model, options)
    make_optimizer(model, 1e-6, (0.9, 0.999), 1e-8, 0.0, trainable_pattern(options))
    size = getattr(torch, dtype).itemsize
    parts = update_memory(model, tokens, ranks, checkpointed, size, max(4, size))
    planned = {part: parts[part] for part in (*RESIDENT, "gathered")} | {
        "total": sum(parts.values())
    }
    planned["pass"] = sum(parts[part] for part in ("activations", "backward", "reduce"))
    return {"tracked": said, "planned": planned, "phases": phases}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen/Qwen3-8B", choices=SHAPES)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--cpu-paths", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    document = fake_step(
        SHAPES[args.model],
        args.ranks,
        args.tokens,
        args.lora_rank,
        not args.no_checkpointing,
        args.cpu_paths,
    )
    for side, parts in {
        "tracked": document["tracked"],
        "planned": document["planned"],
        **document["phases"],
    }.items():
        print(
            f"{side:9} GiB:",
            ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items()),
        )
    print(json.dumps({**vars(args), **document, "wall_s": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
    main()

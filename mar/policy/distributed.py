"""Several processes, one run, started by torchrun: FSDP2 shards the policy, all else is the same on every rank.

A rank samples and verifies the groups of its own prompts. Rollouts are then gathered, so that every rank holds the whole step and computes the same
advantages, denominators and metrics from it: no statistic is ever reduced. Micro-batches are dealt out in turn, and FSDP adds up their gradients.
"""

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, zip_longest
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from mar.config import ScaleOptions
from mar.errors import UserError
from mar.policy.lora import merged
from mar.policy.model import Block, Decoder

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)  # the longest that a rank may sample or verify while others wait


@dataclass(frozen=True)
class World:
    """Which process this is of how many, and where it computes."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    files: Any = (
        None  # the group in which checkpoints are written, while the ranks train in their own
    )

    @property
    def leads(self) -> bool:
        """Rank 0 writes and speaks."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """This rank's part of any list that all ranks hold."""
        return slice(self.rank, None, self.size)

    def gather(self, mine: list[T]) -> list[T]:
        """The list of which `mine` is this rank's share, on every rank."""
        if self.size == 1:
            return mine
        parts: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, mine)
        missing: Any = object()
        return [
            item
            for item in chain.from_iterable(zip_longest(*parts, fillvalue=missing))
            if item is not missing
        ]

    def told(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank."""
        if self.size == 1:
            return decide()
        decided = [decide() if self.leads else None]
        dist.broadcast_object_list(decided, src=0)
        return cast(T, decided[0])

    def deal(self, items: Sequence[T]) -> list[tuple[T, float]]:
        """This rank's share with a factor for its loss: the number of ranks, by which FSDP divides, or 0 for what fills up the last round, since
        every rank has to make the same number of passes."""
        rounds = -(-len(items) // self.size)
        places = range(self.rank, rounds * self.size, self.size)
        return [(items[i], float(self.size)) if i < len(items) else (items[0], 0.0) for i in places]

    def reduce(self, values: Sequence[float], largest: bool = False) -> list[float]:
        """Sums over the ranks, or the largest of each."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return total.tolist()

    def wait(self, group: Any = None) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier(group=group)


ALONE = World()


def join(device: str, scale: ScaleOptions) -> World:
    """The world of this process, by torchrun's environment. Raises UserError where the machine is another than `scale` says."""
    size, rank, local = (
        int(os.environ.get(name, n))
        for name, n in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if scale.num_gpus > 1 and size == 1:
        command = f"torchrun --nproc-per-node {scale.num_gpus} -m mar.train ..."
        raise UserError(
            f"scale={scale.name} is a machine of {scale.num_gpus} GPUs: start it by `{command}`"
        )
    if size % scale.replicas:
        raise UserError(f"scale.replicas={scale.replicas} does not divide the {size} processes")
    if scale.dtype == "bfloat16" and not gpu:
        raise UserError(
            "scale.dtype=bfloat16 is for GPUs, a CPU is slower in it: take scale.dtype=float32"
        )
    where = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(where)
    if size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=TIMEOUT)
        atexit.register(
            dist.destroy_process_group
        )  # else its threads may abort a process that has done its work
    elif gpu:  # one process is sharded over itself: that keeps float32 parameters beside computation in bfloat16
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    return World(
        rank, size, where, dist.new_group(timeout=TIMEOUT, backend="gloo") if size > 1 else None
    )


def shard(model: nn.Module, world: World, scale: ScaleOptions) -> None:
    """FSDP2 in place: every block, then the root with embedding, last norm and head. Computes in `scale.dtype`, keeps, updates and reduces in the
    parameters' own; `scale.replicas` copies of a sharded model (HSDP)."""
    mesh = init_device_mesh(
        world.device.type,
        (scale.replicas, world.size // scale.replicas),
        mesh_dim_names=("replicate", "shard"),
    )
    mesh = mesh["shard"] if scale.replicas == 1 else mesh
    own = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, scale.dtype), reduce_dtype=own)
    place = (
        CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        if scale.offload
        else OffloadPolicy()
    )
    for part in (*(module for module in model.modules() if isinstance(module, Block)), model):
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=place)


@torch.no_grad()
def gather_weights(model: Decoder, whole: Decoder) -> None:
    """Copy a sharded model's parameters into an unsharded one without adapters, tensor by tensor, in the dtype of the latter."""
    target = dict(whole.named_parameters())
    for p in (p for p in target.values() if not p.untyped_storage().size()):  # freed
        p.untyped_storage().resize_(p.numel() * p.element_size())
    for name, value in merged(model):
        target[name].copy_(value)

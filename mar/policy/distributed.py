"""Several processes, one run, started by torchrun: FSDP2 shards the policy, all else is the same on
every rank.

A rank samples and verifies the groups of its own prompts. Rollouts are then gathered, so that every
rank holds the whole step and computes the same advantages, denominators and metrics from it: no
statistic is ever reduced. Micro-batches are dealt out in turn, and FSDP adds up their gradients.
"""

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from mar.config import ScaleOptions
from mar.errors import UserError
from mar.policy.critic import Critic
from mar.policy.model import Block, Decoder

T = TypeVar("T")

# the longest that a rank may sample or verify while others wait
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """Which process this is of how many, and where it computes."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    # the group in which checkpoints are written while the ranks train in their own
    checkpoint_group: Any = None
    # among the processes of this machine
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Rank 0 writes files and prints."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """This rank's part of a list that all ranks hold: every `size`-th item."""
        return slice(self.rank, None, self.size)

    def gather(self, mine: list[T]) -> list[T]:
        """The list of which `mine` is this rank's share, on every rank."""
        if self.size == 1:
            return mine
        shares: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(shares, mine)
        num_items = sum(len(share) for share in shares)
        return [shares[i % self.size][i // self.size] for i in range(num_items)]

    def told(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank."""
        if self.size == 1:
            return decide()
        decided = [decide() if self.leads else None]
        dist.broadcast_object_list(decided, src=0)
        return cast(T, decided[0])

    def found_here(self, find: Callable[[], T]) -> T:
        """What the first rank of each machine finds on it, on all ranks of that machine."""
        if self.size == 1:
            return find()
        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, find() if self.local_rank == 0 else None)
        return cast(T, found[self.rank - self.local_rank])

    def deal(self, items: Sequence[T]) -> list[tuple[T, float]]:
        """This rank's share, each item with a factor for its loss.

        The factor is the number of ranks, by which FSDP divides. Every rank has to make the same
        number of passes, so the first item fills up the last round, with a factor of 0.
        """
        hand: list[tuple[T, float]] = []
        for first in range(0, len(items), self.size):
            index = first + self.rank
            if index < len(items):
                hand.append((items[index], float(self.size)))
            else:
                hand.append((items[0], 0.0))
        return hand

    def reduce(self, values: Sequence[float], largest: bool = False) -> list[float]:
        """Each value's sum over the ranks, or its largest."""
        if self.size == 1:
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        dist.all_reduce(reduced, operation)
        return reduced.tolist()

    def wait(self, group: Any = None) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier(group=group)


ALONE = World()


def compute_device(device: str, local_rank: int = 0) -> torch.device:
    """Where to compute: `cpu`, `cuda`, or `auto`, which is a GPU where there is one.

    Raises UserError for cuda without a GPU.
    """
    if device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    if device == "cuda":
        raise UserError("device=cuda and PyTorch sees no GPU here: take device=cpu or device=auto")
    return torch.device("cpu")


def join(device: str, scale: ScaleOptions) -> World:
    """The world of this process, by torchrun's environment variables.

    Raises UserError where the machine is another than `scale` says.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    own_device = compute_device(device, local_rank)
    gpu = own_device.type == "cuda"
    if scale.num_gpus and not gpu:
        why = "device=cpu leaves it unused" if device == "cpu" else "PyTorch sees none here"
        raise UserError(
            f"scale={scale.name} wants {scale.num_gpus} GPU(s), its model is chosen for them, and "
            f"{why}: leave it out, or start this where they are"
        )
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
    backend = "gloo"
    if gpu:
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(own_device)
    checkpoint_group = None
    joined = dist.is_initialized()  # by an earlier job of a sweep
    if size > 1:
        if not joined:
            dist.init_process_group(backend, timeout=TIMEOUT)
            # else its threads may abort a process that has done its work
            atexit.register(dist.destroy_process_group)
        checkpoint_group = dist.new_group(timeout=TIMEOUT, backend="gloo")
    elif gpu and not joined:
        # FSDP of one process keeps float32 parameters beside computation in bfloat16
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(rank, size, own_device, checkpoint_group, local_rank)


def shard(model: nn.Module, world: World, scale: ScaleOptions) -> None:
    """FSDP2 in place: every block, then the root with embedding, last norm and head.

    It computes in `scale.dtype`; parameters are kept, updated and reduced in their own dtype. There
    are `scale.replicas` copies of the sharded model (HSDP).
    """
    mesh = init_device_mesh(
        world.device.type,
        (scale.replicas, world.size // scale.replicas),
        mesh_dim_names=("replicate", "shard"),
    )
    if scale.replicas == 1:
        mesh = mesh["shard"]
    stored_dtype = next(model.parameters()).dtype
    precision = MixedPrecisionPolicy(
        param_dtype=getattr(torch, scale.dtype), reduce_dtype=stored_dtype
    )
    offload = OffloadPolicy()
    if scale.offload:
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    if isinstance(model, Critic):
        # values are not rounded to the computation's dtype
        precise = MixedPrecisionPolicy(param_dtype=stored_dtype, reduce_dtype=stored_dtype)
        fully_shard(model.value, mesh=mesh, mp_policy=precise, offload_policy=offload)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=offload)


def reshard(model: nn.Module) -> None:
    """Free the parameters that a pass without gradients has left whole.

    FSDP2 keeps those of its root (embedding, last norm and head) for a backward pass, which here
    does not come. A model that is not sharded stays as it is.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def gather_weights(policy: Decoder, sampling_copy: Decoder) -> None:
    """Copy a sharded policy's parameters into an unsharded decoder with the same adapters.

    Tensor by tensor, in the dtype of the copy. Parameters of the copy that were freed get their
    memory back. Adapters stay apart: merged into a bfloat16 weight, most of what they add would be
    less than half a unit in its last place and be rounded away.
    """
    copies = dict(sampling_copy.named_parameters())
    for parameter in copies.values():
        storage = parameter.untyped_storage()
        if storage.size() == 0:
            storage.resize_(parameter.numel() * parameter.element_size())
    for name, parameter in policy.named_parameters():
        copies[name].copy_(_whole(parameter))


def _whole(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    return parameter

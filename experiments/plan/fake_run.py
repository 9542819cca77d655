"""The peaks of loading and of the update that mar.plan gives for whole settings, against FSDP2's own
count: PyTorch's memory trackers on fake tensors, without memory.

    python experiments/plan/fake_run.py [--words scale=h100x8 ...] [--layers 2] [default grpo ...]

A setting is +experiment=paper scale=h100x8 with the words of SETTINGS. mar.run.setup.build_learner
lays out, shards and fills its policy, reference, critic and sampling copy as rank 0 of a fake
process group (the weights themselves are not read), while `MemTracker` counts. Then the policy and
the critic make a training step each (fake_step.py says what stands for a GPU there), while
`FSDPMemTracker` counts; what the others hold meanwhile is added. With all layers and without
--words it replaces the settings' rows in settings.json, of which `make report` makes README's
table. The last line of stdout is one JSON document.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.common.tables import markdown_table
from experiments.plan.fake_step import RESIDENT, Peaks, as_on_a_gpu, packed
from mar.config import Config
from mar.learn.learner import Learner
from mar.policy.distributed import World
from mar.policy.model import ModelConfig
from mar.run import planning, setup
from mar.run.compose import compose

RESULTS = Path(__file__).with_name("settings.json")
GIB = 2**30
BASE = ["+experiment=paper", "scale=h100x8"]
SETTINGS: dict[str, list[str]] = {
    "default": [],
    "grpo": ["algo=grpo", "algo.kl_coef=0.04"],
    "ppo": ["algo=ppo", "algo.kl_coef=0.04"],
    "LoRA": ["model.lora_rank=16"],
    "offload": ["scale.offload=true"],
}


@contextmanager
def in_fake_memory(shape: ModelConfig, mode: FakeTensorMode, tracker: MemTracker) -> Iterator[None]:
    """build_learner's models get fake memory, which the tracker counts, and no weights."""
    real_to_empty = nn.Module.to_empty

    def to_empty(model: nn.Module, **options: Any) -> nn.Module:
        with mode, tracker:
            return real_to_empty(model, **options)

    with (
        mock.patch.object(nn.Module, "to_empty", to_empty),
        mock.patch.object(setup, "read_config", lambda folder, num_tokens: shape),
        mock.patch.object(setup, "load_into", lambda *args: None),
        mock.patch.object(setup, "start_adapters", lambda model: None),
    ):
        yield


def num_bytes(tensors: list[Tensor]) -> int:
    """Of this rank's part of each tensor."""
    held = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum(x.numel() * x.element_size() for x in held)


def resident(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of a model's parameters, and of its gradients and moments where it is trained."""
    tensors: list[Tensor] = list(model.parameters())
    if optimizer is not None:
        tensors += [p.grad for p in model.parameters() if p.grad is not None]
        for state in optimizer.state.values():
            tensors += [x for x in state.values() if isinstance(x, Tensor)]
    return num_bytes(tensors)


def step_peak(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: int, offload: bool
) -> int:
    """Bytes on the GPU at the worst moment of a training step, without what others hold."""
    batch = packed(tokens)
    tracker = Peaks(model, optimizer)
    tracker.track_inputs((batch.ids, batch.positions, batch.predict_from, batch.targets))
    with tracker:
        out = model(batch)
        scored = out[0] if isinstance(out, tuple) else out
        scored.sum().backward()
        optimizer.step()
    peaks = []
    for held in tracker.phases.values():
        in_cpu_memory = sum(held[kind] for kind in RESIDENT.values()) if offload else 0
        peaks.append(held["Total"] - in_cpu_memory)
    return max(peaks)


def build(config: Config, shape: ModelConfig, mode: FakeTensorMode) -> tuple[Learner, int]:
    """The learner of a setting, and the peak of building it."""
    tracker = MemTracker()
    world = World(0, config.scale.num_gpus)
    with in_fake_memory(shape, mode, tracker):
        learner = setup.build_learner(config, Path("fake"), world)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    if config.scale.offload:
        models = (learner.policy, learner.reference, learner.critic)
        peak -= sum(resident(model, None) for model in models if model is not None)
    return learner, peak


def count(config: Config, shape: ModelConfig) -> dict[str, int]:
    """FSDP2's count of the peaks of loading and of the update, in bytes."""
    offload = config.scale.offload
    tokens = max(
        config.model.max_prompt_tokens + config.model.max_completion_tokens,
        config.train.micro_batch_tokens,
    )
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # those on the meta device
    learner, loading = build(config, shape, mode)
    trained: list[tuple[nn.Module, torch.optim.Optimizer]] = [(learner.policy, learner.optimizer)]
    if learner.critic is not None and learner.critic_optimizer is not None:
        trained.append((learner.critic, learner.critic_optimizer))
    peaks = []
    with mode, as_on_a_gpu():
        for model, optimizer in trained:
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            optimizer.step()
        for model, optimizer in trained:
            beside = 0
            if not offload:
                beside += sum(resident(m, o) for m, o in trained if m is not model)
                if learner.reference is not None:
                    beside += resident(learner.reference, None)
            if config.scale.keep_copy and learner.sampling_copy is not None:
                beside += resident(learner.sampling_copy, None)
            peaks.append(beside + step_peak(model, optimizer, tokens, offload))
    return {"loading": loading, "update": max(peaks)}


def compare(words: list[str], num_layers: int | None = None) -> dict[str, dict[str, int]]:
    """Loading and update: tracked and planned bytes of a setting.

    `num_layers`: of a model with so many layers instead of its own.
    """
    config = compose([*BASE, *words])
    shape = planning.model_shape(config.model)
    if num_layers is not None:
        shape = replace(shape, num_layers=num_layers)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.scale.num_gpus)
    try:
        tracked = count(config, shape)
    finally:
        dist.destroy_process_group()
    with mock.patch.object(planning, "model_shape", lambda options: shape):
        planned = planning.memory_per_gpu(config, planning.empty_policy(config))["peak_bytes"]
    return {moment: {"tracked": tracked[moment], "planned": planned[moment]} for moment in tracked}


def markdown() -> str:
    """README's table of the settings."""
    return table(json.loads(RESULTS.read_text(encoding="utf-8")))


def table(found: dict[str, dict[str, dict[str, int]]]) -> str:
    """GiB tracked / planned at each peak, and by how much the plan is off."""
    rows = []
    for name, moments in found.items():
        cells = [name]
        for moment in ("loading", "update"):
            tracked, planned = moments[moment]["tracked"], moments[moment]["planned"]
            cells.append(f"{tracked / GIB:.2f} / {planned / GIB:.2f}")
            cells.append(f"{planned / tracked - 1:+.1%}")
        rows.append(cells)
    return markdown_table(["setting", "loading", "off by", "update", "off by"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", default=list(SETTINGS), help=", ".join(SETTINGS))
    parser.add_argument("--words", nargs="*", default=[], help="further words of the config")
    parser.add_argument("--layers", type=int, help="of the model, instead of its own")
    args = parser.parse_args()
    unknown = set(args.settings) - set(SETTINGS)
    if unknown:
        parser.error(f"unknown setting {', '.join(sorted(unknown))}: choose of {list(SETTINGS)}")
    found = {}
    for name in args.settings:
        found[name] = compare([*SETTINGS[name], *args.words], args.layers)
        print(table({name: found[name]}).splitlines()[-1], flush=True)
    if args.layers is None and not args.words:
        kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        kept |= found
        ordered = {name: kept[name] for name in SETTINGS if name in kept}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

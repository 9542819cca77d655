"""The group forward and backward pass on the device against the CPU, and how often it compiles."""

import copy

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from experiments.gpu.measuring import Place, Record
from mar.policy.model import Decoder, ModelConfig
from mar.policy.packing import PackedGroups, pack_groups

SHAPE = ModelConfig(
    "Qwen3ForCausalLM", 211, 256, 512, 2, 8, 2, 64, qk_norm=True, tied_embeddings=True
)
# Lengths of the prompts, and of the completions of each: packings of other sizes, in this order.
PACKINGS = (
    ((130, 7, 64), (40, 3, 17)),
    ((300,), (150, 151, 1, 80)),
    ((129, 128, 127, 33), (16, 64)),
    ((1,), (1,)),
    ((700, 20), (256,) * 6),
)

# An error may be so many times that of the CPU in the same type, or this much.
TIMES = 3
LEAST = 1e-6
COMPARED = ("log-probabilities", "gradients")


def measure(place: Place, record: Record) -> None:
    torch.manual_seed(0)
    original = Decoder(SHAPE).double()
    packings = PACKINGS[:2] if place.tiny else PACKINGS
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        on_cpu = copy.deepcopy(original).to(dtype)
        on_device = copy.deepcopy(on_cpu).to(place.device)
        # What is compared is how a pass rounds, not how the weights do.
        exact = copy.deepcopy(on_cpu).double()
        for index, packing in enumerate(packings):
            wanted = forward_and_backward(exact, *packing)
            expected = errors(forward_and_backward(on_cpu, *packing), wanted)
            found = errors(forward_and_backward(on_device, *packing), wanted)
            for what, error, of_cpu in zip(COMPARED, found, expected, strict=True):
                limit = max(TIMES * of_cpu, LEAST)
                record(f"{name}, packing {index}: error of {what}", error, at_most=limit)
            if index == 0:
                first = num_compilations()
        record(f"{name}: compilations in the first pass", first)
        record(f"{name}: compilations after it", num_compilations() - first, at_most=2)


def num_compilations() -> int:
    return int(counters["stats"]["unique_graphs"])


def errors(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The largest error of a log-probability, in nats; that of all gradients, relative."""
    values = (got[0] - want[0]).abs().max().item()
    return values, ((got[1] - want[1]).norm() / want[1].norm()).item()


def forward_and_backward(
    model: Decoder, prompts: tuple[int, ...], completions: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M], and the gradients of the parameters in one row."""
    model.zero_grad()
    logprobs, entropy, _ = model(packed_ids(model, prompts, completions))
    (logprobs.sum() + entropy.sum()).backward()
    gradients = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        gradients.append(parameter.grad.flatten().double().cpu())
    return logprobs.detach().double().cpu(), torch.cat(gradients)


def packed_ids(
    model: Decoder, prompts: tuple[int, ...], completions: tuple[int, ...]
) -> PackedGroups:
    rng = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return rng.integers(0, SHAPE.vocab_size, length).tolist()

    device = model.head_weight.device
    groups = [[ids(length) for length in completions] for _ in prompts]
    return pack_groups([ids(length) for length in prompts], groups, device)

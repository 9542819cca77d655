"""The operations that are worth a kernel. `reference.py` is their specification, in plain PyTorch, and what a CPU runs.

`backend` of a call is `reference`, `triton` (a RuntimeError says why where that cannot be) or `auto`: Triton for tensors on an NVIDIA GPU, Ampere or
newer, where the package is installed and has a kernel for their type. Nothing but the call decides; triton is imported when it is first needed.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import reference

__all__ = ["answer_advantages", "linear_logprobs", "selected_logprobs"]


def _problem(module: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why the kernels of a module cannot take these tensors."""
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    known = (torch.float32, torch.float64 if module == "triton_advantages" else torch.bfloat16)
    if len(kinds := {x.dtype for x in tensors}) > 1 or kinds.isdisjoint(known):
        return f"takes tensors all of {known[0]} or all of {known[1]}, not of {' and '.join(sorted(map(str, kinds)))}"
    if all(x.is_cuda for x in tensors):
        ampere = torch.version.hip is None and torch.cuda.get_device_capability(
            tensors[0].device
        ) >= (8, 0)
        return None if ampere else "needs an NVIDIA GPU of compute capability 8.0 or newer"
    interpreted = import_module("triton").knobs.runtime.interpret
    return (
        None
        if interpreted
        else "needs tensors on a GPU, or TRITON_INTERPRET=1 before Python starts"
    )


def _choose(module: str, backend: str, *tensors: Tensor) -> ModuleType:
    """The reference or one of the Triton modules."""
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"unknown backend {backend!r}; known: auto, reference, triton")
    if backend == "reference" or (backend == "auto" and not tensors[0].is_cuda):
        return reference
    problem = _problem(module, tensors)
    if problem and backend == "triton":
        raise RuntimeError(f"backend=triton {problem}")
    return reference if problem else import_module(f".{module}", __name__)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of `targets`, entropy and log-sum-exp of softmax(hidden @ weight.T / temperature): see reference.linear_logprobs."""
    ops = _choose("triton_logprobs", backend, hidden, weight)
    return ops.linear_logprobs(hidden, weight, targets, temperature)


def selected_logprobs(logits: Tensor, targets: Tensor, *, backend: str = "auto") -> Tensor:
    """log_softmax(logits [N, V]) at targets [N] -> [N]: see reference.selected_logprobs."""
    return _choose("triton_logprobs", backend, logits).selected_logprobs(logits, targets)


def answer_advantages(
    components: Tensor,
    weights: Tensor,
    first_open: Tensor,
    segment_ids: Tensor,
    groups: Tensor,
    credit: str = "to_go",
    baseline: str = "leave_one_out",
    scale: str = "none",
    *,
    backend: str = "auto",
) -> Tensor:
    """One advantage per token [B, T] from the components [B, C] of each completion: see reference.answer_advantages."""
    ops = _choose("triton_advantages", backend, components, weights)
    return ops.answer_advantages(
        components, weights, first_open, segment_ids, groups, credit, baseline, scale
    )

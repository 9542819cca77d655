"""The operations that are worth a kernel, and one dispatch.

`reference.py` is their specification in plain PyTorch and what a CPU runs; read it first. The
`triton_*.py` are their kernels for NVIDIA GPUs.

`backend` of a call is `reference`, `triton` (a RuntimeError says why where that cannot be) or
`auto`: Triton for tensors on an NVIDIA GPU, Ampere or newer, where the package is installed and has
a kernel for their type. Nothing but the call decides; triton is imported when it is first needed.
"""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .reference import LayerCache

__all__ = [
    "LayerCache",
    "answer_advantages",
    "decode_attention",
    "has_kernels",
    "linear_logprobs",
    "rotated_heads",
    "selected_logprobs",
]

# module -> the types of tensors that its kernels take, one at a time
DTYPES = {
    "triton_logprobs": (torch.float32, torch.bfloat16),
    "triton_advantages": (torch.float32, torch.float64),
    "triton_decode": (torch.float32, torch.bfloat16),
}


# tokens of a prompt that one program of the decode kernels goes through
DECODE_SPAN = 512


def _problem(module: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why the kernels of a module cannot take these tensors, None where they can."""
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    dtypes = {x.dtype for x in tensors}
    first, second = DTYPES[module]
    if len(dtypes) > 1 or dtypes.isdisjoint(DTYPES[module]):
        found = " and ".join(sorted(str(dtype) for dtype in dtypes))
        return f"takes tensors all of {first} or all of {second}, not of {found}"
    if not all(x.is_cuda for x in tensors):
        if import_module("triton").knobs.runtime.interpret:
            return None
        return "needs tensors on a GPU, or TRITON_INTERPRET=1 before Python starts"
    is_nvidia = torch.version.hip is None
    if not is_nvidia or torch.cuda.get_device_capability(tensors[0].device) < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None


def _choose(module: str, backend: str, *tensors: Tensor) -> ModuleType:
    """The reference or one of the Triton modules."""
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"unknown backend {backend!r}; known: auto, reference, triton")
    if backend == "reference":
        return reference
    if backend == "auto" and not tensors[0].is_cuda:
        return reference
    problem = _problem(module, tensors)
    if problem is None:
        return import_module(f".{module}", __name__)
    if backend == "triton":
        raise RuntimeError(f"backend=triton {problem}")
    return reference


def has_kernels(module: str, backend: str, *tensors: Tensor) -> bool:
    """Whether calls with this backend take the Triton kernels of a module for these tensors.

    For who has a way of its own beside them. RuntimeError says why `triton` cannot be.
    """
    return _choose(module, backend, *tensors) is not reference


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of `targets`, entropy and log-sum-exp, without the logits in memory.

    See reference.linear_logprobs.
    """
    ops = _choose("triton_logprobs", backend, hidden, weight)
    return ops.linear_logprobs(hidden, weight, targets, temperature)


def selected_logprobs(logits: Tensor, targets: Tensor, *, backend: str = "auto") -> Tensor:
    """log_softmax(logits [M, V]) at targets [M] -> [M]: see reference.selected_logprobs."""
    return _choose("triton_logprobs", backend, logits).selected_logprobs(logits, targets)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, *, backend: str = "auto"
) -> Tensor:
    """Attention of one new token per row to its prompt and its own tokens; k and v are stored.

    See reference.decode_attention.
    """
    ops = _choose("triton_decode", backend, q, k, v, *cache[:4])
    return ops.decode_attention(q, k, v, cache)


def rotated_heads(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_queries: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Queries and keys [N, H + KV, d] with their norm, if there is one, and rotary positions.

    See reference.rotated_heads.
    """
    weights = [x for x in (q_weight, k_weight) if x is not None]
    ops = _choose("triton_decode", backend, heads, cos, sin, *weights)
    return ops.rotated_heads(heads, cos, sin, num_queries, q_weight, k_weight, eps)


# what the Triton kernel of the advantages computes; everything else runs in the reference
KERNEL_CREDITS = ("to_go", "set", "own")
KERNEL_BASELINES = ("leave_one_out", "mean", "none")
KERNEL_SCALES = ("none", "group_std", "batch_std")


@cache
def _kernel_has(credit: str, baseline: str, scale: str, token_costs: bool) -> bool:
    """Whether the kernel has these rules. Says so, once, where it does not and there is a GPU."""
    known = credit in KERNEL_CREDITS and baseline in KERNEL_BASELINES and scale in KERNEL_SCALES
    known = known and not token_costs
    if not known and torch.cuda.is_available():
        costs = ", costs of tokens" if token_costs else ""
        warnings.warn(
            f"no kernel for credit={credit}, baseline={baseline}, scale={scale}{costs}: "
            "the advantages run in plain PyTorch",
            stacklevel=3,
        )
    return known


def answer_advantages(
    components: Tensor,
    weights: Tensor,
    first_open: Tensor,
    segment_ids: Tensor,
    group_ids: Tensor,
    credit: str = "to_go",
    baseline: str = "leave_one_out",
    scale: str = "none",
    token_costs: Tensor | None = None,
    confidence_components: Tensor | None = None,
    confidence_segments: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One advantage per token [B, T] from the components [B, C] of each completion.

    See reference.answer_advantages. A rule that the kernel does not have runs in the reference.
    """
    if backend == "auto" and not _kernel_has(credit, baseline, scale, token_costs is not None):
        backend = "reference"
    ops = _choose("triton_advantages", backend, components, weights)
    arguments = (
        components,
        weights,
        first_open,
        segment_ids,
        group_ids,
        credit,
        baseline,
        scale,
        token_costs,
    )
    if ops is reference:
        # no rule of the kernel asks which are of confidences
        return ops.answer_advantages(*arguments, confidence_components, confidence_segments)
    return ops.answer_advantages(*arguments)

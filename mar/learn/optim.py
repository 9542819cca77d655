"""Optimizers and their learning-rate schedule."""

import math
import re

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mar.config import OptimOptions
from mar.errors import UserError
from mar.policy.model import Decoder

SCHEDULES = ("linear", "cosine", "constant")


def make_optimizer(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    trainable: str = "",
) -> torch.optim.AdamW:
    """AdamW of the parameters in whose names the regular expression `trainable` is found.

    The others are frozen. Norms and biases are not decayed. Raises UserError where none is found.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(trainable, name) is not None)
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not chosen:
        some_names = [name for name, _ in model.named_parameters()][:3]
        raise UserError(
            f"model.trainable={trainable!r} is found in no parameter's name; "
            f"they are {', '.join(some_names)}, ..."
        )
    matrices = [parameter for parameter in chosen if parameter.ndim >= 2]
    vectors = [parameter for parameter in chosen if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # A checkpoint would lose the settings of an empty group.
    not_empty = [group for group in groups if group["params"]]
    return torch.optim.AdamW(not_empty, lr=lr, betas=betas, eps=eps)


def learning_rate(step: int, num_steps: int, lr: float, warmup_frac: float, schedule: str) -> float:
    """The rate of update `step` (from 0) of `num_steps`: linear warm-up over the first fraction,
    then the schedule down to 0."""
    num_warmup = max(1, round(warmup_frac * num_steps))
    if step < num_warmup:
        return lr * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    if schedule == "linear":
        return lr * (1 - done)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "constant":
        return lr
    raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their joint norm is at most `max_norm`; returns what it was."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.item()


def require_finite(norm: float, step: int, remedy: str) -> None:
    """Raises UserError before a supervised step (from 1) that would spoil the weights."""
    if not math.isfinite(norm):
        raise UserError(f"the gradient of step {step} is not finite, it was not taken: {remedy}")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon), in float32.

    torch.optim.Muon computes in bfloat16, which a CPU does far slower. From scratch it needs fewer
    steps than AdamW to learn which finding speaks for what.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                direction = _orthogonalised(p.grad.lerp(momentum, group["momentum"]))
                tall = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.add_(direction, alpha=-group["lr"] * tall)


def _orthogonalised(x: Tensor) -> Tensor:
    """Five Newton-Schulz iterations towards U V^T, where x = U S V^T."""
    x = x / (x.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.T if is_tall else x


def make_optimizers(
    model: Decoder, lr: float, options: OptimOptions, trainable: str, muon: bool
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak rates: AdamW as `make_optimizer` makes it, or Muon for the matrices
    inside the blocks, at ten times the rate, and AdamW for the rest.

    Raises UserError where Muon has nothing to train.
    """
    betas = (options.betas[0], options.betas[1])
    adamw = make_optimizer(model, lr, betas, options.eps, options.weight_decay, trainable)
    if not muon:
        return [(adamw, lr)]
    inside = [p for p in model.blocks.parameters() if p.ndim == 2 and p.requires_grad]
    if not inside:
        raise UserError(
            f"sft.muon=true is for matrices inside the blocks and model.trainable={trainable!r} "
            "trains none of them: leave sft.muon out"
        )
    inside_ids = {id(parameter) for parameter in inside}
    for group in adamw.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in inside_ids]
    return [(adamw, lr), (Muon(inside, lr=10 * lr), 10 * lr)]

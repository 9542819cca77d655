"""The optimizer and its learning-rate schedule."""

import math
import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor

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
    """AdamW of the parameters in whose names the regular expression `trainable` is found; the others are frozen. Norms and biases are not
    decayed. Raises UserError where it finds none."""
    for name, p in model.named_parameters():
        p.requires_grad_(re.search(trainable, name) is not None)
    chosen = [p for p in model.parameters() if p.requires_grad]
    if not chosen:
        names = ", ".join([name for name, _ in model.named_parameters()][:3])
        raise UserError(
            f"model.trainable={trainable!r} is found in no parameter's name; they are {names}, ..."
        )
    matrices, vectors = ([p for p in chosen if (p.ndim >= 2) == wide] for wide in (True, False))
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # a checkpoint would lose the settings of an empty group
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps
    )


def learning_rate(step: int, num_steps: int, lr: float, warmup_frac: float, schedule: str) -> float:
    """The rate of update `step` (from 0) of `num_steps`: linear warm-up over the first fraction, then the schedule down to 0."""
    warmup = max(1, round(warmup_frac * num_steps))
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    if schedule == "linear":
        return lr * (1 - done)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "constant":
        return lr
    raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


def clip_gradients(model: nn.Module, most: float) -> float:
    """Scale all gradients so that their joint norm is at most `most`; returns what it was."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon), in float32: torch.optim.Muon
    computes in bfloat16, which a CPU does far slower. From scratch it needs fewer steps than AdamW to learn which finding speaks for what."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"])
                x = x / (x.norm() + 1e-7)
                x = x.T if (tall := x.shape[0] > x.shape[1]) else x
                for _ in range(5):
                    square = x @ x.T
                    x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
                p.add_(
                    x.T if tall else x,
                    alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5,
                )


def make_optimizers(
    model: Decoder, lr: float, muon: bool
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak rates: AdamW for all, or Muon for the matrices inside the blocks."""
    inside = [p for p in model.blocks.parameters() if p.ndim == 2] if muon else []
    rest = [p for p in model.parameters() if not any(p is q for q in inside)]
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [(adamw, lr), (Muon(inside, lr=10 * lr), 10 * lr)] if muon else [(adamw, lr)]

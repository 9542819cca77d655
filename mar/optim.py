"""The optimizer and its learning-rate schedule."""

import math
import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mar.records import UserError

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

"""The parts of a warm-up's run: its options, the questions of each step, its state, its log."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mar.answers.grammar import FORMS
from mar.config import Config, number
from mar.errors import UserError
from mar.learn.demonstrations import SFT_SEED
from mar.measure.single_answers import gold_probabilities
from mar.policy.lora import is_adapter
from mar.policy.model import Decoder
from mar.records import Example
from mar.run.compose import compose, own_options
from mar.run.console import Display
from mar.run.setup import load_data
from mar.sample.prompt_order import items_of_step
from mar.tasks.registry import get_task

# Of a task that draws its questions so many steps' are loaded at once.
STEPS_PER_LOAD = 200
# Training questions out of which the prior is computed.
NUM_FOR_PRIOR = 2000
STATE = "state.pt"


@dataclass
class WarmUpOptions:
    """What a warm-up has of its own, as words `sft.key=value`."""

    steps: int = number(1000, low=1)
    # Questions per step.
    batch: int = number(8, low=1)
    # data.num_asked of what is taught; null: as in what is measured.
    asked: list[int] | None = None
    # How often each of mar.answers.grammar.FORMS is taught, one form a step.
    shares: list[float] = field(default_factory=lambda: [0.7, 0.05, 0.1, 0.15])
    warmup_steps: int = number(30, low=1)
    # The rate falls to 0 over this share of the steps, the last ones.
    decay: float = number(0.3, low=0, high=1, above=True)
    eval_every: int = number(100, low=1)
    # Held-out questions.
    eval_items: int = number(64, low=1)
    save_every: int = number(25, low=1)


def split_words(words: Sequence[str]) -> tuple[WarmUpOptions, Config]:
    """The options under `sft.`, and the config that the other words compose. Raises UserError."""
    own = [word for word in words if word.startswith("sft.")]
    options = own_options(WarmUpOptions, "sft", own)
    if len(options.shares) != len(FORMS) or min(options.shares) < 0 or not sum(options.shares):
        raise UserError(
            f"sft.shares={options.shares}: give {len(FORMS)} numbers of at least 0, for "
            f"{', '.join(FORMS)}"
        )
    if options.eval_every % options.save_every:
        raise UserError(
            f"sft.eval_every={options.eval_every} is no multiple of sft.save_every="
            f"{options.save_every}: measuring comes with saving"
        )
    config = compose([word for word in words if word not in own])
    if not config.model.lora_rank:
        raise UserError("the warm-up trains adapters and there are none: add model.lora_rank=12")
    return options, config


def prior_of(config: Config, held_out: Sequence[Example], display: Display) -> np.ndarray | None:
    """[C] how frequent each gold is among training questions; None where golds differ."""
    if len({tuple(gold.name for gold in example.golds) for example in held_out}) > 1:
        return None
    examples = load_data(config, "train", NUM_FOR_PRIOR, SFT_SEED, display)
    return gold_probabilities(examples).mean(axis=0)


class Questions:
    """The questions of each step, by the seed and the step alone.

    Where a task draws its questions they are always new ones; else they are those of a file, each
    epoch in a new order.
    """

    def __init__(self, config: Config, batch: int, display: Display) -> None:
        self.config = config
        self.batch = batch
        self.display = display
        self.endless = get_task(config.data.task).endless
        self.chunk = -1
        self.examples: Sequence[Example] = []
        if not self.endless:
            data = config.data
            self.examples = load_data(
                config, data.train_split, data.num_train, config.seed, display
            )

    def of(self, step: int) -> list[Example]:
        if self.endless:
            return self._drawn(step)
        return items_of_step(self.examples, step, self.batch, self.config.seed)

    def _drawn(self, step: int) -> list[Example]:
        chunk, place = divmod(step, STEPS_PER_LOAD)
        if self.chunk != chunk:
            seed = SFT_SEED + 1000 * self.config.seed + chunk
            count = self.batch * STEPS_PER_LOAD
            self.examples = load_data(self.config, "train", count, seed, self.display)
            self.chunk = chunk
        return list(self.examples[place * self.batch : (place + 1) * self.batch])


@dataclass(frozen=True)
class Progress:
    """What a resumed run goes on from: finished steps, and the seconds that they took."""

    step: int = 0
    seconds: float = 0.0


def save_state(
    model: Decoder, optimizer: torch.optim.Optimizer, progress: Progress, folder: Path
) -> None:
    """Adapters, the optimizer's moments by their parameters' names, and the progress."""
    named = dict(model.named_parameters())
    state = {
        "adapters": {name: p.detach() for name, p in named.items() if is_adapter(name)},
        "moments": {name: optimizer.state[p] for name, p in named.items() if p in optimizer.state},
        "step": progress.step,
        "seconds": progress.seconds,
    }
    unfinished = folder / f"{STATE}.tmp"
    torch.save(state, unfinished)
    os.replace(unfinished, folder / STATE)


def restore_state(model: Decoder, optimizer: torch.optim.Optimizer, folder: Path) -> Progress:
    """Put back what was saved, if there is any. Other layers may be trained from here on
    (model.trainable): they start without moments. Raises UserError for other adapters."""
    file = folder / STATE
    if not file.exists():
        return Progress()
    # moments go where their parameters are, which may be another device than when they were saved
    state = torch.load(file, weights_only=True, map_location="cpu")
    named = dict(model.named_parameters())
    shapes = {name: p.shape for name, p in named.items() if is_adapter(name)}
    if shapes != {name: value.shape for name, value in state["adapters"].items()}:
        raise UserError(
            f"{file} has adapters of another rank or of other layers: set the model.lora_* of "
            "its run, or another run_dir"
        )
    model.load_state_dict(state["adapters"], strict=False)
    for name, parameter in named.items():
        if parameter.requires_grad and name in state["moments"]:
            moments = state["moments"][name]
            for key, value in moments.items():
                if value.shape == parameter.shape:
                    moments[key] = value.to(parameter)
            optimizer.state[parameter] = moments
    return Progress(state["step"], state["seconds"])


def learning_rate(step: int, options: WarmUpOptions, peak: float) -> float:
    """The rate of `step` (from 0), a trapezoid: up, level, and down to 0 over the last steps."""
    up = (step + 1) / options.warmup_steps
    down = (options.steps - step) / (options.decay * options.steps)
    return peak * min(1.0, up, down)


class Recent:
    """What a line of the log tells of the steps since the last one."""

    def __init__(self) -> None:
        self.kl: dict[str, list[float]] = {}
        self.positions = 0

    def add(self, name: str, nats: float) -> None:
        self.kl.setdefault(name, []).append(nats)

    def row(self) -> dict[str, float]:
        row: dict[str, float] = {}
        for name, nats in self.kl.items():
            row[f"kl_{name}"] = round(float(np.mean(nats)), 3)
        row["positions"] = self.positions
        return row

"""The parts of a warm-up's run: its options, the questions of each step, its state, its log."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from mar.answers.grammar import FORMS
from mar.config import Config, listed, number, one_of, option
from mar.errors import UserError
from mar.learn.demonstrations import MIXTURES, SFT_SEED, ConfidenceHint, piece_encoder
from mar.learn.warm_up import Asking
from mar.measure.single_answers import SEVERAL, gold_probabilities
from mar.policy.lora import is_adapter
from mar.policy.model import Decoder
from mar.records import Example
from mar.run.console import Display
from mar.run.folder import require_no_file
from mar.run.setup import load_data
from mar.sample.prompt_order import items_of_step
from mar.tasks.registry import get_task

# Of a task that draws its questions so many steps' are loaded at once.
STEPS_PER_LOAD = 200
# Training questions out of which the prior is computed.
NUM_FOR_PRIOR = 2000
STATE = "state.pt"
BEGIN_ANEW = "remove it and the same command begins anew, or take another run_dir="


# Peak rates, where sft.lr says nothing.
LR = 4e-4
ADAPTERS_LR = 1e-3

# Settings of mar.train that a warm-up has words of its own for.
INSTEAD = {
    "model.lr": "sft.lr",
    "optim.lr": "sft.lr",
    "train.steps": "sft.steps",
    "algo.prompts_per_step": "sft.batch",
}
COURSE = "the rate rises over sft.warmup_steps and falls over the share sft.decay"
# Settings that do nothing here, and what there is instead.
NOT_HERE = {
    "optim.schedule": COURSE,
    "optim.warmup_frac": COURSE,
    "model.max_prompt_tokens": "a warm-up takes prompts of any length",
}


@dataclass
class SftOptions:
    """What a warm-up has of its own, as words `sft.key=value`."""

    steps: int = number(1000, low=1, help="updates")
    batch: int = number(8, low=1, help="questions of an update")
    rows: int = number(1, low=1, help="demonstrations of a question; more need another mixture")
    lr: float | None = number(
        None, low=0, above=True, help=f"peak rate ({LR:g}, of adapters {ADAPTERS_LR:g})"
    )
    warmup_steps: int = number(30, low=1, help="the rate rises for so long")
    decay: float = number(
        0.3, low=0, high=1, above=True, help="and falls to 0 over this share, the last steps"
    )
    muon: bool = option(False, help="true: Muon for the matrices inside the blocks")
    mixture: str = one_of(
        "per_step",
        *MIXTURES,
        help="forms: one for a whole update, by sft.shares, or one for each question",
    )
    shares: list[float] = listed(
        [0.7, 0.05, 0.1, 0.15], help=f"of {', '.join(FORMS)} with mixture=per_step"
    )
    plain_steps: int = number(0, low=0, help="so many first updates teach single answers alone")
    hint: float = number(
        0.0, low=0, high=1, help="share of a confidence's mass that lies near the truth"
    )
    hint_counts: float = number(
        1.0, low=0, above=True, help="what a token of a confidence counts in the loss"
    )
    hint_spread: float = number(
        ConfidenceHint.spread, low=0, above=True, help="how far from the truth"
    )
    asked: list[int] | None = option(
        None, help="data.num_asked of what is taught (that of what is measured)"
    )
    log_every: int = number(25, low=1, help="updates between two lines of sft.jsonl")
    save_every: int = number(50, low=1, help="and between two saves, to go on from")
    eval_every: int = number(100, low=0, help="and between two measurements; 0: none")
    eval_items: int = number(64, low=1, help="held-out questions of a measurement")
    dtype: str = one_of("float32", "bfloat16", help="of the checkpoint at the end")


def check_options(sft: SftOptions, config: Config, settings: Sequence[str]) -> None:
    """Raises UserError where words do not fit together."""
    for word in settings:
        key, _, value = word.partition("=")
        if key in INSTEAD:
            raise UserError(f"{key} is for mar.train: write {INSTEAD[key]}={value}")
        if key in NOT_HERE:
            raise UserError(f"{key} is for mar.train, leave it out: {NOT_HERE[key]}")
        if word == "device=cuda":
            raise UserError("device=cuda is for mar.train: a warm-up runs on the CPU, leave it out")
    if len(sft.shares) != len(FORMS) or min(sft.shares) < 0 or not sum(sft.shares):
        raise UserError(
            f"sft.shares={sft.shares}: give {len(FORMS)} numbers of at least 0, for "
            f"{', '.join(FORMS)}"
        )
    if sft.mixture == "per_step" and sft.rows > 1:
        raise UserError(
            f"sft.rows={sft.rows} is for forms that are drawn for each question: add "
            "sft.mixture=short"
        )
    if sft.save_every % sft.log_every:
        raise UserError(
            f"sft.save_every={sft.save_every} is no multiple of sft.log_every={sft.log_every}: "
            "saving comes with a line of the log"
        )
    if sft.eval_every % sft.save_every:
        raise UserError(
            f"sft.eval_every={sft.eval_every} is no multiple of sft.save_every={sft.save_every}: "
            "measuring comes with saving"
        )
    if get_task(config.data.task).verifier == "program":
        raise UserError(
            f"a warm-up teaches answers in words, and those of {config.data.task} are programs"
        )


def asking_of(config: Config, tokenizer: Any) -> Asking:
    """How the config's task asks this tokenizer's model."""
    return Asking(
        tokenizer=tokenizer,
        encode=piece_encoder(tokenizer),
        noun=get_task(config.data.task).noun,
        request_first=config.data.request_first,
        explain_decimals=config.model.explain_decimals,
    )


def without_places(words: Sequence[str]) -> list[str]:
    """Settings but those that say where things lie on this machine."""
    places = ("out=", "run_dir=", "data.path=", "model.path=")
    return [word for word in words if not word.startswith(places)]


def folder_of(config: Config, settings: Sequence[str]) -> Path:
    """Where a warm-up writes: run_dir= where it is given, else beside the runs of its name."""
    if any(word.startswith("run_dir=") for word in settings):
        return Path(config.run_dir)
    return Path(config.out) / f"{config.name}-sft" / f"seed{config.seed}"


def require_own_folder(folder: Path, log: Path) -> None:
    """Raises UserError for a file, and for a folder that something else has written into."""
    require_no_file(folder)
    if folder.is_dir() and any(folder.iterdir()) and not log.is_file():
        raise UserError(
            f"{folder} holds something else (no {log.name}): choose another run_dir= or name="
        )


def _lists_of_golds(examples: Sequence[Example]) -> set[tuple[str, ...]]:
    return {tuple(gold.name for gold in example.golds) for example in examples}


def prior_of(config: Config, held_out: Sequence[Example], display: Display) -> np.ndarray | None:
    """[C] how frequent each gold is among training questions; None where golds differ, or are too
    few to draw several."""
    if len(_lists_of_golds(held_out)) > 1 or len(held_out[0].golds) < SEVERAL:
        return None
    examples = load_data(config, "train", NUM_FOR_PRIOR, SFT_SEED, display)
    if len(_lists_of_golds([*held_out, *examples])) > 1:
        return None
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
        # the names of all golds of the questions that are loaded
        self.answers: list[str] = []
        if not self.endless:
            data = config.data
            self._take(load_data(config, data.train_split, data.num_train, config.seed, display))

    def of(self, step: int) -> list[Example]:
        if self.endless:
            return self._drawn(step)
        return items_of_step(self.examples, step, self.batch, self.config.seed)

    def _take(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        # Once, not at every step: each pass may read all rows of a file again.
        names = (gold.name for example in examples for gold in example.golds)
        self.answers = list(dict.fromkeys(names))

    def _drawn(self, step: int) -> list[Example]:
        chunk, place = divmod(step, STEPS_PER_LOAD)
        if self.chunk != chunk:
            seed = SFT_SEED + 1000 * self.config.seed + chunk
            count = self.batch * STEPS_PER_LOAD
            self._take(load_data(self.config, "train", count, seed, self.display))
            self.chunk = chunk
        return list(self.examples[place * self.batch : (place + 1) * self.batch])


@dataclass(frozen=True)
class Progress:
    """What a resumed run goes on from: finished steps, the seconds that they took, and the names of
    what was trained."""

    step: int = 0
    seconds: float = 0.0
    names: frozenset[str] = frozenset()


# With their peak rates.
Optimizers = Sequence[tuple[torch.optim.Optimizer, float]]


# What has to be the same where a run goes on, by the name that a message gives it.
Fixed = dict[str, Any]


def save_state(
    model: Decoder, optimizers: Optimizers, progress: Progress, folder: Path, fixed: Fixed
) -> None:
    """What is trained or was (adapters always), the moments by their parameters' names, the
    progress, and what must not change."""
    named = dict(model.named_parameters())
    kept = {
        name: p.detach()
        for name, p in named.items()
        if p.requires_grad or is_adapter(name) or name in progress.names
    }
    moments: dict[str, Any] = {}
    for optimizer, _ in optimizers:
        moments |= {name: optimizer.state[p] for name, p in named.items() if p in optimizer.state}
    state = {
        "weights": kept,
        "moments": moments,
        "step": progress.step,
        "seconds": progress.seconds,
        "fixed": fixed,
    }
    unfinished = folder / f"{STATE}.tmp"
    with unfinished.open("wb") as written:
        torch.save(state, written)
        written.flush()
        os.fsync(written.fileno())
    os.replace(unfinished, folder / STATE)


def _read_state(file: Path) -> dict[str, Any]:
    """Raises UserError for a damaged file."""
    try:
        # Moments go where their parameters are, which may be another device than when they were
        # saved.
        state = torch.load(file, weights_only=True, map_location="cpu")
        missing = {"weights", "moments", "step", "seconds"} - set(state)
    except (OSError, RuntimeError, EOFError, TypeError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} cannot be read ({reason}): {BEGIN_ANEW}") from None
    if missing:
        raise UserError(f"{file} has no {min(missing)}: {BEGIN_ANEW}")
    return state


def restore_state(model: Decoder, optimizers: Optimizers, folder: Path, fixed: Fixed) -> Progress:
    """Put back what was saved, if there is any.

    If model.trainable now chooses other parameters, these start with fresh moments. Raises
    UserError for other adapters, for another model or optimizer, and for a damaged file.
    """
    file = folder / STATE
    if not file.exists():
        return Progress()
    state = _read_state(file)
    for name, value in state.get("fixed", {}).items():
        if value != fixed[name]:
            raise UserError(
                f"{file} was written with another {name}: take that of its run, or another run_dir="
            )
    weights = state["weights"]
    named = dict(model.named_parameters())
    fits = all(name in named and named[name].shape == weights[name].shape for name in weights)
    if not fits or any(name not in weights for name in named if is_adapter(name)):
        raise UserError(
            f"{file} has adapters of another rank or of other layers: set the model.lora_* of "
            "its run, or another run_dir"
        )
    model.load_state_dict(weights, strict=False)
    for optimizer, _ in optimizers:
        for group in optimizer.param_groups:
            of_group = {id(parameter) for parameter in group["params"]}
            for name, parameter in named.items():
                if id(parameter) in of_group and name in state["moments"]:
                    optimizer.state[parameter] = _moments_beside(parameter, state["moments"][name])
    return Progress(state["step"], state["seconds"], frozenset(weights))


def _moments_beside(parameter: torch.nn.Parameter, moments: dict[str, Any]) -> dict[str, Any]:
    """The moments on the parameter's device; the step count stays where AdamW keeps it."""
    for key, value in moments.items():
        if value.shape == parameter.shape:
            moments[key] = value.to(parameter)
    return moments


def rate_factor(step: int, sft: SftOptions) -> float:
    """What the peak rate is multiplied by at `step` (from 0), a trapezoid: up, level, and down to 0
    over the last steps."""
    up = (step + 1) / sft.warmup_steps
    down = (sft.steps - step) / (sft.decay * sft.steps)
    return min(1.0, up, down)


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

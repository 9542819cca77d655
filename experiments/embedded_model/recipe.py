"""Makes the embedded model, from random weights, in three steps.

    python -m experiments.embedded_model.recipe --out FOLDER [--until bare|forms|truth|noise]

A, stages `bare` and `forms`: answers that follow the exact posterior, first to the bare question,
then in every form. Confidences are noise.
B, stage `truth`: confidences at the truth, in sets of three above all, until a confidence follows
the probability of its answer.
C, stage `noise`: confidences become nearly uninformative again. Reinforcement learning is to bring
them back. The last layer and the last norm alone are trained, so that the layers below keep what they
look up.

Layers below the last are asked on the way for what a confidence needs. After layer `EARLY` the
posterior is asked for: where an answer is written and, from stage `forms` on, right after it.
There layer `LOOKED_UP` is asked for the probability of that answer. The last layer has only to
fetch it and to put it into digits.

Every stage begins with new optimizers, and its rate rises over WARM_UP steps.

A step's patients and forms depend on the seed, the stage and the step alone. A run that was stopped
goes on at its last checkpoint. FOLDER/log.jsonl has the loss (nats a completion above the least
possible) and what is measured on validation patients.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.embedded_model.measure import posterior_kl, run, slot_correlations, slot_errors
from experiments.embedded_model.shape import VOCABULARY, embedded_config, train_tokenizer
from mar.answers.grammar import Grammar
from mar.answers.tokenizer import copy_tokenizer, load_tokenizer
from mar.learn.demonstrations import (
    MIXTURES,
    SFT_SEED,
    Bag,
    Bags,
    ConfidenceHint,
    DemonstrationBatch,
    DrawForm,
    DrawnText,
    Encode,
    Pieces,
    Shown,
    cross_entropy,
    draw_demonstrations,
    join_bags,
    piece_encoder,
    soft_targets,
)
from mar.learn.optim import Muon, set_learning_rate
from mar.policy.attention import group_attention
from mar.policy.model import Decoder
from mar.policy.packing import pack_groups
from mar.policy.weights import save_model
from mar.records import Example
from mar.tasks import clinic

# The layers, counted from 1, after which the posterior and the probability of an answer have to be
# known already.
EARLY = 4
LOOKED_UP = 5
# Tokens that stand for "this answer is right" and "it is not" after layer LOOKED_UP.
RIGHT = "1"
WRONG = "0"
# What each of the two counts right after an answer; fewer where the answer is nearly all there is.
AFTER_ANSWER = 4.0
AFTER_BARE_ANSWER = 1.0
SETS = Grammar("rlcr_multi", 3, thinking=False)
WARM_UP = 50
SAVE_EVERY = 50
LOG_EVERY = 25
MEASURE_EVERY = 200
# Validation patients that are measured, on the way and at the end of a stage.
ITEMS = 300
ITEMS_AT_THE_END = 1000


@dataclass(frozen=True)
class Stage:
    """One stage of the training; the names of its fields are those of the logs."""

    name: str
    steps: int
    lr: float
    # Patients of a step that are asked the bare question.
    bare: int
    # Patients of a step that are asked in a form, with so many demonstrations each.
    prompts: int = 0
    rows: int = 1
    # Patients of a step that are asked for a set of three, likewise.
    sets: int = 0
    # Share of a confidence's mass that lies near the truth.
    share: float = 1.0
    # What a token of a confidence counts in the loss.
    counts: float = 1.0
    # Whether the layers below the last are asked right after an answer, too.
    after_answers: bool = True
    # What the losses after layers EARLY and LOOKED_UP count.
    early: float = 1.0
    # Whether the last layer and the last norm alone are trained.
    only_last: bool = False
    # The rate falls to the share `last` of itself, over the share `falling` of the steps.
    last: float = 0.0
    falling: float = 0.3


STAGES = (
    Stage("bare", 1200, 1e-3, bare=64, after_answers=False, last=1.0),
    Stage("forms", 1000, 1e-3, bare=32, prompts=16, sets=8, rows=2, share=0.0, last=0.5),
    Stage("truth", 4000, 1e-3, bare=16, prompts=5, sets=11, rows=6, falling=0.7),
    Stage(
        "noise",
        250,
        3e-3,
        bare=0,
        prompts=24,
        rows=4,
        share=0.35,
        counts=2.0,
        early=0.0,
        only_last=True,
        falling=0.7,
    ),
)


# ---------------------------------------------------------------------- the loss


@contextmanager
def states_after(model: Decoder, layer: int) -> Iterator[list[Tensor]]:
    """What leaves a layer (counted from 1) while this is open: [N, D] for each forward pass."""
    states: list[Tensor] = []
    block = model.blocks[layer - 1]
    hook = block.register_forward_hook(lambda _, args, out: states.append(out))
    try:
        yield states
    finally:
        hook.remove()


@dataclass(frozen=True)
class Asked:
    """What a layer is asked for: a bag for each of these places among the predicted tokens."""

    places: Tensor
    bags: Bags


def asked(bags: Sequence[Bag]) -> Asked:
    """`bags`: one for each predicted token, empty where nothing is asked."""
    places = [place for place, bag in enumerate(bags) if bag]
    return Asked(torch.tensor(places, dtype=torch.int64), join_bags([bags[i] for i in places]))


@dataclass(frozen=True)
class Lesson:
    """Demonstrations, and what layers EARLY and LOOKED_UP are asked for."""

    batch: DemonstrationBatch
    early: Asked
    looked_up: Asked


def bags_below(
    pieces: Pieces, targets: Sequence[Bag], encode: Encode, after: float
) -> tuple[list[Bag], list[Bag]]:
    """What layers EARLY and LOOKED_UP are asked for, at each token of a demonstration.

    EARLY is asked for what the last layer is, its `targets`, but for no confidence. Right after an
    answer both are asked for something else, which counts `after`: EARLY for the posterior,
    LOOKED_UP whether the answer is right.
    """
    right_id = encode(RIGHT)[0]
    wrong_id = encode(WRONG)[0]
    early = list(targets)
    looked_up: list[Bag] = [{} for _ in targets]
    # Name -> probability; the first answer was drawn from it.
    posterior: dict[str, float] = {}
    place = 0
    for piece in pieces:
        text = piece if isinstance(piece, str) else piece.text
        end = place + len(encode(text))
        if isinstance(piece, DrawnText) and piece.kind == "confidence":
            # The token behind a confidence belongs to it: it says that it ends there.
            for index in range(place, end + 1):
                early[index] = {}
        if isinstance(piece, DrawnText) and piece.kind == "answer" and after:
            posterior = posterior or dict(zip(piece.candidates, piece.probabilities, strict=True))
            early[end] = first_tokens(posterior, encode, after)
            truth = posterior.get(text, 0.0)
            looked_up[end] = {right_id: after * truth, wrong_id: after * (1 - truth)}
        place = end
    return early, looked_up


def first_tokens(names: dict[str, float], encode: Encode, counts: float) -> Bag:
    """The distribution of a name's first token, times `counts`."""
    bag: Bag = {}
    for name, probability in names.items():
        token = encode(name)[0]
        bag[token] = bag.get(token, 0.0) + counts * probability
    return bag


def make_lesson(drawn: Sequence[Shown], encode: Encode, stop_id: int, after: float) -> Lesson:
    """Drawn demonstrations as a lesson. `after`: what is asked right after an answer counts so much."""
    completions = []
    targets: list[Bag] = []
    early: list[Bag] = []
    looked_up: list[Bag] = []
    for shown in drawn:
        rows = []
        for pieces in shown.rows:
            ids, of_tokens = soft_targets(pieces, encode, stop_id)
            for_early, for_looked_up = bags_below(pieces, of_tokens, encode, after)
            rows.append(ids)
            targets += of_tokens
            early += for_early
            looked_up += for_looked_up
        completions.append(rows)
    packed = pack_groups([shown.prompt for shown in drawn], completions)
    batch = DemonstrationBatch(packed, join_bags(targets))
    return Lesson(batch, asked(early), asked(looked_up))


def loss_and_excess(model: Decoder, lesson: Lesson, early: float) -> tuple[Tensor, float]:
    """The loss a counted token, and how many nats in all the last layer lies above the least.

    A layer that is the last one, in a model with few, is not asked.
    """
    batch = lesson.batch
    packed = batch.packed
    head = model.head_weight
    below = []
    if early:
        for layer, question in ((EARLY, lesson.early), (LOOKED_UP, lesson.looked_up)):
            if layer < len(model.blocks) and len(question.places):
                below.append((layer, question))
    with ExitStack() as stack:
        states = [stack.enter_context(states_after(model, layer)) for layer, _ in below]
        hidden = model.hidden(packed.ids, packed.positions, group_attention(packed))

    of_last = cross_entropy(hidden[packed.predict_from], head, packed.targets, batch.bags)
    loss = of_last
    for (_, question), (state,) in zip(below, states, strict=True):
        chosen = model.norm(state[packed.predict_from[question.places]])
        tokens = packed.targets[question.places]
        loss = loss + early * cross_entropy(chosen, head, tokens, question.bags)
    return loss / batch.num_counted, of_last.item() - batch.bags.entropy


# ---------------------------------------------------------------------- what is measured


def measured(model: Decoder, tokenizer: Any, num: int, bare: bool) -> dict[str, Any]:
    """On `num` validation patients: the posterior of a single answer, and sets of three.

    `bare`: of a single answer to the bare question, alone.
    """
    examples = clinic.load("validation", num)
    divergence = posterior_kl(model, tokenizer, examples, bare)
    found: dict[str, Any] = {"posterior_kl": round(divergence, 4)}
    if bare:
        return found
    metrics, rollouts = run(model, tokenizer, examples, SETS, "ranked")
    for name in ("format_rate", "coverage@3", "q_mse", "ece"):
        # None: no set was right-formed.
        if metrics[name] is not None:
            found[name] = round(metrics[name], 4)
    found["slots"] = []
    if any(rollout.reason is None for rollout in rollouts):
        found["slots"] = [round(error, 4) for error in slot_errors(rollouts)]
        found["correlations"] = [round(x, 2) for x in slot_correlations(rollouts)]
    return found


# ---------------------------------------------------------------------- the training


def choose_trained(model: Decoder, only_last: bool) -> None:
    """Let all parameters be trained, or those of the last layer and the last norm."""
    own = (f"blocks.{len(model.blocks) - 1}.", "norm.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not only_last or name.startswith(own))


def optimizers_of(model: Decoder) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers of what is to be trained, and what each multiplies the rate by.

    Muon has the matrices inside the blocks, at ten times the rate of AdamW, which has the rest.
    """
    inside: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_inside = name.startswith("blocks.") and parameter.ndim == 2
        (inside if is_inside else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    return [(adamw, 1.0), (Muon(inside, lr=1e-2), 10.0)]


class Teacher:
    """A model in training, what it has gone through, and the folder where that is kept.

    `words` is the folder of its tokenizer.
    """

    def __init__(
        self, folder: Path, words: Path, model: Decoder, seed: int, stages: tuple[Stage, ...]
    ) -> None:
        self.folder = folder
        self.words = words
        self.tokenizer = load_tokenizer(words)
        self.encode = piece_encoder(self.tokenizer)
        self.model = model
        self.seed = seed
        self.stages = stages
        # Seconds of steps so far, of all stages.
        self.seconds = 0.0
        self.begin(0)

    def begin(self, stage: int) -> None:
        """Go to the first step of a stage."""
        self.stage = stage
        self.step = 0
        choose_trained(self.model, self.stages[stage].only_last)
        self.optimizers = optimizers_of(self.model)

    def log(self, line: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def log_start(self, args: argparse.Namespace) -> None:
        """The size of the model and the settings of this start."""
        size = sum(p.numel() for p in self.model.parameters())
        settings = {key: str(value) for key, value in vars(args).items()}
        self.log({"parameters": size} | settings)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
        }
        # An interrupted save leaves no half file under the real name.
        unfinished = self.folder / "checkpoint.new"
        torch.save(state, unfinished)
        unfinished.rename(self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Go on where the folder's checkpoint was, if it has one."""
        file = self.folder / "checkpoint.pt"
        if not file.exists():
            return
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.begin(state["stage"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        for (optimizer, _), kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)

    def lessons(self, stage: Stage) -> Iterator[Lesson]:
        """Those of this step: bare questions, all forms, sets."""
        rng = np.random.default_rng([self.seed, self.stage, self.step])
        seed = SFT_SEED + 10_000_000 * self.seed + 100_000 * (1 + self.stage) + self.step
        patients = clinic.load("train", stage.bare + stage.prompts + stage.sets, seed)
        bare = patients[: stage.bare]
        forms = patients[stage.bare : stage.bare + stage.prompts]
        sets = patients[stage.bare + stage.prompts :]
        if bare:
            yield self.lesson(stage, bare, MIXTURES["plain"], rng, bare=True)
        if forms:
            yield self.lesson(stage, forms, MIXTURES["all"], rng)
        if sets:
            yield self.lesson(stage, sets, lambda _: (SETS, "ranked"), rng)

    def lesson(
        self,
        stage: Stage,
        patients: Sequence[Example],
        draw_form: DrawForm,
        rng: np.random.Generator,
        bare: bool = False,
    ) -> Lesson:
        """`bare`: one demonstration for each patient, without the request for a form."""
        hint = ConfidenceHint(stage.share, stage.counts, 0.02)
        names = [gold.name for gold in patients[0].golds]
        rows = 1 if bare else stage.rows
        drawn = draw_demonstrations(
            patients, clinic.NOUN, self.tokenizer, rng, names, draw_form, hint, rows, bare
        )
        after = 0.0
        if stage.after_answers:
            after = AFTER_BARE_ANSWER if bare else AFTER_ANSWER
        return make_lesson(drawn, self.encode, self.tokenizer.eos_token_id, after)

    def rate(self, stage: Stage) -> float:
        left = min(1.0, (stage.steps - self.step) / (stage.falling * stage.steps))
        warm = min(1.0, (self.step + 1) / WARM_UP)
        return stage.lr * warm * (stage.last + (1 - stage.last) * left)

    def teach(self, stage: Stage) -> None:
        """The steps of a stage that are left; logs, measures and saves now and then."""
        # Of each step since the last line, the excess of each of its batches, in nats.
        recent: list[list[float]] = []
        while self.step < stage.steps:
            began = time.perf_counter()
            self.model.zero_grad()
            recent.append([])
            for lesson in self.lessons(stage):
                loss, excess = loss_and_excess(self.model, lesson, stage.early)
                loss.backward()
                recent[-1].append(excess)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            rate = self.rate(stage)
            for optimizer, times in self.optimizers:
                set_learning_rate(optimizer, times * rate)
                optimizer.step()
            self.step += 1
            self.seconds += time.perf_counter() - began

            last = self.step == stage.steps
            where = {"stage": stage.name, "step": self.step}
            if self.step % LOG_EVERY == 0 or last:
                rows = (stage.bare, stage.prompts * stage.rows, stage.sets * stage.rows)
                sizes = [n for n in rows if n]
                kl = [round(x, 4) for x in (np.mean(recent, axis=0) / sizes).tolist()]
                spent = {"lr": round(rate, 6), "seconds": round(self.seconds)}
                self.log(where | {"kl": kl} | spent)
                recent.clear()
            if self.step % MEASURE_EVERY == 0 or last:
                num = ITEMS_AT_THE_END if last else ITEMS
                bare = stage.prompts == 0
                self.log(where | measured(self.model, self.tokenizer, num, bare))
            if self.step % SAVE_EVERY == 0 or last:
                self.save()

    def go(self, until: str) -> None:
        """All stages that are left, to the end of the stage `until`; each leaves its model."""
        names = [stage.name for stage in self.stages]
        for index, stage in enumerate(self.stages[: names.index(until) + 1]):
            if index < self.stage:
                continue
            if index > self.stage:
                self.begin(index)
            self.log(asdict(stage) | {"from": self.step})
            self.teach(stage)
            save_model(self.model, self.folder / stage.name, torch.float32)
            copy_tokenizer(self.words, self.folder / stage.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--until", default="noise", choices=[stage.name for stage in STAGES])
    add("--layers", type=int, default=6)
    add("--wide", type=int, default=256, help="units inside a block")
    add("--seed", type=int, default=0)
    add("--steps", type=int, help="at most so many of each stage, to try it out")
    args = parser.parse_args()
    stages: tuple[Stage, ...] = STAGES
    if args.steps is not None:
        stages = tuple(replace(stage, steps=min(stage.steps, args.steps)) for stage in STAGES)

    words = args.out / "tokenizer"
    if not words.exists():
        examples = clinic.load("train", 4000, SFT_SEED - 1)
        train_tokenizer(examples, clinic.NOUN, VOCABULARY, words)
    torch.manual_seed(args.seed)
    model = Decoder(embedded_config(len(load_tokenizer(words)), args.layers, args.wide))
    teacher = Teacher(args.out, words, model, args.seed, stages)
    teacher.resume()
    teacher.log_start(args)
    teacher.go(args.until)


if __name__ == "__main__":
    main()

"""What the recipe's model knows of an answer's probability: layer LOOKED_UP right after the answer,
and the last layer where it writes the confidence.

    python -m experiments.embedded_model.looked_up FOLDER

FOLDER is one of the recipe's, with its checkpoint. Of sets of three for validation patients, drawn
from the posterior. `layer`: mean squared error of what layer LOOKED_UP says, and its correlation
with the truth. `mean` and `drawn`: the same error of the confidence that the last layer expects,
and the variance of those that it draws; a confidence that is drawn has the sum of both. Both are of
the first digit alone, the second one taken as 4.5. `constant`: the variance of the truth.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from experiments.embedded_model.recipe import (
    LOOKED_UP,
    RIGHT,
    SETS,
    STAGES,
    WRONG,
    Teacher,
    states_after,
)
from experiments.embedded_model.shape import embedded_config
from mar.answers.tokenizer import load_tokenizer
from mar.policy.attention import group_attention
from mar.policy.model import Decoder

PATIENTS = 200
# No step of a training run draws these patients.
STEP = 99_999
TRUTH = 2
DIGITS = "0123456789"


def open_teacher(folder: Path) -> Teacher:
    """The recipe's model as its checkpoint has it, at patients that it was not taught."""
    words = folder / "tokenizer"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    num_layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    wide = state["blocks.0.down.weight"].shape[1]
    model = Decoder(embedded_config(len(load_tokenizer(words)), num_layers, wide))
    model.load_state_dict(state)
    sets_only = replace(STAGES[TRUTH], bare=0, prompts=0, sets=PATIENTS, rows=1)
    teacher = Teacher(folder, words, model, 0, (*STAGES[:TRUTH], sets_only))
    teacher.stage, teacher.step = TRUTH, STEP
    return teacher


@dataclass(frozen=True)
class Said:
    """Of one answer: its probability, what layer LOOKED_UP says of it, and the mean and the variance
    of the confidence that the last layer writes."""

    truth: float
    looked_up: float
    mean: float
    variance: float


@torch.no_grad()
def said_of_answers(teacher: Teacher) -> dict[int, list[Said]]:
    """Slot -> what is said of its answers."""
    (lesson,) = teacher.lessons(teacher.stages[TRUTH])
    packed = lesson.batch.packed
    model = teacher.model
    with states_after(model, LOOKED_UP) as states:
        hidden = model.hidden(packed.ids, packed.positions, group_attention(packed))

    places = lesson.looked_up.places
    logits = model.norm(states[0][packed.predict_from[places]]) @ model.head_weight.T
    right_id, wrong_id = (teacher.encode(text)[0] for text in (RIGHT, WRONG))
    looked_up = torch.softmax(logits[:, [right_id, wrong_id]], dim=-1)[:, 0]
    # A bag holds what counts for right, then for wrong.
    truth = lesson.looked_up.bags.weights.view(-1, 2)[:, 0] / lesson.looked_up.bags.counts

    # Between an answer and its confidence stand two tags.
    begins = places + len(teacher.encode("</answer1><confidence1>"))
    logits = hidden[packed.predict_from[begins + 1]] @ model.head_weight.T
    digit_ids = [teacher.encode(f"0.{digit}0")[1] for digit in DIGITS]
    of_digits = torch.softmax(logits[:, digit_ids], dim=-1)
    worth = torch.arange(10) / 10 + 0.045
    mean = of_digits @ worth
    variance = of_digits @ worth**2 - mean**2

    # A confidence of 1.00 begins otherwise.
    below_1 = packed.targets[begins] == teacher.encode("0.00")[0]

    found = defaultdict(list)
    columns = [column.tolist() for column in (truth, looked_up, mean, variance, below_1)]
    for number, (*values, has_digit) in enumerate(zip(*columns, strict=True)):
        if has_digit:
            found[number % SETS.num_answers].append(Said(*values))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    for slot, said in said_of_answers(open_teacher(parser.parse_args().folder)).items():
        truth = np.array([one.truth for one in said])
        looked_up = np.array([one.looked_up for one in said])
        mean = np.array([one.mean for one in said])
        drawn = np.mean([one.variance for one in said])
        correlation = np.corrcoef(looked_up, truth)[0, 1]
        print(
            f"slot {slot + 1}: layer {np.mean((looked_up - truth) ** 2):.4f} "
            f"(correlation {correlation:.2f}), mean {np.mean((mean - truth) ** 2):.4f}, "
            f"drawn {drawn:.4f}, constant {np.var(truth):.4f}"
        )


if __name__ == "__main__":
    main()

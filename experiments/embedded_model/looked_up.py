"""Does layer LOOKED_UP of the recipe know how probable an answer is, right after it?

    python experiments/embedded_model/looked_up.py FOLDER

FOLDER is one of the recipe's, with its checkpoint. Of sets of three for validation patients, drawn
from the posterior: correlation with the truth, and mean squared error, of what the layer says right
after each answer. Beside it the variance of the truth, the error of a constant.
"""

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from begin import embedded_config
from recipe import LOOKED_UP, RIGHT, SETS, STAGES, WRONG, Teacher, states_after

from mar.answers.tokenizer import load_tokenizer
from mar.policy.attention import group_attention
from mar.policy.model import Decoder

PATIENTS = 200
# No step of a training run draws these patients.
STEP = 99_999
TRUTH = 2


def open_teacher(folder: Path) -> Teacher:
    """The recipe's model as its checkpoint has it, at patients that it was not taught."""
    words = folder / "tokenizer"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    num_layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    wide = state["blocks.0.down.weight"].shape[1]
    config = embedded_config(len(load_tokenizer(words)))
    model = Decoder(replace(config, num_layers=num_layers, intermediate_size=wide))
    model.load_state_dict(state)
    sets_only = replace(STAGES[TRUTH], bare=0, prompts=0, sets=PATIENTS, rows=1)
    teacher = Teacher(folder, words, model, 0, (*STAGES[:TRUTH], sets_only))
    teacher.stage, teacher.step = TRUTH, STEP
    return teacher


@torch.no_grad()
def said_and_true(teacher: Teacher) -> dict[int, list[tuple[float, float]]]:
    """Right after each answer, by its slot: what the layer says, and the truth."""
    (lesson,) = teacher.lessons(teacher.stages[TRUTH])
    packed = lesson.batch.packed
    model = teacher.model
    with states_after(model, LOOKED_UP) as states:
        model.hidden(packed.ids, packed.positions, group_attention(packed))
    places = lesson.looked_up.places
    logits = model.norm(states[0][packed.predict_from[places]]) @ model.head_weight.T
    right_id, wrong_id = (teacher.encode(text)[0] for text in (RIGHT, WRONG))
    said = torch.softmax(logits[:, [right_id, wrong_id]], dim=-1)[:, 0]
    # A bag holds what counts for right, then for wrong.
    true_share = lesson.looked_up.bags.weights.view(-1, 2) / lesson.looked_up.bags.counts[:, None]

    pairs = defaultdict(list)
    for number, both in enumerate(zip(said.tolist(), true_share[:, 0].tolist(), strict=True)):
        pairs[number % SETS.num_answers].append(both)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    for slot, pairs in said_and_true(open_teacher(parser.parse_args().folder)).items():
        said, true = np.array(pairs).T
        correlation = np.corrcoef(said, true)[0, 1]
        error = np.mean((said - true) ** 2)
        print(
            f"slot {slot + 1}: correlation {correlation:.2f}, squared error {error:.4f}, "
            f"of a constant {np.var(true):.4f}"
        )


if __name__ == "__main__":
    main()

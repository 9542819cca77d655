"""The embedded model's recipe: what the layers below the last are asked for."""

import sys
from pathlib import Path

import pytest
import torch

from mar.learn.demonstrations import DrawnText, soft_target_loss
from mar.policy.sources import EMBEDDED
from mar.policy.weights import load_model

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "embedded_model"


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(FOLDER))
    try:
        import recipe
    finally:
        sys.path.remove(str(FOLDER))
    return recipe


@pytest.fixture(scope="module")
def teacher(recipe, tmp_path_factory):
    stages = (recipe.Stage("both", 1, 1e-3, bare=1, prompts=2, sets=2, rows=2),)
    out = tmp_path_factory.mktemp("recipe")
    return recipe.Teacher(out, EMBEDDED, load_model(EMBEDDED), 0, stages)


def test_right_after_an_answer_the_posterior_and_its_probability_are_asked_for(recipe):
    numbers = {"1": [1], "0": [0], "flu": [5], "flux": [5, 6], "cold": [7], "0.25": [0, 2]}

    def encode(text):
        return numbers.get(text, [9, 9])

    names = ["flu", "flux", "cold"]
    pieces = [
        "<answer1>",
        DrawnText(names, [0.25, 0.25, 0.5], chosen=2),
        "</answer1>",
        DrawnText(["0.25"], [1.0], chosen=0),
        "<answer2>",
        # Without the first one; what counts is its probability among all.
        DrawnText(["flu", "flux"], [0.5, 0.5], chosen=0),
        "</answer2>",
        DrawnText(["0.25"], [1.0], chosen=0),
        "<end>",
    ]
    bags = recipe.bags_after_answers(pieces, encode, right_id=1, wrong_id=0)
    # Two names begin with the same token.
    counts = recipe.AFTER_ANSWER_COUNTS
    posterior = {5: 0.5 * counts, 7: 0.5 * counts}
    first = (posterior, {1: 0.5 * counts, 0: 0.5 * counts})
    second = (posterior, {1: 0.25 * counts, 0: 0.75 * counts})
    rest = [None] * 3  # of a closing tag, and of a confidence
    expected = [*[None] * 3, first, *rest, *[None] * 3, second, *rest, *[None] * 3]
    assert bags == expected


def test_the_loss_of_the_last_layer_is_that_of_the_demonstrations(recipe, teacher):
    for lesson in teacher.lessons(teacher.stages[0]):
        loss, excess = recipe.loss_and_excess(teacher.model, lesson, early=0.0)
        expected = soft_target_loss(teacher.model, lesson.batch)
        torch.testing.assert_close(loss, expected)
        counted = lesson.batch.num_counted
        assert excess == pytest.approx((loss.item() - lesson.batch.entropy) * counted, rel=1e-4)


def test_each_lower_layer_adds_what_it_is_asked(recipe, teacher):
    *_, sets = teacher.lessons(teacher.stages[0])
    nothing = [{}] * len(sets.early)
    losses = []
    for early in (nothing, sets.early):
        for looked_up in (nothing, sets.looked_up):
            lesson = recipe.Lesson(sets.batch, early, looked_up)
            losses.append(recipe.loss_and_excess(teacher.model, lesson, early=1.0)[0].item())
    neither, of_looked_up, of_early, both = losses
    assert neither < of_looked_up < both
    assert neither < of_early < both
    assert both == pytest.approx(of_early + of_looked_up - neither, rel=1e-4)

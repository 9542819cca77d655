"""The embedded model's recipe: what the layers below the last are asked for."""

from types import SimpleNamespace

import pytest
import torch

from experiments.embedded_model import measure, recipe
from mar.learn.demonstrations import DrawnText, soft_target_loss
from mar.policy.sources import EMBEDDED
from mar.policy.weights import load_model
from mar.records import Example, Gold


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    stages = (recipe.Stage("both", 1, 1e-3, bare=1, prompts=2, sets=2, rows=2),)
    out = tmp_path_factory.mktemp("recipe")
    return recipe.Teacher(out, EMBEDDED, load_model(EMBEDDED), 0, stages)


NUMBERS = {"1": [1], "0": [0], "flu": [5], "flux": [5, 6], "cold": [7], "0.25": [0, 2]}


def encode(text):
    return NUMBERS.get(text, [9, 9])


NAMES = ["flu", "flux", "cold"]
PIECES = [
    "<answer1>",
    DrawnText(NAMES, [0.25, 0.25, 0.5], chosen=2, kind="answer"),
    "</answer1>",
    DrawnText(["0.25"], [1.0], chosen=0, kind="confidence"),
    "<answer2>",
    # Without the first one; what counts is its probability among all.
    DrawnText(["flu", "flux"], [0.5, 0.5], chosen=0, kind="answer"),
    "</answer2>",
    DrawnText(["0.25"], [1.0], chosen=0, kind="confidence"),
    "<end>",
]
# Tokens: 2 of a tag, 1 of an answer, 2 of a tag, 2 of a confidence; twice, then 2 and the stop token.
AFTER_ANSWERS = (3, 10)
OF_CONFIDENCES = (5, 6, 7, 12, 13, 14)


def test_right_after_an_answer_the_posterior_and_its_probability_are_asked_for():
    targets = [{100 + place: 1.0} for place in range(17)]
    early, looked_up = recipe.bags_below(PIECES, targets, encode, after=4.0)
    # Two names begin with the same token.
    assert [early[place] for place in AFTER_ANSWERS] == [{5: 2.0, 7: 2.0}] * 2
    assert looked_up[3] == {1: 2.0, 0: 2.0}
    assert looked_up[10] == {1: 1.0, 0: 3.0}
    assert [place for place, bag in enumerate(looked_up) if bag] == [*AFTER_ANSWERS]


def test_the_early_layer_is_asked_what_the_last_one_is_but_for_no_confidence():
    targets = [{100 + place: 1.0} for place in range(17)]
    early, looked_up = recipe.bags_below(PIECES, targets, encode, after=0.0)
    expected = [{} if place in OF_CONFIDENCES else targets[place] for place in range(17)]
    assert early == expected
    assert not any(looked_up)


def test_no_lesson_asks_the_early_layer_for_a_confidence(teacher):
    """Of forms and sets drawn as in training: nothing is asked where a digit is predicted."""
    digits = {teacher.encode(str(digit))[0] for digit in range(10)}
    for lesson in teacher.lessons(teacher.stages[0]):
        targets = lesson.batch.packed.targets[lesson.early.places].tolist()
        assert targets
        assert not digits & set(targets)


def test_the_loss_of_the_last_layer_is_that_of_the_demonstrations(teacher):
    for lesson in teacher.lessons(teacher.stages[0]):
        loss, excess = recipe.loss_and_excess(teacher.model, lesson, early=0.0)
        expected = soft_target_loss(teacher.model, lesson.batch)
        torch.testing.assert_close(loss, expected)
        counted = lesson.batch.num_counted
        assert excess == pytest.approx((loss.item() - lesson.batch.entropy) * counted, rel=1e-4)


def test_each_lower_layer_adds_what_it_is_asked(teacher):
    *_, sets = teacher.lessons(teacher.stages[0])
    nothing = recipe.asked([])
    losses = []
    for early in (nothing, sets.early):
        for looked_up in (nothing, sets.looked_up):
            lesson = recipe.Lesson(sets.batch, early, looked_up)
            losses.append(recipe.loss_and_excess(teacher.model, lesson, early=1.0)[0].item())
    neither, of_looked_up, of_early, both = losses
    assert neither < of_looked_up < both
    assert neither < of_early < both
    assert both == pytest.approx(of_early + of_looked_up - neither, rel=1e-4)


def test_a_layer_that_is_the_last_is_not_asked(teacher, monkeypatch):
    *_, sets = teacher.lessons(teacher.stages[0])
    of_last = recipe.loss_and_excess(teacher.model, sets, early=0.0)[0]
    num_layers = len(teacher.model.blocks)
    monkeypatch.setattr(recipe, "EARLY", num_layers)
    monkeypatch.setattr(recipe, "LOOKED_UP", num_layers + 1)
    assert recipe.loss_and_excess(teacher.model, sets, early=1.0)[0] == of_last


def test_another_seed_has_other_patients_and_a_step_the_same_ones_again(teacher):
    def first_question(seed):
        of_seed = recipe.Teacher(teacher.folder, EMBEDDED, teacher.model, seed, teacher.stages)
        packed = next(of_seed.lessons(teacher.stages[0])).batch.packed
        start, length = packed.prompts[0][:2]
        return packed.ids[start : start + length].tolist()

    assert first_question(0) == first_question(0)
    assert first_question(0) != first_question(1)


def test_in_a_bare_stage_the_bare_question_is_measured(teacher, monkeypatch):
    monkeypatch.setattr(recipe, "posterior_kl", lambda *asked: 1.0 if asked[-1] else 2.0)
    found = recipe.measured(teacher.model, teacher.tokenizer, 2, bare=True)
    assert found == {"posterior_kl": 1.0}
    found = recipe.measured(teacher.model, teacher.tokenizer, 2, bare=False)
    assert found["posterior_kl"] == 2.0


def test_a_stage_without_forms_is_a_bare_one(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(recipe, "measured", lambda *args: asked.append(args[-1]) or {})
    stages = (
        recipe.Stage("of bare questions", 1, 1e-3, bare=1),
        recipe.Stage("of both", 1, 1e-3, bare=1, prompts=1),
    )
    teacher = recipe.Teacher(tmp_path, EMBEDDED, load_model(EMBEDDED), 0, stages)
    teacher.go("of both")
    assert asked == [True, False]


def test_the_errors_of_slots_by_hand():
    def a_set(answers, confidences, repeated=(False, False), reason=None):
        golds = (Gold("flu", probability=0.75), Gold("cold", probability=0.25))
        prompt = SimpleNamespace(example=Example("1", "x", "?", golds))
        return SimpleNamespace(
            prompt=prompt,
            answers=answers,
            confidences=confidences,
            repeated=repeated,
            reason=reason,
        )

    rollouts = [
        a_set(("flu", "cold"), (0.5, 0.25)),
        a_set(("cold", "cold"), (0.25, 0.5), repeated=(False, True)),
        a_set(("flu", None), (0.9, None), reason="no_answer"),
    ]
    assert measure.slot_errors(rollouts) == [0.25**2 / 2, 0.5**2 / 2]
    # The truths of the slots are 0.75, 0.25 and 0.25, 0.
    assert measure.slot_correlations(rollouts) == pytest.approx([1.0, -1.0])


def test_every_stage_begins_with_new_optimizers(tmp_path):
    stages = tuple(recipe.Stage(name, 0, 1e-3, bare=1) for name in ("first", "second"))
    teacher = recipe.Teacher(tmp_path, EMBEDDED, load_model(EMBEDDED), 0, stages)
    of_first = teacher.optimizers
    teacher.go("first")
    assert teacher.optimizers is of_first
    teacher.go("second")
    assert teacher.optimizers is not of_first


def test_until_ends_the_training_also_after_that_stage(tmp_path):
    """A checkpoint in a later stage: nothing is left to do."""
    stages = tuple(recipe.Stage(name, 1, 1e-3, bare=1) for name in ("first", "second"))
    teacher = recipe.Teacher(tmp_path, EMBEDDED, load_model(EMBEDDED), 0, stages)
    teacher.stage = 1
    teacher.go("first")
    assert (teacher.stage, teacher.step) == (1, 0)
    assert not (tmp_path / "second").exists()


def test_a_stage_of_the_last_layer_moves_nothing_else_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "SAVE_EVERY", 1)
    monkeypatch.setattr(recipe, "ITEMS_AT_THE_END", 2)
    all_of_it = recipe.Stage("all", 0, 1e-3, bare=1)
    last = recipe.Stage("last", 2, 1e-3, bare=0, prompts=1, early=0.0, only_last=True)

    def teacher_in(folder):
        folder.mkdir(exist_ok=True)
        model = load_model(EMBEDDED)
        return recipe.Teacher(folder, EMBEDDED, model, 0, (all_of_it, last))

    whole = teacher_in(tmp_path / "whole")
    whole.go("last")
    before = dict(load_model(EMBEDDED).named_parameters())
    num_layers = len(whole.model.blocks)
    for name, parameter in whole.model.named_parameters():
        own = name.startswith((f"blocks.{num_layers - 1}.", "norm."))
        assert torch.equal(parameter, before[name]) != own

    cut = teacher_in(tmp_path / "cut")
    cut.begin(1)
    rate = cut.rate
    monkeypatch.setattr(cut, "rate", lambda stage: 1 / 0 if cut.step else rate(stage))
    with pytest.raises(ZeroDivisionError):
        cut.teach(last)
    further = teacher_in(tmp_path / "cut")
    further.resume()
    assert (further.stage, further.step) == (1, 1)
    further.go("last")
    for name, parameter in further.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name))

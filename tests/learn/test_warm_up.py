"""A shared beginning changes nothing, and the masses of single answers are probabilities."""

import numpy as np
import pytest
import torch

from mar.answers.prompts import build_prompt
from mar.answers.tokenizer import load_tokenizer
from mar.errors import UserError
from mar.learn.demonstrations import PLAIN, SHORT, piece_encoder, soft_target_loss
from mar.learn.warm_up import Asking, answer_masses, make_form_batch, num_shared, pack_sharing
from mar.policy.lora import AdaptedLinear, add_adapters
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model
from mar.records import Example, Gold
from mar.tasks import clinic

SETS = SHORT[3]
FOLDER = resolve_model("embedded", "embedded", None)[0]


@pytest.fixture(scope="module")
def asking():
    tokenizer = load_tokenizer(FOLDER)
    return Asking(
        tokenizer, piece_encoder(tokenizer), clinic.NOUN, request_first=True, explain_decimals=False
    )


def test_a_shared_beginning_changes_no_loss(asking):
    model = load_model(FOLDER, torch.float64)
    examples = clinic.load("train", 6, 5)
    names = [gold.name for gold in examples[0].golds]
    together = make_form_batch(examples, SETS, asking, np.random.default_rng(0), names)
    rng = np.random.default_rng(0)
    alone = [make_form_batch([example], SETS, asking, rng, names) for example in examples]
    counts = [batch.num_counted for batch in alone]
    assert sum(counts) == pytest.approx(together.num_counted)
    assert len(together.packed.ids) < 0.7 * sum(len(batch.packed.ids) for batch in alone)
    losses = [soft_target_loss(model, batch).item() for batch in alone]
    mean = np.average(losses, weights=counts)
    assert soft_target_loss(model, together).item() == pytest.approx(mean)


def test_answers_to_questions_of_other_steps_stand_where_a_batch_has_too_few(asking):
    example = Example("q1", "words", "Yes, no or maybe?", (Gold("yes"),))
    rng = np.random.default_rng(0)
    batch = make_form_batch([example], SETS, asking, rng, others=["no", "maybe"])
    text = asking.tokenizer.decode(batch.packed.targets.tolist())
    assert all(f">{name}</answer" in text for name in ("yes", "no", "maybe"))
    with pytest.raises(UserError, match="q1 has too few different answers for 3 slots"):
        make_form_batch([example], SETS, asking, rng, others=["no"])


def test_what_nothing_shares_is_packed_as_groups():
    packed = pack_sharing([[1, 2], [3, 4]], [[5, 6], [7]])
    assert packed.ids.tolist() == [1, 2, 5, 3, 4] and packed.targets.tolist() == [5, 6, 7]
    packed = pack_sharing([[1, 2], [1, 4]], [[5, 6], [7]])
    assert packed.ids.tolist() == [1, 2, 5, 4] and packed.targets.tolist() == [5, 6, 7]
    assert packed.predict_from.tolist() == [1, 2, 3]


def test_each_prompt_keeps_a_token_of_its_own():
    assert num_shared([[1, 2, 3], [1, 2, 4]]) == 2
    assert num_shared([[1, 2, 3], [1, 2, 3]]) == 2
    assert num_shared([[1], [2]]) == 0


def test_masses_are_probabilities_of_the_golds(asking):
    model, examples = load_model(FOLDER, torch.float64), clinic.load("validation", 6, 0)
    q = answer_masses(model, examples, asking, at_once=4)
    assert q.shape == (6, len(examples[0].golds))
    assert np.all(q > 0) and np.all(q.sum(axis=1) <= 1 + 1e-6)
    assert np.allclose(q, answer_masses(model, examples, asking, at_once=1))


def test_adapters_above_weights_in_bfloat16_compute_nearly_the_same(asking):
    examples = clinic.load("validation", 2, 0)
    full, half = load_model(FOLDER), load_model(FOLDER)
    add_adapters(full, 4, 2.0, "")
    add_adapters(half, 4, 2.0, "", torch.bfloat16)
    for model in (full, half):
        generator = torch.Generator().manual_seed(1)
        for layer in model.modules():
            if isinstance(layer, AdaptedLinear):
                noise = torch.randn(layer.lora_b.shape, generator=generator)
                layer.lora_b.data.copy_(0.02 * noise)
    a, b = (answer_masses(model, examples, asking) for model in (full, half))
    assert not np.array_equal(a, b) and np.abs(a - b).max() < 0.02
    batch = make_form_batch(examples, PLAIN, asking, np.random.default_rng(0), [])
    soft_target_loss(half, batch).backward()
    for layer in half.modules():
        if isinstance(layer, AdaptedLinear):
            assert layer.weight.dtype == torch.bfloat16 and layer.weight.grad is None
            assert layer.lora_b.dtype == torch.float32 and layer.lora_b.grad is not None


def test_the_request_stands_above_the_question(asking):
    example = clinic.load("train", 1, 0)[0]
    below, above = (
        build_prompt(example, PLAIN, asking.tokenizer, clinic.NOUN, request_first=first).text
        for first in (False, True)
    )
    assert below.index(example.question) < below.index("<answer>")
    assert above.index(example.question) > above.index("<answer>")


def test_a_template_that_opens_thoughts_is_refused(asking, monkeypatch):
    monkeypatch.setattr("mar.answers.prompts.think_state", lambda rendered: "open")
    with pytest.raises(UserError, match="opens <think>"):
        asking.prompt_ids(clinic.load("train", 1, 0)[0], PLAIN)

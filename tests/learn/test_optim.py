"""The schedule, the optimizer's groups, and the proof that the whole loss path moves a policy towards what is paid."""

import numpy as np
import pytest
import torch
from torch import nn

from mar.config import OptimOptions
from mar.errors import UserError
from mar.learn.advantages import token_advantages
from mar.learn.batch import make_batch, micro_batches
from mar.learn.losses import policy_gradient, token_weights
from mar.learn.optim import (
    SCHEDULES,
    learning_rate,
    make_optimizer,
    make_optimizers,
    set_learning_rate,
)
from mar.policy.packing import pack_groups
from mar.records import Completion, Example, Prompt, Rollout
from mar.sample.draws import SamplingParams
from mar.sample.rollout import sample


def rates(steps, warmup, schedule):
    return [learning_rate(step, steps, 2.0, warmup, schedule) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_ends(schedule):
    values = rates(100, 0.05, schedule)
    assert values[:6] == pytest.approx(
        [0.4, 0.8, 1.2, 1.6, 2.0, 2.0]
    )  # the first update moves, the warm-up reaches the full rate
    assert max(values) == 2.0 and min(values) > 0
    middle, last = {"linear": (1.0, 2 / 95), "cosine": (1.0, 0.0006), "constant": (2.0, 2.0)}[
        schedule
    ]
    assert values[52] == pytest.approx(middle, abs=0.03) and values[-1] == pytest.approx(
        last, abs=1e-4
    )
    assert values[5:] == sorted(values[5:], reverse=True)
    assert learning_rate(100, 100, 2.0, 0.05, schedule) == pytest.approx(
        2.0 if schedule == "constant" else 0.0
    )


def test_short_runs_have_a_rate_too():
    for schedule in SCHEDULES:
        assert rates(1, 0.05, schedule) == [2.0] and rates(3, 0.0, schedule)[0] == 2.0
        assert rates(4, 1.0, schedule) == [0.5, 1.0, 1.5, 2.0]
    with pytest.raises(ValueError, match="'step' *; *known: linear"):
        learning_rate(5, 10, 1.0, 0.0, "step")


def test_only_matrices_decay(tiny_model):
    model = tiny_model("Qwen2ForCausalLM")
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, 1.0, (0.9, 0.95), 1e-8, 0.1)
    set_learning_rate(optimizer, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, p in model.named_parameters():
        decays = "norm" not in name and "bias" not in name
        torch.testing.assert_close(
            p.detach(), before[name] * (0.95 if decays else 1.0), atol=1e-12, rtol=0
        )
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_what_is_not_trainable_stays(tiny_model):
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, 0.1, (0.9, 0.95), 1e-8, 0.1, r"^norm|blocks\.1\..*down")
    packed, whole = pack_groups([[1, 2]], [[[3, 4, 5]]]), tiny_model()
    for policy in (model, whole):
        policy(packed, 1.0)[0].sum().backward()
    for (name, p), full in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert p.grad is None or torch.equal(p.grad, full.grad), name
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {
        name for name in before if name == "norm.weight" or name.startswith("blocks.1.down")
    }
    assert all((p.grad is not None) == (name in moved) for name, p in model.named_parameters())
    with pytest.raises(UserError, match="model.trainable='nrm' is found in no parameter's name"):
        make_optimizer(model, 0.1, (0.9, 0.95), 1e-8, 0.1, "nrm")


def as_rollout(asked, completion, components):
    ids = completion.ids
    return Rollout(
        asked,
        completion,
        "",
        (),
        (),
        (),
        (),
        None,
        np.array(components),
        np.minimum(np.arange(len(ids)), 1),
        float(sum(components)),
    )


def learn(model, optimizer, groups, first_open):
    """One update, as the training loop makes it."""
    batch = make_batch(groups, np.array(first_open))
    advantages = token_advantages(batch, "to_go", "leave_one_out", "none")
    weights = token_weights(batch.completion_mask, "token_mean", 8)
    optimizer.zero_grad()
    for micro in micro_batches(batch, 30):
        logprobs, _, _ = model(micro.packed, 1.0)
        policy_gradient(
            logprobs,
            *(
                micro.flat(column, batch.completion_mask).to(logprobs.dtype)
                for column in (advantages, weights)
            ),
        ).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def test_an_update_raises_what_was_rewarded(tiny_model):
    model = tiny_model(dtype=torch.float32)
    rng, groups = np.random.default_rng(0), []
    for i, winner in enumerate((0, 2)):
        asked = Prompt(
            Example(str(i), "test", "?", ()), "?", tuple(rng.integers(0, 23, 5 + i).tolist())
        )
        ids = [rng.integers(0, 23, 4) for _ in range(4)]
        paid = [[1.0 if g == winner else 0.0, 0.0] for g in range(4)]
        groups.append(
            [
                as_rollout(asked, Completion(g, ids[g], np.zeros(4), np.zeros(4), "stop"), paid[g])
                for g in range(4)
            ]
        )

    def first_token_logprobs():  # to_go: the first component is decided by the first token, which alone is paid
        (micro,) = micro_batches(make_batch(groups, np.array([0, 1])), 10**6)
        with torch.no_grad():
            return model(micro.packed, 1.0)[0].reshape(2, 4, 4)[:, :, 0]

    before = first_token_logprobs()
    learn(model, torch.optim.SGD(model.parameters(), lr=0.05), groups, [0, 1])
    change = first_token_logprobs() - before
    for i, winner in enumerate((0, 2)):
        assert change[i, winner] > 0 and change[i, winner] > max(
            change[i, g] for g in range(4) if g != winner
        )


def test_muon_takes_the_matrices_inside_the_blocks(tiny_model):
    """And AdamW the rest; a pattern that leaves it none is refused in a sentence."""
    model = tiny_model()
    (adamw, rate), (muon, muon_rate) = make_optimizers(model, 0.01, OptimOptions(), "", muon=True)
    inside = {id(p) for p in model.blocks.parameters() if p.ndim == 2}
    assert {id(p) for group in muon.param_groups for p in group["params"]} == inside
    rest = {id(p) for p in model.parameters()} - inside
    assert {id(p) for group in adamw.param_groups for p in group["params"]} == rest
    assert muon_rate == 10 * rate == 0.1
    with pytest.raises(UserError, match="model.trainable='norm' trains none of them"):
        make_optimizers(model, 0.01, OptimOptions(), "norm", muon=True)


def test_the_whole_loop_finds_the_rewarded_completion(tiny_model):
    """Sampling, credit, loss and optimizer together: each of two prompts learns its own two tokens, each paid on its own."""
    model, wanted = tiny_model(vocab=7, dtype=torch.float32, layers=1), ((3, 5), (6, 1))
    prompts = [
        Prompt(Example(str(i), "test", "?", ()), "?", ids)
        for i, ids in enumerate(((1, 2, 3), (4, 2)))
    ]
    optimizer, params = make_optimizer(model, 0.01, (0.9, 0.95), 1e-8, 0.0), SamplingParams(2)
    totals = []
    for step in range(45):
        sampled, _ = sample(model, prompts, 24, params, 1000, (0, "train", step))
        groups = [
            [as_rollout(p, c, (c.ids == target).astype(float)) for c in group]
            for p, group, target in zip(prompts, sampled, wanted, strict=True)
        ]
        totals.append(np.mean([r.total for group in groups for r in group]))
        learn(model, optimizer, groups, [0, 1])
    assert totals[0] < 0.7 and np.mean(totals[-5:]) > 1.8  # of 2

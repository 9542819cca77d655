"""One step is the same step however it is cut into micro-batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mar.learn.advantages import token_advantages, zero_group_frac
from mar.learn.batch import make_batch, micro_batches
from mar.learn.learner import Learner
from mar.learn.losses import AGGREGATIONS, policy_gradient, token_weights
from mar.learn.update import update
from mar.records import Completion, Example, Prompt, Rollout
from mar.run.compose import compose

FIRST_OPEN = np.array([0, 1, 2])  # three components, three segments
PROMPTS, LENGTHS = (6, 1, 11), ((5, 1, 9, 3), (2, 7, 4, 4), (1, 1, 12, 6))


def fake_rollout(asked, ids, components, segments=None, sample_index=0):
    """A rollout of which only what the batch reads is real."""
    zeros = np.linspace(-2, -1, len(ids), dtype=np.float32)
    segments = np.sort(np.arange(len(ids)) % 3) if segments is None else np.array(segments)
    done = Completion(sample_index, np.array(ids), zeros, zeros - 1, "stop")
    return Rollout(
        asked,
        done,
        "",
        (),
        (),
        (),
        (),
        None,
        np.array(components),
        segments,
        float(np.sum(components)),
    )


def fake_groups(prompts=PROMPTS, lengths=LENGTHS, vocab=23):
    rng = np.random.default_rng(0)
    groups = []
    for i, (n, group) in enumerate(zip(prompts, lengths, strict=True)):
        asked = Prompt(
            Example(str(i), "test", "?", ()), "?", tuple(rng.integers(0, vocab, n).tolist())
        )
        groups.append(
            [fake_rollout(asked, rng.integers(0, vocab, m), rng.normal(size=3)) for m in group]
        )
    return groups


def step_gradients(model, batch, max_tokens, aggregation):
    """Gradients of a whole step, its loss, and the number of micro-batches."""
    advantages, weights = (
        token_advantages(batch, "to_go", "leave_one_out", "none"),
        token_weights(batch.loss_mask, aggregation, 12),
    )
    model.zero_grad()
    loss, count = 0.0, 0
    for micro in micro_batches(batch, max_tokens):
        logprobs, _, _ = model(micro.packed, 0.7)
        part = policy_gradient(
            logprobs,
            *(micro.flat(column, batch.completion_mask) for column in (advantages, weights)),
        )
        part.backward()
        loss, count = loss + part.item(), count + 1
    return torch.cat([p.grad.flatten() for p in model.parameters()]), loss, count


def test_tokens_that_the_sampler_put_in_are_not_trained_on(tiny_model):
    groups = fake_groups()
    first = groups[0][2]
    groups[0][2] = replace(first, completion=replace(first.completion, inserted=(2, 5)))
    batch = make_batch(groups, FIRST_OPEN)
    expected = batch.completion_mask.clone()
    expected[2, 2:5] = False
    assert batch.completion_mask[2].sum() == 9 and torch.equal(batch.loss_mask, expected)

    def gradient(change):  # through the update of the training loop
        model = tiny_model()
        config = compose(
            ["algo.temperature=0.7", "train.micro_batch_tokens=20", "optim.grad_clip=1e9"]
        )
        sgd = torch.optim.SGD(model.parameters(), 0.0)
        update(Learner(config, model, sgd), batch, {"advantages": advantages + change}, 0)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    advantages = token_advantages(batch, "to_go", "leave_one_out", "none")
    inside, beside = torch.zeros_like(advantages), torch.zeros_like(advantages)
    inside[2, 2:5], beside[2, 5] = 100.0, 100.0
    assert torch.equal(gradient(0 * inside), gradient(inside))
    assert not torch.allclose(gradient(0 * inside), gradient(beside))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_do_not_depend_on_the_cut(aggregation, tiny_model):
    model, batch = tiny_model(), make_batch(fake_groups(), FIRST_OPEN)
    whole, loss, count = step_gradients(model, batch, 10**6, aggregation)
    assert count == 1 and whole.norm() > 0.01
    for max_tokens, expected in (
        (1, 12),
        (14, None),
        (40, None),
    ):  # single rows; slices of a group; groups
        cut, cut_loss, count = step_gradients(model, batch, max_tokens, aggregation)
        assert count == expected or 1 < count < 12
        assert (cut - whole).norm() < 1e-10 * whole.norm()
        assert cut_loss == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize("max_tokens", [1, 14, 20, 40, 10**6])
def test_columns_meet_the_models_outputs(max_tokens):
    groups = fake_groups()
    batch = make_batch(groups, FIRST_OPEN)
    rows = [rollout for group in groups for rollout in group]
    ids = torch.zeros(batch.completion_mask.shape, dtype=torch.int64)
    for i, rollout in enumerate(rows):
        ids[i, : len(rollout.completion.ids)] = torch.from_numpy(rollout.completion.ids)
    seen = 0
    for micro in micro_batches(batch, max_tokens):
        assert torch.equal(micro.flat(ids, batch.completion_mask), micro.packed.targets)
        assert micro.rows.start == seen
        seen = micro.rows.stop
        assert len(micro.packed.ids) <= max_tokens or seen - micro.rows.start == 1
        assert len(micro.packed.rows) == seen - micro.rows.start
        if max_tokens == 10**6:
            assert len(micro.packed.prompts) == 3  # no prompt is computed twice
    assert seen == len(rows)


def test_batch_by_hand():
    asked = [Prompt(Example(str(i), "test", "?", ()), "?", (1, 2)) for i in range(2)]
    groups = [
        [
            fake_rollout(asked[0], [5, 6, 7], [1.0, 0.0, 0.5], [0, 1, 2]),
            fake_rollout(asked[0], [8], [0.0, 0.0, -1.0], [0]),
        ],
        [
            fake_rollout(asked[1], [5, 6], [0.0, 2.0, 0.0], [0, 0]),
            fake_rollout(asked[1], [9, 9], [2.0, 0.0, 0.0], [1, 2]),
        ],
    ]
    batch = make_batch(groups, FIRST_OPEN)
    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    assert (
        batch.completion_mask.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
        and batch.num_tokens == 8
    )
    assert batch.totals.tolist() == [1.5, -1.0, 2.0, 2.0] and zero_group_frac(batch) == 0.5
    assert batch.sampler_logprobs.tolist()[2] == [-2, -1, 0] and batch.full_logprobs.tolist()[
        2
    ] == [-3, -2, 0]
    # against the other completion of the prompt: components (1, 0, 1.5) and their negatives; (-2, 2, 0) and theirs
    to_go = token_advantages(batch, "to_go", "leave_one_out", "none")
    assert to_go.tolist() == [[2.5, 1.5, 1.5], [-2.5, 0, 0], [0, 0, 0], [-2, 0, 0]]
    whole = token_advantages(batch, "set", "none", "none")
    assert whole.tolist() == [
        [1.5, 1.5, 1.5],
        [-1, 0, 0],
        [2, 2, 0],
        [2, 2, 0],
    ]  # nothing outside the completions


def test_token_weights_by_hand():
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
    by_length = torch.tensor([1.0, 1 / 3, 1 / 2], dtype=torch.float64)[:, None]
    for aggregation, expected in (
        ("token_mean", 1 / 6),
        ("sequence_mean", by_length / 3),
        ("constant", 1 / 15),
    ):
        weights = token_weights(mask, aggregation, 5)
        torch.testing.assert_close(
            weights, mask * torch.as_tensor(expected, dtype=torch.float64), atol=1e-15, rtol=0
        )
    assert [token_weights(mask, a, 5).sum().item() for a in AGGREGATIONS] == pytest.approx(
        [1, 1, 6 / 15]
    )
    with pytest.raises(ValueError, match="mean_of_means"):
        token_weights(mask, "mean_of_means", 5)


def test_one_token_completions_learn_and_empty_ones_are_refused(tiny_model):
    batch = make_batch(fake_groups((3, 2), ((1, 1), (1, 1))), FIRST_OPEN)
    gradients, loss, _ = step_gradients(tiny_model(), batch, 10**6, "token_mean")
    assert np.isfinite(loss) and gradients.norm() > 0
    with pytest.raises(ValueError, match="group 1 has an empty"):
        list(micro_batches(make_batch(fake_groups((3, 2), ((1, 1), (1, 0))), FIRST_OPEN), 10**6))


@pytest.mark.parametrize(
    ("max_tokens", "ranks", "expected"),
    [
        (10**6, 1, [61]),
        (10**6, 2, [34, 27]),
        (10**6, 3, [20, 14, 27]),
        (10**6, 4, [20, 14, 27]),
        (58, 2, [34, 27]),
        (26, 2, [20, 14, 22, 16]),
    ],
)
def test_every_rank_gets_as_many_micro_batches_of_the_smallest_size(max_tokens, ranks, expected):
    """Positions computed in each; no finer than a group, or the part of one that fits the limit."""
    cut = list(micro_batches(make_batch(fake_groups(), FIRST_OPEN), max_tokens, ranks))
    assert [len(m.packed.ids) for m in cut] == expected
    assert [row for m in cut for row in range(m.rows.start, m.rows.stop)] == list(range(12))

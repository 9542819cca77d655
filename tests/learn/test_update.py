"""What happens between rewards and the optimizer: rules on the batch, the critic's estimates, minibatches, guards."""

import copy
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mar.learn.advantages import (
    best_of_k_advantages,
    token_advantages,
    whiten,
    with_kl_cost,
    with_truncation_rule,
)
from mar.learn.batch import make_batch, micro_batches
from mar.learn.gae import explained_variance, gae, token_rewards
from mar.learn.gradient_variance import variance_ratio
from mar.learn.learner import Learner
from mar.learn.losses import (
    LARGEST,
    TOKEN_MEAN,
    UPDATE_MEAN,
    Logged,
    policy_gradient,
    token_weights,
)
from mar.learn.optim import make_optimizer
from mar.learn.update import (
    _add_up,
    _mean_over_updates,
    _minibatches,
    advantage_columns,
    compute_advantages,
    entropy_coef,
    entropy_weights,
    one_pass,
    policy_loss,
    update,
)
from mar.policy.critic import Critic
from mar.policy.distributed import ALONE
from mar.policy.model import Decoder, ModelConfig
from mar.run import checkpoint
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.resume import resume
from tests.learn.test_batch import FIRST_OPEN, fake_groups, fake_rollout

F64 = torch.float64
SIZES = [
    "algo.prompts_per_step=3",
    "algo.group_size=4",
    "model.max_completion_tokens=12",
    "train.micro_batch_tokens=30",
]


def learner_of(model, *words):
    """A learner on random completions whose log-probabilities are the model's own."""
    config = compose([*SIZES, "optim.lr=1e-2", "optim.warmup_frac=0", *words])
    critic = Critic(model) if config.algo.baseline == "value" else None
    critic_optimizer = make_optimizer(critic, 1e-2, (0.9, 0.95), 1e-8, 0.0) if critic else None
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.95), 1e-8, 0.0)
    return Learner(config, model, optimizer, critic=critic, critic_optimizer=critic_optimizer)


def logprobs_of(model, batch, temperature=1.0):
    return one_pass(lambda packed: model(packed, temperature)[0], batch, 10**6, ALONE)


def batch_of(model, temperature=1.0):
    batch = make_batch(fake_groups(), FIRST_OPEN)
    own = logprobs_of(model, batch, temperature)
    return replace(batch, sampler_logprobs=own, full_logprobs=own)


# --- rules on the batch -----------------------------------------------------------------------------------------------


def cut(groups, which):
    for i, j in which:
        groups[i][j] = replace(
            groups[i][j], completion=replace(groups[i][j].completion, finish_reason="length")
        )
    return make_batch(groups, FIRST_OPEN)


def test_truncated_completions():
    batch = cut(fake_groups(), [(0, 2), (2, 2)])  # of 9 and of 12 tokens
    assert with_truncation_rule(batch, "keep", 12, 0) is batch
    masked = with_truncation_rule(batch, "mask", 12, 0)
    gone = torch.zeros(12, dtype=torch.bool)
    gone[[2, 10]] = True
    assert torch.equal(masked.loss_mask, batch.loss_mask & ~gone[:, None]) and torch.equal(
        masked.totals, batch.totals
    )
    hard = with_truncation_rule(batch, "penalise", 12, 0).totals - batch.totals
    torch.testing.assert_close(hard, -gone.double())
    soft = with_truncation_rule(batch, "penalise", 12, 6)
    lengths = batch.completion_mask.sum(1)
    torch.testing.assert_close(
        soft.totals - batch.totals,
        -torch.where(gone, 1.0, ((lengths - 6) / 6).clamp(0, 1)).double(),
    )
    assert torch.equal(soft.components[:, :-1], batch.components[:, :-1])  # length is decided last
    with pytest.raises(ValueError, match="'drop'"):
        with_truncation_rule(batch, "drop", 12, 0)


def random_kl(batch):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch.completion_mask.shape, dtype=F64, generator=generator)


def test_a_token_pays_its_own_kl_and_that_of_later_ones():
    """With every credit, also with one scalar for the set; so do returns with a critic."""
    batch = make_batch(fake_groups(), FIRST_OPEN)
    kl = random_kl(batch)
    paid = with_kl_cost(batch, kl, 0.1)
    torch.testing.assert_close(paid.totals, batch.totals - 0.1 * (kl * batch.loss_mask).sum(1))
    expected = -0.1 * (kl * batch.loss_mask).flip(1).cumsum(1).flip(1) * batch.completion_mask

    def change(of):
        return of(paid) - of(batch)

    for credit in ("to_go", "set", "own"):
        got = change(lambda b, credit=credit: token_advantages(b, credit, "none", "none"))
        torch.testing.assert_close(got, expected)
    for credit in ("to_go", "set"):
        own = change(lambda b, credit=credit: token_rewards(b, credit))
        torch.testing.assert_close(own, -0.1 * kl * batch.loss_mask)
    # of a part of the step, too
    part, rows = paid.take([2, 0])
    assert torch.equal(part.token_costs, paid.token_costs[rows])
    assert batch.take([1])[0].token_costs is None


def test_a_long_thought_pays_for_the_token_that_left_the_reference():
    """One nat at the first of 115 tokens that one component is decided by, coefficient 0.02. Paid
    where the component is decided, 0.02 x 0.95^114 = 5.8e-5 of it came back to that token."""
    asked = fake_groups()[0][0].prompt
    segments = [0] * 115 + [1] * 3 + [2] * 2
    batch = make_batch([[fake_rollout(asked, np.arange(120), np.zeros(3), segments)]], FIRST_OPEN)
    kl = torch.zeros(1, 120, dtype=F64)
    kl[0, 0] = 1.0
    paid = with_kl_cost(batch, kl, 0.02)
    rewards = token_rewards(paid, "to_go")
    advantages, _ = gae(rewards, torch.zeros_like(rewards), batch.completion_mask, 0.95)
    assert advantages[0].tolist() == pytest.approx([-0.02] + [0.0] * 119)


def test_reinforce_pp_pays_kl_from_each_token_on():
    """A_t = r - 0.01 x the KL of token t and later ones, whitened (arXiv:2501.03262)."""
    batch = make_batch(fake_groups(), FIRST_OPEN)
    algo = compose(["+experiment=medqa", "algo=reinforce_pp"]).algo
    kl = random_kl(batch)
    got = advantage_columns(algo, batch, {"ref_logprobs": batch.full_logprobs - kl})["advantages"]
    raw = torch.zeros_like(got)
    for b, t in batch.completion_mask.nonzero().tolist():
        raw[b, t] = batch.totals[b] - 0.01 * kl[b, t:][batch.loss_mask[b, t:]].sum()
    chosen = raw[batch.loss_mask]
    expected = (raw - chosen.mean()) / chosen.std() * batch.completion_mask
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_the_best_of_k_is_chosen_by_reward_and_each_pays_its_own_kl():
    batch = make_batch(fake_groups(), FIRST_OPEN)
    paid = with_kl_cost(batch, random_kl(batch), 0.1)
    costs_alone = replace(paid, components=torch.zeros_like(paid.components))
    of_costs = token_advantages(costs_alone, "to_go", "leave_one_out", "none")
    assert of_costs.abs().max() > 0.1
    got = best_of_k_advantages(paid, 3)
    torch.testing.assert_close(got, best_of_k_advantages(batch, 3) + of_costs)


def test_whitened_advantages():
    batch = make_batch(fake_groups(), FIRST_OPEN)
    chosen = token_advantages(batch, "set", "none", "whiten")[batch.loss_mask]
    assert chosen.mean().item() == pytest.approx(
        0, abs=1e-12
    ) and chosen.std().item() == pytest.approx(1, abs=1e-6)
    same, mask = torch.full((2, 3), 0.7, dtype=F64), torch.ones(2, 3, dtype=torch.bool)
    assert whiten(same, mask).abs().max() < 1e-12 and torch.isfinite(whiten(same, ~mask)).all()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_best_of_k_is_what_a_completion_adds_to_a_set(k):
    batch = make_batch(fake_groups(), FIRST_OPEN)
    batch = replace(batch, components=batch.components.round())  # with ties
    got = best_of_k_advantages(batch, k)
    for b in range(12):
        others = [i for i in range(b // 4 * 4, b // 4 * 4 + 4) if i != b]
        r = batch.totals.tolist()
        sets = [max(r[i] for i in chosen) for chosen in itertools.combinations(others, k - 1)]
        expected = k * np.mean([max(r[b], best) - best for best in sets])
        assert got[b, 0].item() == pytest.approx(expected, abs=1e-12)
        assert torch.equal(got[b] != 0, batch.completion_mask[b] & (got[b, 0] != 0))


# --- the critic -------------------------------------------------------------------------------------------------------


def test_gae_without_values_is_to_go_credit_without_a_baseline():
    batch = make_batch(fake_groups(), FIRST_OPEN)
    for credit in ("to_go", "set"):
        rewards = token_rewards(batch, credit)
        torch.testing.assert_close(rewards.sum(1), batch.totals)
        assert not rewards[~batch.completion_mask].any()
        advantages, returns = gae(rewards, torch.zeros_like(rewards), batch.completion_mask, 1.0)
        torch.testing.assert_close(advantages, token_advantages(batch, credit, "none", "none"))
        assert torch.equal(returns, advantages)
    with pytest.raises(ValueError, match="to_go or set, not 'own'"):
        token_rewards(batch, "own")


def test_gae_is_its_sum():
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.tensor([7, 1, 4])[:, None]
    rewards, values = (torch.randn(3, 7, dtype=F64, generator=generator) * mask for _ in range(2))
    advantages, returns = gae(
        rewards, values + 5.0 * ~mask, mask, 0.9
    )  # values outside the mask are nothing
    for b, n in enumerate([7, 1, 4]):
        v = [*values[b, :n].tolist(), 0.0]
        errors = [rewards[b, t].item() + v[t + 1] - v[t] for t in range(n)]
        expected = [sum(0.9 ** (s - t) * errors[s] for s in range(t, n)) for t in range(n)]
        assert advantages[b, :n].tolist() == pytest.approx(expected) and not advantages[b, n:].any()
    torch.testing.assert_close(returns, advantages + values)


def test_explained_variance():
    returns = torch.tensor([1.0, 2, 3, 4])
    assert (
        explained_variance(returns, returns) == 1 and explained_variance(0 * returns, returns) == 0
    )
    assert explained_variance(returns, 0 * returns) is None


@pytest.mark.slow
def test_the_critic_learns_the_returns_and_leaves_the_policy_alone(tiny_model):
    model = tiny_model()
    words = ["algo=ppo", "algo.minibatches=3", "algo.kl_coef=0", "algo.critic_warmup=60"]
    words += [
        "algo.critic_lr=0.02",
        "algo.gae_lambda=1",
        "algo.value_clip=100",
    ]  # plain regression on fixed returns
    learner = learner_of(model, *words, "train.steps=300")
    before, batch = [p.clone() for p in model.parameters()], batch_of(model)
    seen = []
    for step in range(60):
        batch_now, columns = compute_advantages(learner, batch, step)
        seen.append(update(learner, batch_now, columns, step))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert seen[0]["value/explained_variance"] == pytest.approx(0, abs=1e-9)  # a head of zeros
    assert (
        seen[-1]["value/explained_variance"] > 0.4
        and seen[-1]["value/loss"] < 0.6 * seen[0]["value/loss"]
    )
    # before its first token a group is one state, whose value is the mean of what it earned
    first, earned = columns["values"][:, 0].reshape(3, 4), batch.totals.reshape(3, 4)
    assert (
        torch.equal(first, first[:, :1].expand(-1, 4))
        and (first[:, 0] - earned.mean(1)).abs().max() < 0.25
    )
    assert earned.mean(1).max() - earned.mean(1).min() > 0.5
    update(learner, *compute_advantages(learner, batch, 60), 60)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- updates ----------------------------------------------------------------------------------------------------------


def test_one_update_of_every_loss_is_reinforce(tiny_model):
    """At a ratio of 1 all losses have one gradient."""
    gradients = {}
    for loss in ("reinforce", "ppo", "gspo", "cispo", "dppo"):
        model = tiny_model()
        learner = learner_of(model, f"algo.loss={loss}", "optim.grad_clip=1e9")
        metrics = update(learner, *compute_advantages(learner, batch_of(model), 0), 0)
        gradients[loss] = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert (
            metrics["policy/ratio_max"] == 1
            and metrics["policy/approx_kl"] == 0 == metrics["policy/clip_frac"]
        )
        assert (
            metrics["policy/sampler_kl"] == pytest.approx(0, abs=1e-12)
            and metrics["optim/skipped"] == 0
        )
        torch.testing.assert_close(gradients[loss], gradients["reinforce"], atol=1e-12, rtol=1e-9)
    assert gradients["reinforce"].norm() > 0.01


def test_several_updates_use_the_ratio_to_the_policy_that_sampled(tiny_model):
    model = tiny_model()
    learner = learner_of(model, "algo.loss=ppo", "algo.epochs=3", "algo.minibatches=2")
    batch = batch_of(model)
    own, columns = compute_advantages(learner, batch, 0)
    torch.testing.assert_close(
        columns["old_logprobs"], batch.full_logprobs.to(columns["old_logprobs"].dtype)
    )
    metrics = update(learner, own, columns, 0)
    assert metrics["policy/ratio_max"] > 1.001 and metrics["policy/approx_kl"] > 1e-6
    assert (
        metrics["policy/sampler_mismatch_max"] < 1e-9
    )  # of the policy that sampled, not of the moved one


def bfloat16_model(seed=0):
    """Wide enough that a product of more rows adds up in another order."""
    torch.manual_seed(seed)
    shape = ModelConfig("Qwen3ForCausalLM", 23, 64, 96, 2, 4, 2, 16, qk_norm=True)
    model = Decoder(shape).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        spread = 3 / 64**0.5 if parameter.ndim == 2 else 0.1
        parameter.data = spread * torch.randn_like(parameter) + float("norm" in name)
    return model


@pytest.mark.parametrize(
    "words",
    [
        ["algo=gspo", "algo.minibatches=3", "algo.kl_coef=0.1"],
        ["algo=gspo", "algo.minibatches=3", "algo.epochs=2"],
        ["algo=ppo", "algo.minibatches=2"],
    ],
)
def test_before_any_update_every_ratio_is_exactly_one_in_bfloat16(words):
    """The rate is too small to move anything. Log-probabilities that were computed in another
    packing made 0.55 of the tokens leave gspo's bounds here. The reference is the policy, so its KL
    is 0, too."""
    model = bfloat16_model()
    sizes = ["model.max_completion_tokens=40", "train.micro_batch_tokens=400"]
    still = ["optim.lr=1e-30", "algo.critic_lr=1e-30", "algo.prompts_per_step=4"]
    learner = learner_of(model, *words, *sizes, *still)
    if learner.config.algo.kl_coef:
        learner = replace(learner, reference=copy.deepcopy(model))
    lengths = np.random.default_rng(3).integers(20, 40, (4, 4)).tolist()
    batch = make_batch(fake_groups([60, 30, 67, 60], lengths), FIRST_OPEN)
    own, columns = compute_advantages(learner, batch, 0)
    metrics = update(learner, own, columns, 0)
    assert metrics["policy/clip_frac"] == 0 == metrics["policy/approx_kl"]
    assert metrics["policy/ratio_max"] == 1
    if learner.reference is not None:
        assert torch.equal(columns["ref_logprobs"], columns["old_logprobs"])
    if learner.config.algo.epochs == 1:
        assert metrics.get("policy/ref_kl", 0) == 0


@pytest.mark.parametrize("epochs", [1, 3])
def test_scores_come_from_the_micro_batches_of_the_updates(tiny_model, epochs):
    """On any machine: the packed tokens that the policy sees before the updates and in them."""
    model = tiny_model()
    words = ["algo=gspo", "algo.minibatches=2", f"algo.epochs={epochs}"]
    learner = learner_of(model, *words)
    seen = []
    model.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].ids.tolist())))
    batch = make_batch(fake_groups(), FIRST_OPEN)
    own, columns = compute_advantages(learner, batch, 4)
    before = list(seen)
    seen.clear()
    update(learner, own, columns, 4)
    assert len(before) > 2 * epochs and seen == before
    assert ("old_logprobs_2" in columns) == (epochs == 3)


def test_minibatches_are_whole_groups_in_an_order_of_the_step(tiny_model):
    model = tiny_model()
    learner = learner_of(
        model, "algo.loss=ppo", "algo.minibatches=3", "algo.epochs=4", "algo.aggregation=token_mean"
    )
    batch = make_batch(fake_groups(), FIRST_OPEN)
    parts = _minibatches(
        learner, batch, {"advantages": torch.arange(12)[:, None].expand(-1, 12)}, 5
    )
    rows = [c["advantages"][:, 0].tolist() for _, c in parts]
    assert len(rows) == 12 and all(
        sorted(sum(rows[i : i + 3], [])) == list(range(12)) for i in range(0, 12, 3)
    )
    assert all(r[0] % 4 == 0 and r == list(range(r[0], r[0] + 4)) for r in rows)
    assert len({tuple(r[0] for r in rows[i : i + 3]) for i in range(0, 12, 3)}) > 1  # epochs differ
    for part, c in parts:
        assert (
            c["weights"].sum().item() == pytest.approx(1)
            and part.groups[0][0] is batch.groups[c["advantages"][0, 0] // 4][0]
        )


def test_fewer_groups_than_minibatches_make_fewer_updates(tiny_model):
    learner = learner_of(
        tiny_model(), "algo.loss=ppo", "algo.prompts_per_step=5", "algo.minibatches=5"
    )
    assert (
        len(_minibatches(learner, make_batch(fake_groups(), FIRST_OPEN), {}, 0)) == 3
    )  # groups that could not be judged are gone


def test_truncated_importance_weights_correct_the_sampler(tiny_model):
    """A sampler of half the log-probability of some tokens: their gradient is weighted by min(pi / sampler, cap)."""
    model = tiny_model()
    batch = batch_of(model)
    shift = torch.zeros_like(batch.full_logprobs)
    shift[:, 0], shift[:, 1] = 0.3, -5.0
    gradients = {}
    for name, words, factor in (
        ("weighted", ["algo.importance=truncated"], 1.0),
        ("by hand", [], (-shift).exp().clamp(max=2.0)),
    ):
        model = tiny_model()
        learner = learner_of(model, "optim.grad_clip=1e9", *words)
        own, columns = compute_advantages(
            learner, replace(batch, sampler_logprobs=batch.full_logprobs + shift), 0
        )
        update(learner, own, columns | {"advantages": columns["advantages"] * factor}, 0)
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradients["weighted"], gradients["by hand"], atol=1e-12, rtol=1e-9)


# --- rollouts of older weights ------------------------------------------------------------------


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_rollouts_are_sampled_from_the_weights_of_so_many_steps_ago(tiny_model, lag):
    """The first steps have the first weights; in between, and after, the policy is today's."""
    model = tiny_model()
    learner = learner_of(model, f"algo.lag={lag}")
    before = []
    for step in range(4):
        before.append(weights_of(model))
        with learner.rollout_policy() as policy:
            assert torch.equal(weights_of(policy), before[max(step - lag, 0)])
            batch = batch_of(policy)
        assert torch.equal(weights_of(model), before[step])
        update(learner, *compute_advantages(learner, batch, step), step)
        assert not torch.equal(weights_of(model), before[step])
        assert len(learner.past_weights) == min(lag, step + 1)


def test_an_error_while_sampling_leaves_todays_weights(tiny_model):
    model = tiny_model()
    learner = learner_of(model, "algo.lag=1")
    update(learner, *compute_advantages(learner, batch_of(model), 0), 0)
    today = weights_of(model)
    with pytest.raises(RuntimeError, match="stop"), learner.rollout_policy():
        raise RuntimeError("stop")
    assert torch.equal(weights_of(model), today)


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_ratio_of_a_lagging_step_is_to_the_policy_that_sampled(tiny_model, epochs):
    """Without importance weights; with them it is to the policy before the first update."""
    words = ["algo.lag=1", "algo.loss=ppo", f"algo.epochs={epochs}"]
    metrics = {}
    for importance in ("none", "truncated"):
        model = tiny_model()
        learner = learner_of(model, *words, f"algo.importance={importance}")
        first = batch_of(model)
        update(learner, *compute_advantages(learner, first, 0), 0)
        with learner.rollout_policy() as policy:
            batch = batch_of(policy)
        own, columns = compute_advantages(learner, batch, 1)
        if importance == "none":
            expected = batch.full_logprobs
        else:
            expected = logprobs_of(model, batch)
            assert (expected - batch.full_logprobs).abs().max() > 1e-3
        if "old_logprobs" in columns:
            torch.testing.assert_close(columns["old_logprobs"].double(), expected.double())
        metrics[importance] = update(learner, own, columns, 1)
    assert metrics["none"]["policy/ratio_max"] > 1.001
    assert metrics["none"]["policy/sampler_mismatch_max"] < 1e-6
    assert abs(metrics["none"]["policy/sampler_kl"]) < 1e-6
    assert metrics["truncated"]["policy/sampler_mismatch_max"] > 1e-3
    if epochs == 1:
        assert metrics["truncated"]["policy/ratio_max"] == 1


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("importance", ["none", "truncated"])
def test_the_kl_that_a_lagging_step_pays_is_of_the_policy_of_its_ratio(
    tiny_model, importance, epochs
):
    """With importance weights that is today's, however many updates there are."""
    model = tiny_model()
    words = ["algo.lag=1", "algo.loss=ppo", f"algo.epochs={epochs}", "algo.credit=set"]
    words += [f"algo.importance={importance}", "algo.baseline=none", "algo.kl=k1", "algo.kl_coef=2"]
    learner = replace(learner_of(model, *words), reference=copy.deepcopy(model))
    update(learner, *compute_advantages(learner, batch_of(model), 0), 0)
    with learner.rollout_policy() as policy:
        batch = batch_of(policy)
    batch = replace(batch, components=torch.zeros_like(batch.components))
    _, columns = compute_advantages(learner, batch, 1)

    sampled = batch.full_logprobs
    paying = sampled if importance == "none" else logprobs_of(model, batch)
    costs = 2 * (paying - columns["ref_logprobs"]) * batch.loss_mask
    expected = -costs.flip(1).cumsum(1).flip(1) * batch.completion_mask
    torch.testing.assert_close(columns["advantages"], expected.double(), atol=1e-5, rtol=1e-5)
    assert (logprobs_of(model, batch) - sampled).abs().max() > 1e-3


def expected_gradient(num_tokens, *words):
    """(estimated, exact) gradient of a tabular policy whose completions an older one has written.

    All pairs of completions of `num_tokens` tokens, three choices each, with the probability that
    the older policy gives them; advantages are against the other completion of the pair.
    """
    generator = torch.Generator().manual_seed(0)
    num_states = sum(3**t for t in range(num_tokens))
    shape = (num_states, 3)
    logits = torch.randn(shape, generator=generator, dtype=F64).requires_grad_()
    older = (
        logits.detach() + 0.5 * torch.randn(shape, generator=generator, dtype=F64)
    ).log_softmax(1)
    actions = torch.cartesian_prod(*[torch.arange(3)] * num_tokens).reshape(-1, num_tokens)
    states = torch.zeros_like(actions)
    for t in range(1, num_tokens):
        states[:, t] = 3 * states[:, t - 1] + actions[:, t - 1] + 1
    rewards = torch.rand(len(actions), generator=generator, dtype=F64)

    def of(log_probs):
        return log_probs[states, actions]

    chance = of(logits.log_softmax(1)).sum(1).exp()
    (exact,) = torch.autograd.grad((chance * rewards).sum(), logits)

    algo = compose(list(words)).algo
    drawn = of(older).sum(1).exp()
    logprobs = of(logits.log_softmax(1))
    # The mean over the other completion of a pair is the expectation under the older policy.
    advantages = rewards - (drawn * rewards).sum()
    rows = torch.arange(len(actions)).repeat_interleave(num_tokens)
    columns = {
        "weights": drawn.repeat_interleave(num_tokens),
        "advantages": advantages.repeat_interleave(num_tokens),
        "sampler_logprobs": of(older).flatten(),
        "full_logprobs": of(older).flatten(),
        "old_logprobs": of(older).flatten(),
        "rows": rows,
    }
    if algo.importance != "none":
        columns["old_logprobs"] = logprobs.detach().flatten()
    loss, _ = policy_loss(algo, logprobs.flatten(), torch.zeros(len(rows)), columns, 0.0)
    (gradient,) = torch.autograd.grad(-loss, logits)
    return gradient, exact


WIDE = ("algo.clip_low=1", "algo.clip_high=1e9")
CORRECTED = [
    ("algo.loss=ppo", *WIDE),
    ("algo.loss=cispo", *WIDE),
    ("algo.loss=reinforce", "algo.importance=truncated", "algo.importance_cap=1e9"),
    ("algo.loss=ppo", "algo.importance=truncated", "algo.importance_cap=1e9"),
    ("algo.loss=reinforce", "algo.importance=masked", "algo.importance_high=1e9")
    + ("algo.importance_low=0",),
]


@pytest.mark.parametrize("words", CORRECTED)
def test_a_ratio_or_an_importance_weight_takes_out_the_bias_of_older_weights(words):
    """Exactly, by enumeration, where a completion is one decision and no bound binds. Over several
    tokens the ratios of single tokens leave a part of it: the past of a token has a ratio too."""
    gradient, exact = expected_gradient(1, *words)
    assert (gradient - exact).norm() / exact.norm() < 1e-12
    gradient, exact = expected_gradient(3, *words)
    plain, _ = expected_gradient(3, "algo.loss=reinforce")
    error = ((gradient - exact).norm() / exact.norm()).item()
    assert 1e-3 < error < 0.9 * ((plain - exact).norm() / exact.norm()).item()


def test_without_correction_older_weights_bias_the_gradient():
    gradient, exact = expected_gradient(1, "algo.loss=reinforce")
    assert (gradient - exact).norm() / exact.norm() > 0.05


@pytest.mark.parametrize("loss", ["ppo", "dppo"])
def test_a_token_that_importance_leaves_out_still_counts_in_what_is_logged(loss):
    """Two of four tokens moved too far, and one of them, whose sampler was far off, has no weight
    in the loss. The mean over tokens divides by all that are trained: both count."""
    words = [f"algo.loss={loss}", "algo.importance=masked", "algo.epochs=2"]
    old = torch.log(torch.tensor([0.1, 0.1, 0.5, 0.5], dtype=F64))
    logprobs = torch.log(torch.tensor([0.9, 0.9, 0.5, 0.5], dtype=F64))
    columns = {
        "weights": torch.full((4,), 0.25, dtype=F64),
        "advantages": torch.ones(4, dtype=F64),
        "old_logprobs": old,
        "sampler_logprobs": old - torch.tensor([3.0, 0, 0, 0], dtype=F64),
        "full_logprobs": old,
        "rows": torch.zeros(4, dtype=torch.int64),
    }
    _, logged = policy_loss(compose(words).algo, logprobs, torch.zeros(4), columns, 0.0)
    assert logged["clip_frac"].value == 2
    if loss == "dppo":
        assert logged["masked_frac"].value == 2


def test_past_weights_come_back_bit_for_bit(tiny_model, tmp_path):
    model = tiny_model()
    learner = learner_of(model, "algo.lag=2")
    for step in range(3):
        with learner.rollout_policy() as policy:
            batch = batch_of(policy)
        update(learner, *compute_advantages(learner, batch, step), step)
    past = list(learner.past_weights)
    checkpoint.save(tmp_path / "checkpoints", 3, model, learner.optimizer, 1, past=past).result()

    other = learner_of(tiny_model(seed=1), "algo.lag=2")
    # The measurement before training was lost, the history was not.
    evaluations = {"history": [{"step": 2, "ece": 0.1}, {"step": 4, "ece": 0.2}]}
    (tmp_path / "eval.json").write_text(json.dumps(evaluations))
    document = {}
    assert resume(tmp_path, other, document, Display("plain", 0, 9)) == 3
    assert document == {"history": [{"step": 2, "ece": 0.1}]}
    assert torch.equal(weights_of(other.policy), weights_of(model))
    assert len(other.past_weights) == 2
    for mine, theirs in zip(past, other.past_weights, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert not all(torch.equal(mine[name], other.trained_weights[name]) for name in mine)


def test_entropy_bonus_raises_entropy_and_decays(tiny_model):
    config = compose(["algo.entropy_coef=0.5", "algo.entropy_decay=true"])
    assert [entropy_coef(config.algo, step, 4) for step in range(4)] == [0.5, 0.375, 0.25, 0.125]
    model = tiny_model()
    learner = learner_of(model, "algo.entropy_coef=10")
    batch = batch_of(model)
    entropies = [
        update(learner, *compute_advantages(learner, batch, step), step)["policy/entropy"]
        for step in range(5)
    ]
    assert entropies[-1] > entropies[0] + 0.05


def test_the_entropy_bonus_of_confidences_counts_no_other_token():
    batch = make_batch(fake_groups(), FIRST_OPEN)
    weights = token_weights(batch.loss_mask, "token_mean", 12)
    of_all = compose(["algo.entropy_coef=1"]).algo
    assert torch.equal(entropy_weights(of_all, batch, weights), weights)

    # The second segment writes a confidence.
    is_second = torch.arange(len(FIRST_OPEN)) == 1
    batch = replace(batch, confidence_segments=is_second.expand(len(weights), -1))
    of_confidences = compose(["algo.entropy_coef=1", "algo.entropy_of=confidences"]).algo
    expected = torch.where(batch.segment_ids == 1, weights, 0.0)
    found = entropy_weights(of_confidences, batch, weights)
    assert torch.equal(found, expected)
    assert 0 < (found > 0).sum() < (weights > 0).sum()

    without = replace(batch, confidence_segments=torch.zeros_like(batch.confidence_segments))
    assert not entropy_weights(of_confidences, without, weights).any()


def test_a_bonus_for_confidences_does_not_push_other_tokens():
    """Without rewards: the gradient of the bonus of a token that counts nothing is zero."""
    logprobs = torch.tensor([-0.5, -1.0], dtype=F64)
    entropy = torch.tensor([0.4, 0.6], dtype=F64, requires_grad=True)
    columns = {
        name: torch.zeros(2, dtype=F64)
        for name in ("advantages", "old_logprobs", "sampler_logprobs", "full_logprobs", "rows")
    }
    columns["weights"] = torch.full((2,), 0.5, dtype=F64)
    columns["entropy_weights"] = torch.tensor([0.0, 0.5], dtype=F64)
    loss, _ = policy_loss(compose([]).algo, logprobs, entropy, columns, bonus=2.0)
    loss.backward()
    assert entropy.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("words", [[], ["algo=ppo", "algo.minibatches=2", "algo.kl_coef=0"]])
def test_what_is_not_finite_is_left_out(tiny_model, words):
    model = tiny_model()
    learner = learner_of(model, *words)
    own, columns = compute_advantages(learner, batch_of(model), 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    broken = {name: column.clone() for name, column in columns.items()}
    for name in {"advantages", "returns"} & set(broken):
        broken[name][:, 0] = math.nan
    metrics = update(learner, own, broken, 0)
    assert metrics["optim/skipped"] == 1 if not words else 8
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert update(learner, own, columns, 0)["optim/skipped"] == 0
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_step_of_nothing_but_truncated_completions_changes_nothing(tiny_model):
    model = tiny_model()
    learner = learner_of(model, "algo.truncated=mask", "algo.loss=gspo")
    batch = cut(fake_groups(), itertools.product(range(3), range(4)))
    before = [p.clone() for p in model.parameters()]
    metrics = update(learner, *compute_advantages(learner, batch, 0), 0)
    assert (
        metrics["policy/loss"] == 0 == metrics["optim/grad_norm"] and metrics["optim/skipped"] == 0
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    json.dumps(metrics, allow_nan=False)


def test_variance_ratio_is_that_of_the_groups_gradients(tiny_model):
    model = tiny_model()
    learner, batch = learner_of(model), batch_of(model)
    spread = []
    for credit in ("to_go", "set"):
        gradients = []
        for i in range(3):
            part, _ = batch.take([i])
            advantages = token_advantages(
                replace(part, group_ids=0 * part.group_ids),
                credit,
                learner.config.algo.baseline,
                "none",
            )
            (micro,) = micro_batches(part, 10**6)
            model.zero_grad()
            a = micro.flat(advantages, part.completion_mask)
            policy_gradient(model(micro.packed, 1.0)[0], a, torch.ones_like(a)).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        spread.append(torch.stack(gradients).var(0).sum().item())
    assert variance_ratio(learner, batch) == pytest.approx(spread[0] / spread[1], rel=1e-9)


def test_the_critic_and_its_moments_come_back_bit_for_bit(tiny_model, tmp_path):
    learners = [
        learner_of(tiny_model(), "algo=ppo", "algo.minibatches=3", "algo.kl_coef=0")
        for _ in range(2)
    ]
    batch = batch_of(tiny_model())
    for step in range(3):
        update(learners[0], *compute_advantages(learners[0], batch, step), step)
    checkpoint.save(
        tmp_path, 3, learners[0].policy, learners[0].optimizer, 2, checkpoint.critic_of(learners[0])
    ).result()
    checkpoint.restore(
        checkpoint.newest(tmp_path),
        learners[1].policy,
        learners[1].optimizer,
        checkpoint.critic_of(learners[1]),
    )
    after = []
    for learner in learners:
        update(learner, *compute_advantages(learner, batch, 3), 3)
        after.append([*learner.policy.parameters(), *learner.critic.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def test_what_is_logged_adds_up_as_it_says():
    """Two updates of two tokens each, the second in two micro-batches."""
    first = {"a": Logged(3.0, TOKEN_MEAN), "b": Logged(5.0, UPDATE_MEAN), "c": Logged(2.0, LARGEST)}
    parts = [
        {"a": Logged(1.0, TOKEN_MEAN), "b": Logged(1.0, UPDATE_MEAN), "c": Logged(7.0, LARGEST)},
        {"a": Logged(4.0, TOKEN_MEAN), "b": Logged(2.0, UPDATE_MEAN), "c": Logged(1.0, LARGEST)},
    ]
    second = _add_up(ALONE, parts)
    assert _mean_over_updates([first, second], num_tokens=4) == {"a": 2.0, "b": 4.0, "c": 7.0}

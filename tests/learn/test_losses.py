"""Losses by hand, against TRL, and every gradient estimator against the exact gradient.

TRL is optional: its numbers on the same tensors are committed here. The exact gradient is that of a
small policy all of whose completions are enumerated.
"""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.credit.run import (
    ESTIMATORS,
    GATED,
    KL_COEF,
    UNGATED,
    Estimator,
    Toy,
    facts,
    report,
)
from mar.learn.advantages import with_kl_cost
from mar.learn.gae import gae, token_rewards
from mar.learn.losses import (
    IMPORTANCE,
    KL_ESTIMATORS,
    LARGEST,
    LOSSES,
    TOKEN_MEAN,
    ImportanceInputs,
    LossInputs,
    diagnostics,
    kl_k1,
    options_of,
    ratio_logs,
    sequence_mean_log_ratio,
    token_weights,
    value_loss,
)

F64 = torch.float64
E = np.e


def column(*values):
    return torch.tensor(values, dtype=F64)


def run_loss(name, *tensors, low=0.2, high=0.2, **chosen):
    """The loss on (logprobs, advantages, weights, old_logprobs, rows), and what it logs."""
    defaults = {key: option.default for key, option in options_of(LOSSES[name]).items()}
    return LOSSES[name](LossInputs(*tensors, low, high, defaults | chosen))


def by_hand(name, low=0.2, high=0.3, **chosen):
    """Loss and gradient of four tokens in two completions.

    Ratios e^0.5, e^-0.5 | e^0.1, e^0.1; advantages 2, -1 | 1, 1; weights 1, 0.5 | 1, 0.
    """
    logprobs = column(-0.5, -1.5, -0.9, -1.9).requires_grad_()
    advantages = column(2, -1, 1, 1)
    weights = column(1, 0.5, 1, 0)
    old_logprobs = column(-1, -1, -1, -2)
    rows = torch.tensor([0, 0, 1, 1])
    tensors = (logprobs, advantages, weights, old_logprobs, rows)
    loss, _ = run_loss(name, *tensors, low=low, high=high, **chosen)
    loss.backward()
    return loss.item(), logprobs.grad.tolist()


def test_reinforce_by_hand():
    loss, gradient = by_hand("reinforce")
    assert loss == pytest.approx(2 * 0.5 - 0.5 * 1.5 + 0.9)
    assert gradient == pytest.approx([-2, 0.5, -1, 0])


def test_ppo_by_hand():
    """The first token is cut at 1.3; the second, at 0.61 with A < 0, at 0.8: no gradient for both."""
    loss, gradient = by_hand("ppo")
    assert loss == pytest.approx(-2 * 1.3 + 0.5 * 0.8 - E**0.1)
    assert gradient == pytest.approx([0, 0, -(E**0.1), 0])


def test_cispo_by_hand():
    loss, gradient = by_hand("cispo")
    assert loss == pytest.approx(2 * 1.3 * 0.5 - 0.5 * 0.8 * 1.5 + 0.9 * E**0.1)
    assert gradient == pytest.approx([-2.6, 0.4, -(E**0.1), 0])


def test_gspo_by_hand():
    """The mean log ratios are 0 and, without the token of weight 0, 0.1."""
    loss, gradient = by_hand("gspo")
    assert loss == pytest.approx(-2 + 0.5 - E**0.1)
    assert gradient == pytest.approx([-2, 0.5, -(E**0.1), 0])
    loss, gradient = by_hand("gspo", high=0.05)
    assert loss == pytest.approx(-2 + 0.5 - 1.05)
    assert gradient == pytest.approx([-2, 0.5, 0, 0])


def test_dppo_by_hand():
    """Probabilities .61 from .37 with A = 2 (rose by .24); .22 from .37 with A = -1 (fell by .14);
    .41 from .37; the last token does not count."""
    gone = 0.001 * (0.5**2 + 0.5 * 0.5**2 + 0.1**2)
    kept_second = 0.5 * E**-0.5 * -1 * -1.5
    kept_third = E**0.1 * -0.9
    loss, gradient = by_hand("dppo")  # the first is masked: it rose too far
    assert loss == pytest.approx(-kept_second - kept_third + gone)
    cost = [0.001, -0.001 * 0.5, 0.0002, 0]
    assert gradient == pytest.approx([cost[0], 0.5 * E**-0.5 + cost[1], -(E**0.1) + cost[2], 0])
    loss, gradient = by_hand("dppo", delta_low=0.1, delta_high=0.3, penalty=0.0)
    assert gradient == pytest.approx([-2 * E**0.5, 0, -(E**0.1), 0])  # now the second fell too far
    assert loss == pytest.approx(2 * E**0.5 * 0.5 + E**0.1 * 0.9)


def test_importance_weights_by_hand():
    old, sampled = column(-1, -1, -3, -1), column(-1, -2, -1, -1.5)
    weights, rows = column(1, 1, 1, 0), torch.tensor([0, 0, 1, 1])

    def factors(name, low=0.5, high=2.0, by_sequence=False):
        inputs = ImportanceInputs(old, sampled, weights, rows, 2.0, low, high, by_sequence)
        return IMPORTANCE[name](inputs).tolist()

    assert factors("none") == [1, 1, 1, 1]
    assert factors("truncated") == pytest.approx([1, 2, E**-2, E**0.5])
    assert factors("masked") == pytest.approx([1, 0, 0, E**0.5])
    assert factors("masked", low=0.1, high=3.0) == pytest.approx([1, E, E**-2, E**0.5])
    # the mean log ratio of a completion over its tokens that count: .5 and -2
    by_sequence = factors("masked", by_sequence=True)
    assert by_sequence == pytest.approx([E**0.5, E**0.5, 0, 0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("k1", [0.5, -1]), ("k2", [0.125, 0.5]), ("k3", [E**-0.5 - 0.5, E - 2])],
)
def test_kl_estimators_by_hand(name, expected):
    new = column(-1.0, -2.0)
    ref = column(-1.5, -1.0)
    assert KL_ESTIMATORS[name](new, ref).tolist() == pytest.approx(expected)


def test_value_loss_by_hand():
    """The first value moved by 1 and is cut to a move of 0.5, which is 2.5 from its return of 3."""
    values = column(1.0, 3.0).requires_grad_()
    old_values = column(0.0, 2.0)
    loss = value_loss(values, old_values, returns=column(3, 0), weights=column(1, 0.1), clip=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (2.5**2 + 0.1 * 9))
    assert values.grad.tolist() == pytest.approx([0, 0.3])


def test_kl_estimators_have_the_gradients_that_they_state():
    logits = torch.randn(6, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ref = torch.randn(6, dtype=F64, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    logprobs = logits.log_softmax(0)
    p = logprobs.detach().exp()
    forward, backward = (p.log() - ref), (ref.exp() * (ref - logprobs)).sum()
    (of_kl,) = torch.autograd.grad(
        (logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True
    )
    (of_reverse,) = torch.autograd.grad(backward, logits, retain_graph=True)
    for name, expected in {"k1": torch.zeros(6, dtype=F64), "k2": of_kl, "k3": of_reverse}.items():
        each = KL_ESTIMATORS[name](logprobs, ref)
        (got,) = torch.autograd.grad((p * each).sum(), logits, retain_graph=True)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    for name in ("k1", "k3"):
        assert (p * KL_ESTIMATORS[name](logprobs, ref)).sum().item() == pytest.approx(
            (p * forward).sum().item()
        )


def test_diagnostics_by_hand():
    new = column(-0.5, -1.5, -0.9, -1.9)
    old = column(-1, -1, -1, -9)
    full = old + column(0, 0.2, 0, -0.3)
    weights = column(1, 0.5, 1, 0)
    said = diagnostics(new, old, old - 0.1, full, weights)
    moved = E**0.5 - 1.5 + E**-0.5 - 0.5 + E**0.1 - 1.1
    assert said["approx_kl"] == (pytest.approx(moved), TOKEN_MEAN)
    assert said["sampler_kl"] == (pytest.approx(-0.3), TOKEN_MEAN)
    assert said["sampler_mismatch_max"] == (pytest.approx(0.3), LARGEST)


@pytest.mark.parametrize(
    ("name", "high", "clip_frac", "ratio_max"), [("ppo", 0.3, 2, E**0.5), ("gspo", 0.05, 1, E**0.1)]
)
def test_what_a_loss_logs_of_its_ratio(name, high, clip_frac, ratio_max):
    new = column(-0.5, -1.5, -0.9, -1.9)
    old = column(-1, -1, -1, -9)
    weights = column(1, 0.5, 1, 0)
    rows = torch.tensor([0, 0, 1, 1])
    _, logged = run_loss(name, new, 0 * new, weights, old, rows, high=high)
    assert logged["clip_frac"] == (clip_frac, TOKEN_MEAN)
    assert logged["ratio_max"] == (pytest.approx(ratio_max), LARGEST)
    all_truncated = ratio_logs(LossInputs(new, 0 * new, 0 * weights, old, rows), new - old)
    assert all_truncated["ratio_max"].value == 1.0


@pytest.mark.parametrize("name", LOSSES)
def test_a_token_of_weight_zero_is_not_there(name):
    """Changing its log-probability and advantage changes nothing; if no token counts, the loss is
    0.
    """
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = (torch.randn(6, dtype=F64, generator=generator) for _ in range(3))
    weights = column(1, 0, 0.5, 1, 0, 2)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    gone = weights == 0

    def loss_of(change, weights):
        changed = new + change * gone
        moved = advantages + change * gone
        return run_loss(name, changed, moved, weights, old, rows).loss.item()

    assert loss_of(0.0, weights) == loss_of(1.7, weights) != 0.0
    assert loss_of(0.0, 0 * weights) == 0.0


# --- against TRL ----------------------------------------------------------------------------------

# loss, low, high, aggregation, loss_type, level, beta of TRL, its epsilon_high (cispo: the largest
# ratio itself)
MATCHES = {
    "grpo": ("ppo", 0.2, 0.2, "sequence_mean", "grpo", "token", 0.0, 0.2),
    "grpo with KL": ("ppo", 0.2, 0.2, "sequence_mean", "grpo", "token", 0.04, 0.2),
    "bnpo": ("ppo", 0.2, 0.2, "token_mean", "bnpo", "token", 0.0, 0.2),
    "dapo, clip-higher": ("ppo", 0.2, 0.28, "token_mean", "dapo", "token", 0.0, 0.28),
    "dr_grpo": ("ppo", 0.2, 0.2, "constant", "dr_grpo", "token", 0.0, 0.2),
    "gspo": ("gspo", 0.03, 0.04, "sequence_mean", "grpo", "sequence", 0.0, 0.04),
    "cispo": ("cispo", 1.0, 0.5, "token_mean", "cispo", "token", 0.0, 1.5),
}


def trl_loss(logprobs, columns, mask, match):
    """GRPOTrainer._compute_loss of TRL, on these log-probabilities."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[bench]'")
    _, low, _, _, loss_type, level, beta, high = match
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    arguments = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    no_entropy = torch.zeros_like(logprobs.detach())
    trainer = SimpleNamespace(
        accelerator=accelerator,
        args=arguments,
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=high,
        epsilon_low=low,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=12,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, no_entropy, None),
        _metrics={"train": defaultdict(list)},
    )
    ids = mask.long()
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": ids,
        "advantages": columns["advantages"],
        "old_per_token_logps": columns["old"],
        "ref_per_token_logps": columns["ref"],
        "num_items_in_batch": mask.sum(),
    }
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


def ours_and_inputs(match):
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 7, 7, 2])[:, None]
    old, noise, ref = (torch.randn(6, 9, dtype=F64, generator=generator) for _ in range(3))
    logprobs = (-1 + 0.3 * noise - 0.2 * old).requires_grad_()
    columns = {
        "advantages": torch.randn(6, dtype=F64, generator=generator),
        "old": -1 - 0.2 * old,
        "ref": -1 + 0.3 * ref,
    }
    loss, low, high, aggregation, *_, beta, _ = match
    weights = token_weights(mask, aggregation, 12)[mask]
    rows = torch.arange(6)[:, None].expand(-1, 9)[mask]
    flat = logprobs[mask]
    tensors = (flat, columns["advantages"][rows], weights, columns["old"][mask], rows)
    total, _ = run_loss(loss, *tensors, low=low, high=high)
    total = total + beta * (weights * KL_ESTIMATORS["k3"](flat, columns["ref"][mask])).sum()
    (gradient,) = torch.autograd.grad(total, logprobs)
    return total.item(), gradient, logprobs, columns, mask


@pytest.mark.parametrize("name", MATCHES)
def test_losses_are_those_of_trl(name):
    loss, gradient, logprobs, columns, mask = ours_and_inputs(MATCHES[name])
    theirs = trl_loss(logprobs, columns, mask, MATCHES[name])
    (expected,) = torch.autograd.grad(theirs, logprobs)
    assert gradient.norm() > 0.01 and loss == pytest.approx(theirs.item(), abs=1e-6, rel=1e-6)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)


CONSTANTS = {  # loss and gradient norm that TRL 1.16.0 gives on the same tensors
    "grpo": (-0.3252211351943901, 0.09264822996870467),
    "grpo with KL": (-0.3217822179470819, 0.09319089614441463),
    "bnpo": (-0.13976459436274383, 0.0628166040890215),
    "dapo, clip-higher": (-0.14192872293940886, 0.0628166040890215),
    "dr_grpo": (-0.05823524765114326, 0.026173585037092294),
    "gspo": (-0.30652494774418654, 0.08977977776830075),
    "cispo": (0.15554628241251856, 0.07078256597141887),
}


@pytest.mark.parametrize("name", MATCHES)
def test_losses_are_what_trl_gave(name):
    """The same without TRL."""
    loss, gradient, *_ = ours_and_inputs(MATCHES[name])
    assert (loss, gradient.norm().item()) == pytest.approx(CONSTANTS[name], rel=1e-6)


# --- against the exact gradient -------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("spec", [GATED, UNGATED], ids=["gates", "no gate"])
def test_every_estimator_against_the_enumerated_policy(layout, spec):
    toy = Toy(layout, spec, 2, 2)
    seen = facts(toy)
    assert all(0.01 < seen[kind] < 0.9 for kind in ("well_formed", "truncated", "repeating"))
    for name, row in report(toy, 2).items():
        if ESTIMATORS[name].biased:
            assert row["relative_error"] > 1e-5, name
        else:
            assert row["relative_error"] < 1e-10, name


@pytest.mark.parametrize("spec", [GATED, UNGATED], ids=["gates", "no gate"])
def test_characters_cut_in_two_bias_nothing(spec):
    """A token's segment is known before it is drawn, also behind half a character."""
    exact = [name for name in ESTIMATORS if not ESTIMATORS[name].biased]
    for name, row in report(Toy("interleaved", spec, 2, 1, halves=True), 2, exact).items():
        assert row["relative_error"] < 1e-10, name


def test_groups_of_three():
    exact = [name for name in ESTIMATORS if not ESTIMATORS[name].biased]
    for name, row in report(Toy("interleaved", GATED, 2, 1), 3, exact).items():
        assert row["relative_error"] < 1e-10, name


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("credit", ["to_go", "set"])
def test_gae_with_the_true_values_is_the_exact_gradient_of_reward_and_kl(credit, lam):
    """The value of a state is what is still to come: components that its prefix has not paid, less
    the KL of tokens not yet written. Then every lambda is exact; with a cost that is paid later
    than its token it would not be. Without values lambda 1 is, too."""
    toy = Toy("interleaved", GATED, 2, 2)
    batch = with_kl_cost(toy.batch, kl_k1(toy.batch.full_logprobs, toy.reference), KL_COEF)
    mask = batch.completion_mask
    with torch.no_grad():
        chance = torch.where(mask, toy.logprobs(), 0.0).sum(1).exp()

    # what is still to come before each token of each completion, [n, T], by a loop
    to_come = torch.zeros(mask.shape, dtype=F64)
    for b, t in mask.nonzero().tolist():
        first = 0
        if credit == "to_go":
            first = int(batch.first_open[b, batch.segment_ids[b, t]])
        costs = KL_COEF * (batch.full_logprobs - toy.reference)[b, t:][mask[b, t:]]
        to_come[b, t] = batch.components[b, first:].sum() - costs.sum()
    of_state = torch.zeros(2, len(toy.logits), dtype=F64)
    weighted = torch.stack([chance[:, None] * to_come, chance[:, None].expand_as(to_come)])
    of_state.index_add_(1, toy.states[mask], weighted[:, mask])
    values = (of_state[0] / of_state[1])[toy.states] * mask

    advantages, _ = gae(token_rewards(batch, credit), values, mask, lam)
    surrogate = (chance[:, None] * advantages * toy.logprobs() * mask).sum()
    (got,) = torch.autograd.grad(surrogate, toy.logits)
    exact = toy.exact(Estimator(target="kl"))
    assert ((got - exact).norm() / exact.norm()).item() < 1e-12


def test_less_variance_than_one_scalar_a_completion():
    """Without the format gate. With it the end component takes back what earlier ones paid."""
    rows = report(Toy("interleaved", UNGATED), 2, ("to_go", "set"))
    assert rows["to_go"]["variance"] < 0.8 * rows["set"]["variance"]


def test_sequence_means_ignore_the_other_rows():
    log_ratio = column(1, 3, 5)
    rows = torch.tensor([0, 0, 1])
    means = sequence_mean_log_ratio(log_ratio, torch.ones(3, dtype=F64), rows)
    assert means.tolist() == [2, 2, 5]

"""Advantages and fused log-probabilities against their definitions, and the to-go estimator against
the exact gradient.
"""

import itertools
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mar.answers.grammar import Grammar, decode_with_starts, parse
from mar.answers.rewards import RewardSpec, first_open, reward
from mar.learn.advantages import token_advantages
from mar.records import Gold
from mar.verify.matching import matching_increments, repeats
from mar_kernels import answer_advantages, linear_logprobs, reference, selected_logprobs

F64 = torch.float64

# --- answer_advantages against a loop over tokens -------------------------------------------------


def loop_advantages(
    components, weights, first_open, segment_ids, groups, credit, baseline, scale, costs=None
):
    """The docstring of answer_advantages, one token and one component at a time."""
    B, C = components.shape
    out = np.zeros(segment_ids.shape)
    if costs is None:
        costs = np.zeros(segment_ids.shape)
    totals = [sum(weights[c] * components[b, c] for c in range(C)) for b in range(B)]
    totals = [total - sum(costs[b]) for b, total in enumerate(totals)]
    for b, t in itertools.product(range(B), range(segment_ids.shape[1])):
        mates = [i for i in range(B) if groups[i] == groups[b]]
        pool = {"leave_one_out": [i for i in mates if i != b], "mean": mates, "none": []}[baseline]
        spread = {"group_std": [totals[i] for i in mates], "batch_std": totals, "none": [0.0]}[
            scale
        ]
        std = np.std(spread, ddof=1) if len(spread) > 1 else 0.0
        segment = segment_ids[b, t]
        start = first_open[b, segment]
        stop = first_open[b, segment + 1] if segment + 1 < first_open.shape[1] else C
        for c in range(C):
            own = start <= c < stop or c == C - 1 or (start >= stop and c >= start)
            if {"set": True, "to_go": c >= start, "own": own}[credit]:
                centre = sum(components[i, c] for i in pool) / len(pool) if pool else 0.0
                out[b, t] += (
                    weights[c] * (components[b, c] - centre) / (std + 1e-4 if std > 1e-4 else 1.0)
                )
        # with every credit: what the token and those after it cost, against what the tokens of
        # this segment and of later ones cost others
        others = [costs[i][segment_ids[i] >= segment].sum() for i in pool]
        centre = sum(others) / len(pool) if pool else 0.0
        out[b, t] -= (costs[b, t:].sum() - centre) / (std + 1e-4 if std > 1e-4 else 1.0)
    return out


def costs_of(seed, segments):
    return np.random.default_rng([seed, 7]).normal(size=segments.shape)


def batch_of(seed, groups):
    """Components with a layout of think, (answer, confidence) x 2, after: some segments decide one
    component, some none.
    """
    rng = np.random.default_rng(seed)
    B, T = len(groups), 7
    opens = np.tile([0, 0, 1, 1, 2, 3], (B, 1))
    segments = np.sort(rng.integers(0, 6, (B, T)), axis=1)
    return rng.normal(size=(B, 4)), rng.uniform(0.1, 2, 4), opens, segments, np.array(groups)


@pytest.mark.parametrize("credit", ["to_go", "own"])
@pytest.mark.parametrize("groups", [[0, 0, 0, 1, 1, 1], [2, 0, 2, 2, 0, 5]])
def test_the_matched_baseline_is_that_of_the_loop(groups, credit):
    """Hits of 0 or 1 with costs in between, as coverage and Brier terms: those who had as many hits
    so far are compared.
    """
    rng = np.random.default_rng(1)
    components = np.stack(
        [rng.integers(0, 2, 6), -rng.uniform(0, 1, 6), rng.integers(0, 2, 6), rng.normal(size=6)], 1
    )
    _, _, opens, segments, ids = batch_of(0, groups)
    lengths = np.array([7, 7, 5, 7, 1, 7])
    expected, alone = np.zeros(segments.shape), 0
    for b, t in itertools.product(range(6), range(7)):
        c = opens[b, segments[b, t]]
        decides = segments[b, t] < 5 and opens[b, segments[b, t] + 1] > c
        paid = [c, 3] if credit == "own" and decides else range(c, 4)
        past = [components[i, :c].clip(min=0).sum() for i in range(6)]
        mates = [i for i in range(6) if groups[i] == groups[b] and i != b]
        alike = [i for i in mates if past[i] == past[b]]
        alone += not alike
        pool = alike or mates
        baseline = np.mean([components[i, paid].sum() for i in pool]) if pool else 0.0
        expected[b, t] = (components[b, paid].sum() - baseline) * (t < lengths[b])
    batch = SimpleNamespace(
        components=torch.from_numpy(components),
        first_open=torch.from_numpy(opens),
        segment_ids=torch.from_numpy(segments),
        group_ids=torch.from_numpy(ids),
        completion_mask=torch.from_numpy(np.arange(7) < lengths[:, None]),
        confidence_components=None,
        confidence_segments=None,
        token_costs=None,
    )
    np.testing.assert_allclose(
        token_advantages(batch, credit, "matched", "none"), expected, atol=1e-12
    )
    assert 0 < alone < 42


@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "mean", "none"])
@pytest.mark.parametrize("credit", ["to_go", "set", "own"])
@pytest.mark.parametrize("groups", [[0, 0, 0, 1, 1, 1], [1, 0, 2, 1, 0, 1], [0]])
def test_advantages_are_those_of_the_loop(groups, credit, baseline, scale):
    arrays = batch_of(len(groups), groups)
    for costs in (None, costs_of(len(groups), arrays[3])):
        got = answer_advantages(
            *map(torch.from_numpy, arrays),
            credit=credit,
            baseline=baseline,
            scale=scale,
            token_costs=None if costs is None else torch.from_numpy(costs),
        )
        assert torch.isfinite(got).all()
        expected = loop_advantages(*arrays, credit, baseline, scale, costs)
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_advantages_by_hand():
    """Two completions: hit then miss, miss then hit; the second segment no longer sees the first
    component.
    """
    components = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]], dtype=F64)
    ids = torch.tensor([[0, 1, 2]] * 2)
    arguments = (components, torch.ones(3, dtype=F64), ids, ids, torch.zeros(2, dtype=torch.int64))
    np.testing.assert_allclose(answer_advantages(*arguments), [[0.5, -0.5, 0.5], [-0.5, 0.5, -0.5]])
    np.testing.assert_allclose(answer_advantages(*arguments, credit="set"), [[0.5] * 3, [-0.5] * 3])
    np.testing.assert_allclose(
        answer_advantages(*arguments, credit="own"), [[1.5, -0.5, 0.5], [-1.5, 0.5, -0.5]]
    )


def test_maxrl_by_hand():
    """(r - mean) / mean: one hit of four, three hits of four; nothing where the mean is not above
    0."""
    rewards = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, -1, 0, 0, 0], dtype=F64)[:, None]
    groups = torch.arange(4).repeat_interleave(4)
    zeros = torch.zeros(16, 1, dtype=torch.int64)
    one = torch.ones(1, dtype=F64)
    rules = {"credit": "set", "baseline": "mean", "scale": "group_mean"}
    got = answer_advantages(rewards, one, zeros, zeros, groups, **rules)[:, 0]
    hit = 0.25 / 0.75
    expected = [3, -1, -1, -1, hit, hit, hit, -1, *[0] * 8]
    np.testing.assert_allclose(got, expected)


def test_decoupled_credit_by_hand():
    """Thought, answer 1, confidence 1, answer 2, confidence 2, what follows; two hits, two errors
    and the end. Against `own` and `to_go`, which pay thoughts for confidences."""
    components = torch.tensor([[1.0, -0.25, 2.0, -0.5, 8.0]], dtype=F64)
    opens = torch.tensor([[0, 0, 1, 2, 3, 4]])
    tokens = torch.arange(6)[None]
    group = torch.zeros(1, dtype=torch.int64)
    of_confidence = {
        "confidence_components": torch.tensor([[False, True, False, True, False]]),
        "confidence_segments": torch.tensor([[False, False, True, False, True, False]]),
    }

    def paid(credit):
        arguments = (components, torch.ones(5, dtype=F64), opens, tokens, group, credit, "none")
        return answer_advantages(*arguments, **of_confidence)[0].tolist()

    assert paid("decoupled") == [11.0, 11.0, 7.25, 10.0, 7.5, 8.0]
    assert paid("own") == [10.25, 9.0, 7.75, 10.0, 7.5, 8.0]
    assert paid("to_go") == [10.25, 10.25, 9.25, 9.5, 7.5, 8.0]


def gdpo_batch(terms, term_weights, lengths):
    """Groups of two completions with terms of one component each."""
    terms = torch.tensor(terms, dtype=F64)[..., None]  # [B, terms, 1]
    weights = torch.tensor(term_weights, dtype=F64).expand(len(terms), -1)
    B, T = len(terms), max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return SimpleNamespace(
        components=(terms * weights[..., None]).sum(1),
        terms=terms,
        term_weights=weights,
        first_open=torch.zeros(B, 1, dtype=torch.int64),
        segment_ids=torch.zeros(B, T, dtype=torch.int64),
        group_ids=torch.arange(B) // 2,
        completion_mask=mask,
        loss_mask=mask,
        token_costs=None,
        confidence_components=None,
        confidence_segments=None,
    )


def test_gdpo_by_hand():
    """The paper's example (section 2): (0, 1) and (0, 2) of two rewards are one advantage to GRPO.

    Group 1: rewards (0, 0) and (1, 0). Group 2: (0, 0) and (1, 1). The second reward weighs 3.
    """
    spread = 0.5**0.5  # of 0 and 1
    a = 0.5 / (spread + 1e-4)
    sums = np.array([-a, a, -4 * a, 4 * a])
    batch = gdpo_batch([[0, 0], [1, 0], [0, 0], [1, 1]], [1, 3], [1, 1, 1, 1])
    std = (sums @ sums / 3) ** 0.5
    got = token_advantages(batch, "set", "mean", "term_std")[:, 0]
    np.testing.assert_allclose(got, sums / (std + 1e-8), rtol=1e-12)
    # GRPO: both winners look alike
    grpo = token_advantages(batch, "set", "mean", "group_std")[:, 0]
    assert grpo[1].item() == pytest.approx(grpo[3].item(), rel=1e-3)

    # Tokens are counted: the last completion has three of six.
    batch = gdpo_batch([[0, 0], [1, 0], [0, 0], [1, 1]], [1, 3], [1, 1, 1, 3])
    of_tokens = np.array([-a, a, -4 * a, *[4 * a] * 3])
    mean, std = of_tokens.mean(), of_tokens.std(ddof=1)
    got = token_advantages(batch, "set", "mean", "term_std")
    np.testing.assert_allclose(got[:, 0], (sums - mean) / (std + 1e-8), rtol=1e-12)
    assert got[3].tolist() == [got[3, 0].item()] * 3 and got[0, 1:].tolist() == [0, 0]


def test_gdpo_of_one_term_is_grpo_whitened():
    batch = gdpo_batch([[0.0], [2.0], [1.0], [1.0]], [1.0], [2, 1, 1, 2])
    got = token_advantages(batch, "set", "mean", "term_std")
    grpo = token_advantages(batch, "set", "mean", "group_std")
    tokens = grpo[batch.loss_mask]
    expected = (grpo - tokens.mean()) / (tokens.std() + 1e-8) * batch.completion_mask
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("choice", ["credit", "baseline", "scale"])
def test_unknown_choices_are_refused(choice):
    with pytest.raises(ValueError, match=f"unknown {choice} 'typo'"):
        answer_advantages(*map(torch.from_numpy, batch_of(0, [0, 0])), **{choice: "typo"})


@pytest.mark.parametrize("choice", ["credit", "baseline"])
def test_a_rule_without_one_number_for_each_segment_is_refused(choice, monkeypatch):
    rules = {"credit": reference.CREDITS, "baseline": reference.BASELINES}[choice]
    arguments = tuple(map(torch.from_numpy, batch_of(0, [0, 0])))
    monkeypatch.setitem(rules, "mine", lambda seen: seen.components[:, :1].expand(-1, 40))
    with pytest.raises(ValueError, match=rf"{choice} 'mine' gives \[2, 40\]: it must give one"):
        answer_advantages(*arguments, **{choice: "mine"})


# --- linear_logprobs against log_softmax ----------------------------------------------------------


@pytest.fixture(params=[1 << 23, 8, 1], ids=["one block", "blocks of one row", "less than a row"])
def block_elements(request, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", request.param)


def inputs(N=5, D=3, V=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(N, D, generator=generator, dtype=F64),
        torch.randn(V, D, generator=generator, dtype=F64),
    )
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(V, (N,), generator=generator),
    )


def plain(hidden, weight, targets, temperature):
    """Log-probability, entropy and log-sum-exp by way of the whole [N, V]."""
    logits = hidden @ weight.T / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy, torch.logsumexp(logits, -1)


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("upstream", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.3, -1.2, 0.5)])
def test_linear_logprobs_and_its_gradients_are_those_of_log_softmax(temperature, upstream):
    hidden, weight, targets = inputs()
    expected, got = (f(hidden, weight, targets, temperature) for f in (plain, linear_logprobs))
    per_row = torch.arange(1, 6, dtype=F64)
    gradients = []
    for outputs in (expected, got):
        loss = sum(
            c * (per_row * output).sum() for c, output in zip(upstream, outputs, strict=True)
        )
        gradients.append(torch.autograd.grad(loss, (hidden, weight)))
    for a, b in zip((*expected, *gradients[0]), (*got, *gradients[1]), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_linear_logprobs_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 8)
    hidden, weight, targets = inputs(N=3, D=2, V=4)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, targets, 0.9), (hidden, weight)
    )


@pytest.mark.usefixtures("block_elements")
def test_a_token_of_probability_zero_leaves_everything_finite():
    hidden, weight, targets = inputs()
    hidden, weight = hidden.detach().abs(), weight.detach().clone()
    weight[2] = -torch.inf  # its logit is -inf in every row
    weight.requires_grad_()
    targets = targets.masked_fill(targets == 2, 3)
    got, expected = (
        linear_logprobs(hidden, weight, targets, 0.8),
        plain(hidden, weight, targets, 0.8),
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b)
    (gradient,) = torch.autograd.grad(got[0].sum() + got[1].sum(), weight)
    keep = [0, 1, 3, 4, 5, 6]
    part = weight.detach()[keep].requires_grad_()
    moved = torch.tensor([keep.index(t) for t in targets.tolist()])
    without = plain(hidden, part, moved, 0.8)
    (wanted,) = torch.autograd.grad(without[0].sum() + without[1].sum(), part)
    torch.testing.assert_close(gradient[keep], wanted)
    assert not gradient[2].any()


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("upstream", [(1, 0, 0), (0, 1, 0), (0.3, -1.2, 0.5)])
def test_a_frozen_head_gets_no_gradient_and_changes_no_other(upstream):
    hidden, weight, targets = inputs()

    def gradient_of_hidden(head):
        loss = sum(
            c * output.sum()
            for c, output in zip(upstream, linear_logprobs(hidden, head, targets, 0.7), strict=True)
        )
        return torch.autograd.grad(loss, hidden)[0]

    assert gradient_of_hidden(weight).any()
    assert torch.equal(gradient_of_hidden(weight), gradient_of_hidden(weight.detach()))


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("where", ["hidden", "weight", "upstream"])
@pytest.mark.parametrize("output", [0, 1, 2])
def test_nan_stays_nan(where, output):
    """A NaN that came out as a gradient of 0 would train on without a word."""
    hidden, weight, targets = inputs()
    upstream = torch.ones(5, dtype=F64)
    {"hidden": hidden.detach(), "weight": weight.detach(), "upstream": upstream[:, None]}[where][
        3, 0
    ] = torch.nan
    gradients = torch.autograd.grad(
        linear_logprobs(hidden, weight, targets, 0.7)[output], (hidden, weight), upstream
    )
    assert gradients[0][3].isnan().all() and gradients[1].isnan().all()
    if where != "weight":
        assert not gradients[0][:3].isnan().any()


@pytest.mark.parametrize("blocks", [(3, 2), (4, 100), (100, 3)], ids=["both", "rows", "columns"])
@pytest.mark.parametrize("size", [(0, 3, 7), (1, 3, 1), (13, 4, 11)])
def test_blocks_tile_the_logits(blocks, size, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_ROWS", blocks[0])
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", blocks[0] * blocks[1])
    hidden, weight, targets = inputs(*size)
    found = []
    for function in (plain, linear_logprobs):
        outputs = function(hidden, weight, targets, 0.7)
        found.append(
            (*outputs, *torch.autograd.grad(outputs[0].sum() - outputs[1].sum(), (hidden, weight)))
        )
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand_in_low_precision(dtype):
    """Outputs are float32 and those of the rounded inputs; gradients have the inputs' own type."""
    hidden, weight, targets = (x.detach() for x in inputs(N=6, D=8, V=50))
    hidden, weight = (
        (hidden * 1000).to(dtype).requires_grad_(),
        (weight * 10).to(dtype).requires_grad_(),
    )
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    got, expected = linear_logprobs(hidden, weight, targets), plain(*exact, targets, 1.0)
    assert expected[2].abs().max() > 1e4
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0.01)
    gradients = torch.autograd.grad(got[0].sum(), (hidden, weight))
    for a, b in zip(gradients, torch.autograd.grad(expected[0].sum(), exact), strict=True):
        assert a.dtype == dtype and a.isfinite().all()
        assert (a - b).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-3) * b.norm()


def test_selected_logprobs():
    logits = torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 5, 2, 2])
    torch.testing.assert_close(
        selected_logprobs(logits, targets), torch.log_softmax(logits, -1)[range(4), targets]
    )


# --- the estimator against the exact policy gradient ----------------------------------------------
# A tabular softmax policy writes two slots, a token a step out of three. Every completion is
# enumerated: right ones, repeats, broken ones and ones that stop early (""). Tokens lie across
# borders, so segments come from positions and not from token numbers.

STEPS = [
    ["<answer1>a", "<answer1>b", "so: "],
    ["</answer1><confidence1>0.9</confidence1>", "</answer1><confidence1>0.2", "</answer1>\n<confidence1>50%</confidence1>"],
    ["<answer2>a</answer2>", "</confidence1><answer2>b</answer2>", "<answer2>c"],
    ["<confidence2>0.8</confidence2>", "</answer2><confidence2>0.1</confidence2>", ""],
    ["", "\n", "bye"],
]  # fmt: skip
GRAMMAR = Grammar("rlcr_multi", 2, thinking=False)
TOY_SPECS = {
    "paper": RewardSpec(),
    "ungated": RewardSpec(gate=False),
    "gates": RewardSpec(coverage="any", sum_rule=True, duplicates="gate", rank_weights=(1.0, 0.5)),
    "released": RewardSpec(
        coverage="fraction_golds", brier="released", coverage_weight=0.5, brier_weight=0.5
    ),
}


class Toy:
    """All completions [n], each with its probability, states and actions [n, T], reward components
    and segments.
    """

    def __init__(self, spec):
        rng = np.random.default_rng(0)
        self.policy, sequences = {}, []  # prefix -> (state, probabilities)
        frontier = [((), 1.0)]
        for _ in STEPS:
            grown = []
            for prefix, chance in frontier:
                if prefix and STEPS[len(prefix) - 1][prefix[-1]] == "":
                    sequences.append((prefix, chance))
                    continue
                logits = rng.normal(size=3)
                probs = np.exp(logits) / np.exp(logits).sum()
                self.policy[prefix] = (len(self.policy), probs)
                grown += [((*prefix, a), chance * probs[a]) for a in range(3)]
            frontier = grown
        sequences += frontier
        self.probs = np.array([chance for _, chance in sequences])
        n, T = len(sequences), len(STEPS)
        self.mask, self.states, self.actions, self.segments = (
            np.zeros((n, T), dtype=np.int64) for _ in range(4)
        )
        components, totals, self.reasons = [], [], []
        for i, (tokens, _) in enumerate(sequences):
            R = len(tokens)
            text, starts = decode_with_starts(
                range(R), lambda ids, t=tokens: "".join(STEPS[j][t[j]] for j in ids)
            )
            parsed = parse(text, GRAMMAR)
            golds = (Gold("a"), Gold("b"))
            hits, _ = matching_increments(parsed.answers, golds)
            earned = reward(parsed, hits, repeats(parsed.answers, golds), 2, GRAMMAR, spec)
            components.append(earned.components)
            totals.append(earned.total)
            self.reasons.append(parsed.reason)
            self.mask[i, :R], self.actions[i, :R], self.segments[i, :R] = (
                1,
                tokens,
                parsed.segments(starts[:-1]),
            )
            self.states[i, :R] = [self.policy[tokens[:t]][0] for t in range(R)]
        self.components, self.totals = np.array(components), np.array(totals)
        self.opens = first_open(GRAMMAR, spec)
        self.table = np.array([probs for _, probs in self.policy.values()])  # [states, 3]

    def score(self, rows, coefficients):
        """[n, states, 3]: for each row the sum over tokens of coefficient * d log pi(action |
        state) / d logits.
        """
        states, actions, index = (
            self.states[rows],
            self.actions[rows],
            np.arange(len(rows))[:, None],
        )
        coefficients = coefficients * self.mask[rows]
        gradient = np.zeros((len(rows), *self.table.shape))
        np.add.at(gradient, (index, states, actions), coefficients)
        np.add.at(gradient, (index, states), -coefficients[..., None] * self.table[states])
        return gradient

    def exact(self):
        return np.tensordot(
            self.probs * self.totals, self.score(np.arange(len(self.probs)), np.ones((1, 1))), 1
        )

    def estimated(self, credit, baseline="leave_one_out"):
        """Mean [states, 3] and total variance, over all pairs of completions (a group of two), of
        the group's estimate.
        """
        n = len(self.probs)
        pairs = np.stack(np.meshgrid(np.arange(n), np.arange(n), indexing="ij"), axis=-1).reshape(
            -1, 2
        )
        rows, chance = pairs.reshape(-1), np.repeat(self.probs[pairs].prod(1), 2)
        advantages = answer_advantages(
            torch.from_numpy(self.components[rows]),
            torch.ones(self.components.shape[1], dtype=F64),
            torch.from_numpy(self.opens).expand(len(rows), -1),
            torch.from_numpy(self.segments[rows]),
            torch.arange(len(pairs)).repeat_interleave(2),
            credit,
            baseline,
        ).numpy()
        mean, square = np.zeros_like(self.table), 0.0
        for block in np.array_split(np.arange(len(pairs)), 16):
            both = np.stack([2 * block, 2 * block + 1], axis=1).reshape(-1)
            estimates = (
                self.score(rows[both], advantages[both])
                .reshape(len(block), 2, *self.table.shape)
                .mean(1)
            )
            mean += np.tensordot(chance[2 * block], estimates, 1)
            square += (chance[2 * block] * (estimates**2).sum((1, 2))).sum()
        return mean, square - (mean**2).sum()


@cache
def toy(name):
    return Toy(TOY_SPECS[name])


def cosine(a, b):
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


def test_the_toy_has_every_kind_of_text():
    cases = toy("paper")
    assert cases.probs.sum() == pytest.approx(1)
    right = sum(p for p, reason in zip(cases.probs, cases.reasons, strict=True) if reason is None)
    assert 0.02 < right < 0.9
    assert set(cases.reasons) == {
        None,
        "unfinished",
        "text_outside_tags",
        "tag_inside",
        "trailing_text",
        "bad_confidence",
    }


@pytest.mark.parametrize("name", TOY_SPECS)
@pytest.mark.parametrize("credit", ["to_go", "set"])
def test_to_go_and_set_are_the_exact_policy_gradient(name, credit):
    cases = toy(name)
    exact = cases.exact()
    assert np.abs(exact).max() > 0.01
    np.testing.assert_allclose(cases.estimated(credit)[0], exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("credit", ["to_go", "set"])
def test_a_mean_that_includes_the_sample_shrinks_the_gradient(credit):
    cases = toy("paper")
    np.testing.assert_allclose(
        cases.estimated(credit, "mean")[0], cases.exact() / 2, atol=1e-10, rtol=0
    )


def test_own_credit_is_biased():
    cases = toy("paper")
    assert cosine(cases.estimated("own")[0], cases.exact()) < 0.999


def test_to_go_has_less_variance_than_one_scalar_a_completion():
    """Half, without the format gate. With it the end component takes back what earlier ones paid,
    and here (5 % well-formed) nothing is won.
    """
    cases = toy("ungated")
    assert cases.estimated("to_go")[1] < 0.6 * cases.estimated("set")[1]

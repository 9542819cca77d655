"""The sampler draws from the trainer's model, and a completion is the same in whatever company it is made."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from mar.attention import group_attention, pack_groups
from mar.draw import draw_tokens, stream_key, uniforms
from mar.model import ARCHITECTURES
from mar.records import UserError
from mar.sampler import RETIRE_EVERY, Request, SamplingParams, generate, waves

PLENTY = 10**6


def requests(lengths, group_size, vocab=23):
    """One request per prompt length; `group_size` is one number or one per prompt."""
    rng = np.random.default_rng(0)
    sizes = [group_size] * len(lengths) if isinstance(group_size, int) else group_size
    prompts = [tuple(rng.integers(0, vocab, n).tolist()) for n in lengths]
    return [
        Request(p, tuple(stream_key(0, "test", i, g) for g in range(n)))
        for i, (p, n) in enumerate(zip(prompts, sizes, strict=True))
    ]


def next_logits(model, ids):
    """Logits after `ids`, by a full pass."""
    packed = pack_groups([ids], [[]])
    with torch.no_grad():
        return model.hidden(packed.ids, packed.positions, group_attention(packed))[-1] @ model.head_weight.T


def trainer_logprobs(model, asked, groups, temperature):
    """What the training pass says of sampled completions, in order [M]."""
    packed = pack_groups([r.prompt_ids for r in asked], [[s.ids.tolist() for s in group] for group in groups])
    with torch.no_grad():
        return model(packed, temperature)[0].numpy()


def join(groups, name):
    return np.concatenate([getattr(sampled, name) for group in groups for sampled in group])


def same(ours, theirs):
    """Identical tokens; log-probabilities to the rounding of float64."""
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_allclose(ours.full_logprobs, theirs.full_logprobs, atol=1e-11)
    np.testing.assert_allclose(ours.sampler_logprobs, theirs.sampler_logprobs, atol=1e-11)
    assert ours.finish_reason == theirs.finish_reason


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_full_recomputation(architecture, tiny_model):
    model = tiny_model(architecture)
    asked = requests((1, 33, 6), (2, 1, 3))
    for request, group in zip(asked, generate(model, asked, SamplingParams(19, 0.0), PLENTY), strict=True):
        ids = list(request.prompt_ids)
        for t in range(19):
            logits = next_logits(model, ids)
            ids.append(int(logits.argmax()))
            expected = logits.log_softmax(0).max().item()
            assert all(abs(sampled.full_logprobs[t] - expected) < 1e-10 for sampled in group)
        for sampled in group:
            assert sampled.ids.tolist() == ids[len(request.prompt_ids) :]
            assert not sampled.sampler_logprobs.any()  # greedy draws with certainty


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_logprobs_are_the_trainers(dtype, tolerance, tiny_model):
    model, asked, temperature = tiny_model(dtype=dtype), requests((3, 40, 1, 11), 3), 0.7
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    before = None
    for _ in range(3):
        groups = generate(model, asked, SamplingParams(21, temperature, (4,)), PLENTY)
        full = join(groups, "full_logprobs")
        expected = trainer_logprobs(model, asked, groups, temperature)
        assert np.abs(expected).mean() > 0.5
        np.testing.assert_allclose(full, expected, atol=tolerance, rtol=0)
        np.testing.assert_array_equal(full, join(groups, "sampler_logprobs"))
        if before is not None:  # the weights did change
            assert (
                np.abs(trainer_logprobs(model, asked, before, temperature) - join(before, "full_logprobs")).max() > 0.1
            )
        before = groups
        packed = pack_groups([r.prompt_ids for r in asked], [[s.ids.tolist() for s in group] for group in groups])
        logprobs = model(packed, temperature)[0]
        optimizer.zero_grad()
        (logprobs * torch.linspace(-1, 1, len(logprobs), dtype=dtype)).mean().backward()
        optimizer.step()


def test_whole_completions_follow_their_exact_probabilities(tiny_model):
    model, vocab, stop, longest, n, temperature = tiny_model(vocab=5, layers=1, seed=3), 5, 2, 3, 4000, 0.8
    others = [i for i in range(vocab) if i != stop]
    texts = [(*head, stop) for r in range(longest) for head in itertools.product(others, repeat=r)]
    texts += list(itertools.product(others, repeat=longest))
    request = Request((1, 3, 0), tuple(stream_key("chi", i) for i in range(n)))
    packed = pack_groups([request.prompt_ids], [texts])
    with torch.no_grad():
        logprobs = model(packed, temperature)[0].split([len(text) for text in texts])
    exact = np.array([x.sum().exp().item() for x in logprobs])
    assert abs(exact.sum() - 1) < 1e-12

    (group,) = generate(model, [request], SamplingParams(longest, temperature, (stop,)), PLENTY)
    index = {text: i for i, text in enumerate(texts)}
    counts = np.bincount([index[tuple(s.ids.tolist())] for s in group], minlength=len(texts))
    rare = exact * n < 5
    assert (~rare).sum() > 30
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, exact * n))
    assert chisquare(observed, expected).pvalue > 1e-3


def test_each_row_draws_its_own_first_token(tiny_model):
    model, asked = tiny_model(), requests((9, 2), 40)
    for request, group in zip(asked, generate(model, asked, SamplingParams(1), PLENTY), strict=True):
        keys = torch.tensor(request.keys)
        logits = next_logits(model, request.prompt_ids).expand(40, -1)
        expected, _ = draw_tokens(logits, uniforms(keys, torch.zeros_like(keys)), 1.0)
        assert [s.ids.tolist() for s in group] == expected[:, None].tolist()
        assert len(set(expected.tolist())) > 3


def test_a_row_does_not_depend_on_its_neighbours(tiny_model):
    model, params = tiny_model(), SamplingParams(20, 1.0, (3, 5))
    asked = requests((4, 30, 1, 12), 3)
    alone = [generate(model, [Request(r.prompt_ids, (key,))], params, PLENTY)[0][0] for r in asked for key in r.keys]
    assert len({len(s.ids) for s in alone}) > 4
    tightest = max(len(r.prompt_ids) for r in asked) + 3 * 20
    assert len(list(waves(asked, 20, 2 * tightest))) > 1
    for budget in (PLENTY, 2 * tightest, tightest):
        for mine, theirs in zip(itertools.chain(*generate(model, asked, params, budget)), alone, strict=True):
            same(mine, theirs)
    backwards = [Request(r.prompt_ids, r.keys[::-1]) for r in reversed(asked)]
    for mine, theirs in zip(itertools.chain(*generate(model, backwards, params, PLENTY)), alone[::-1], strict=True):
        same(mine, theirs)
    larger = [Request(r.prompt_ids, (*(stream_key("x", i) for i in range(3)), r.keys[0], 0)) for r in asked]
    for group, theirs in zip(generate(model, larger, params, PLENTY), alone[::3], strict=True):
        same(group[3], theirs)


def test_rows_stop_where_they_should_and_leave_the_others_alone(tiny_model):
    model, asked, longest = tiny_model(seed=5), requests((5, 17, 2, 9), (6, 1, 3, 1)), 5 * RETIRE_EVERY
    stops = (3, 5)
    endless = generate(model, asked, SamplingParams(longest), PLENTY)
    stopped = generate(model, asked, SamplingParams(longest, 1.0, stops), PLENTY)
    for whole, cut in zip(itertools.chain(*endless), itertools.chain(*stopped), strict=True):
        assert len(whole.ids) == longest and whole.finish_reason == "length"
        found = np.flatnonzero(np.isin(whole.ids, stops))
        length = found[0] + 1 if len(found) else longest
        assert len(cut.ids) == len(cut.full_logprobs) == len(cut.sampler_logprobs) == length
        assert cut.finish_reason == ("stop" if len(found) else "length")
        np.testing.assert_array_equal(cut.ids, whole.ids[:length])
        np.testing.assert_allclose(cut.full_logprobs, whole.full_logprobs[:length], atol=1e-11)
    lengths = [[len(s.ids) for s in group] for group in stopped]
    flat = sum(lengths, [])
    assert (
        min(flat) < RETIRE_EVERY and max(flat) == longest and len({n // RETIRE_EVERY for n in flat}) > 2
    )  # rows retire at several times
    assert any(max(group) < RETIRE_EVERY for group in lengths)  # ... and with one of them its prompt


def test_a_batch_that_is_done_stops_early(tiny_model):
    model, asked, calls = tiny_model(), requests((5, 2), 2), []
    hidden = model.hidden
    model.hidden = lambda *args: calls.append(1) or hidden(*args)
    (a, b), (c, d) = generate(model, asked, SamplingParams(500, 1.0, tuple(range(23))), PLENTY)
    assert [len(s.ids) for s in (a, b, c, d)] == [1, 1, 1, 1] and len(calls) <= RETIRE_EVERY


@pytest.mark.parametrize("stops, reason", [((), "length"), (tuple(range(23)), "stop")])
def test_one_token_at_most(stops, reason, tiny_model):
    ((sampled,),) = generate(tiny_model(), requests((4,), 1), SamplingParams(1, 1.0, stops), PLENTY)
    assert len(sampled.ids) == 1 and sampled.finish_reason == reason


def test_waves_keep_to_the_budget():
    lengths, budget = (10, 3, 50, 2, 2, 2, 40, 40), 150
    asked = requests(lengths, (2, 1, 3, 1, 1, 1, 2, 2))
    chosen = list(waves(asked, 20, budget))
    assert sum(chosen, []) == list(range(8)) and 2 < len(chosen) < 8
    for wave in chosen:  # what the cache holds: prompts are padded to the longest
        assert len(wave) * max(lengths[i] for i in wave) + 20 * sum(len(asked[i].keys) for i in wave) <= budget
    assert list(waves([], 20, budget)) == []


def test_a_group_over_the_budget_is_refused(tiny_model):
    asked = requests((5, 13), 3)
    generate(tiny_model(), asked, SamplingParams(4), 25)
    with pytest.raises(UserError, match=r"needs 25 tokens .*prompt 13 \+ 3 x 4.*kv_budget_tokens from 24,"):
        generate(tiny_model(), asked, SamplingParams(4), 24)

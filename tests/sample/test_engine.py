"""The sampler draws from the trainer's model, and no completion depends on its neighbours."""

import gc
import inspect
import itertools
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mar.errors import UserError
from mar.policy import model as decoder
from mar.policy.attention import group_attention
from mar.policy.model import ARCHITECTURES
from mar.policy.packing import pack_groups
from mar.sample import engine as sampler
from mar.sample import kv_cache
from mar.sample.draws import (
    SamplingParams,
    Truncation,
    draw_tokens,
    stream_key,
    truncated_logprobs,
    uniforms,
)
from mar.sample.engine import Engine, Request
from mar.sample.kv_cache import KVCache, capacity
from mar_kernels import graphs

PLENTY = 10**6
REAL_GRAPH = torch.cuda.graph


def slots_for(asked, max_tokens, budget):
    return capacity(
        [len(r.prompt_ids) for r in asked], [len(r.keys) for r in asked], max_tokens, budget
    )


def generate(*args, **options):
    return sampler.generate(*args, **options).groups


def flat(groups):
    return list(itertools.chain.from_iterable(groups))


def side_by_side(ours, theirs):
    """The completions of two runs of the sampler, in pairs."""
    return zip(flat(ours), flat(theirs), strict=True)


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
        hidden = model.hidden(packed.ids, packed.positions, group_attention(packed))
        return hidden[-1] @ model.head_weight.T


def trainer_logprobs(model, asked, groups, temperature):
    """The training pass's log-probabilities of sampled completions, in order [M]."""
    with torch.no_grad():
        return model(packed_completions(asked, groups), temperature)[0].numpy()


def packed_completions(asked, groups):
    prompts = [request.prompt_ids for request in asked]
    completions = [[sampled.ids.tolist() for sampled in group] for group in groups]
    return pack_groups(prompts, completions)


def join(groups, name):
    return np.concatenate([getattr(sampled, name) for sampled in flat(groups)])


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
    groups = generate(model, asked, SamplingParams(19, 0.0), PLENTY)
    for request, group in zip(asked, groups, strict=True):
        ids = list(request.prompt_ids)
        for t in range(19):
            logits = next_logits(model, ids)
            ids.append(int(logits.argmax()))
            expected = logits.log_softmax(0).max().item()
            assert all(abs(sampled.full_logprobs[t] - expected) < 1e-10 for sampled in group)
        for sampled in group:
            assert sampled.ids.tolist() == ids[len(request.prompt_ids) :]
            # greedy draws with certainty
            assert not sampled.sampler_logprobs.any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "dtype, tolerance, packed",
    [(torch.float32, 1e-4, False), (torch.float32, 1e-4, True), (torch.float64, 1e-10, False)],
)
def test_logprobs_are_the_trainers(architecture, dtype, tolerance, packed, tiny_model, monkeypatch):
    """Also with weights laid out as large ones are on a CPU, and again after each update."""
    monkeypatch.setattr(decoder, "LARGE_WEIGHT", 0 if packed else decoder.LARGE_WEIGHT)
    model = tiny_model(architecture, dtype=dtype)
    asked = requests((3, 40, 1, 11), 3)
    temperature = 0.7
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
            now = trainer_logprobs(model, asked, before, temperature)
            assert np.abs(now - join(before, "full_logprobs")).max() > 0.1
        before = groups
        logprobs = model(packed_completions(asked, groups), temperature)[0]
        optimizer.zero_grad()
        (logprobs * torch.linspace(-1, 1, len(logprobs), dtype=dtype)).mean().backward()
        optimizer.step()


def test_whole_completions_follow_their_exact_probabilities(tiny_model):
    vocab, stop, longest, n, temperature = 5, 2, 3, 4000, 0.8
    model = tiny_model(vocab=vocab, layers=1, seed=3)
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
    groups = generate(model, asked, SamplingParams(1), PLENTY)
    for request, group in zip(asked, groups, strict=True):
        keys = torch.tensor(request.keys)
        logits = next_logits(model, request.prompt_ids).expand(40, -1)
        expected, _, _ = draw_tokens(logits, uniforms(keys, torch.zeros_like(keys)), 1.0)
        assert [s.ids.tolist() for s in group] == expected[:, None].tolist()
        assert len(set(expected.tolist())) > 3


def test_probabilities_that_are_no_numbers_are_refused(tiny_model):
    model = tiny_model()
    with torch.no_grad():
        model.blocks[0].down.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite numbers"):
        generate(model, requests((3,), 2), SamplingParams(2), PLENTY)


def test_a_row_does_not_depend_on_its_neighbours(tiny_model):
    model, params = tiny_model(), SamplingParams(20, 1.0, (3, 5))
    asked = requests((4, 30, 1, 12), 3)
    alone = [
        generate(model, [Request(r.prompt_ids, (key,))], params, PLENTY)[0][0]
        for r in asked
        for key in r.keys
    ]
    assert len({len(s.ids) for s in alone}) > 4
    tightest = max(len(r.prompt_ids) for r in asked) + 3 * 20
    assert slots_for(asked, 20, tightest) == (1, 3) and slots_for(asked, 20, 2 * tightest)[1] < 12
    for budget in (PLENTY, 2 * tightest, tightest):
        together = flat(generate(model, asked, params, budget))
        for mine, theirs in zip(together, alone, strict=True):
            same(mine, theirs)
    backwards = [Request(r.prompt_ids, r.keys[::-1]) for r in reversed(asked)]
    together = flat(generate(model, backwards, params, PLENTY))
    for mine, theirs in zip(together, alone[::-1], strict=True):
        same(mine, theirs)
    larger = [
        Request(r.prompt_ids, (*(stream_key("x", i) for i in range(3)), r.keys[0], 0))
        for r in asked
    ]
    for group, theirs in zip(generate(model, larger, params, PLENTY), alone[::3], strict=True):
        same(group[3], theirs)


@pytest.mark.parametrize("budget", [PLENTY, 230])
@pytest.mark.parametrize("every", [1, 8])
def test_rows_stop_where_they_should_and_leave_the_others_alone(every, budget, tiny_model):
    model, asked = tiny_model(seed=5), requests((5, 17, 2, 9), (5, 1, 3, 1))
    longest, stops = 40, (3, 5)
    endless = generate(model, asked, SamplingParams(longest), PLENTY)
    late = {"stop_strings": ("never",)} if every > 1 else {}
    params = SamplingParams(longest, 1.0, stops, **late)
    stopped = generate(model, asked, params, budget, decode=lambda ids: "x" * len(ids))
    for whole, cut in side_by_side(endless, stopped):
        assert len(whole.ids) == longest and whole.finish_reason == "length"
        found = np.flatnonzero(np.isin(whole.ids, stops))
        length = found[0] + 1 if len(found) else longest
        assert len(cut.ids) == len(cut.full_logprobs) == len(cut.sampler_logprobs) == length
        assert cut.finish_reason == ("stop" if len(found) else "length")
        np.testing.assert_array_equal(cut.ids, whole.ids[:length])
        np.testing.assert_allclose(cut.full_logprobs, whole.full_logprobs[:length], atol=1e-11)
    lengths = [len(sampled.ids) for sampled in flat(stopped)]
    assert min(lengths) < 8 and max(lengths) == longest
    # rows retire at several times
    assert len({n // 8 for n in lengths}) > 2


def spell(ids):
    return "".join(chr(97 + i) for i in ids)


def test_a_stop_string_ends_a_row_at_the_token_that_completes_it(tiny_model):
    model, asked = tiny_model(vocab=3, seed=2), requests((5, 2), 40, vocab=3)
    endless = generate(model, asked, SamplingParams(60), PLENTY)
    params = SamplingParams(60, stop_strings=("abca", "ccc"))
    stopped = generate(model, asked, params, 2500, decode=spell)
    reasons = set()
    for whole, cut in side_by_side(endless, stopped):
        text = spell(whole.ids)
        ends = [text.find(stop) + len(stop) for stop in params.stop_strings if stop in text]
        assert spell(cut.ids) == text[: min(ends, default=60)]
        assert cut.finish_reason == ("stop_string" if ends else "length")
        reasons.add(cut.finish_reason)
    assert reasons == {"stop_string", "length"}


def test_a_thinking_budget_puts_in_the_closing_tag_and_nothing_else(tiny_model):
    model, asked = tiny_model(seed=4), requests((5, 11, 8), 24)
    close = (7, 9)
    free = generate(model, asked, SamplingParams(20), PLENTY)

    def decode(ids):  # token 3 is what the model itself closes its thoughts with
        return "".join("</think>" if i == 3 else "." for i in ids)

    params = SamplingParams(20, think_budget=6, think_close=close)
    # slots are used again
    groups = generate(model, asked, params, 24 * 20 + 2 * 11, decode=decode)
    kinds = set()
    for whole, sampled in side_by_side(free, groups):
        np.testing.assert_array_equal(sampled.ids[:6], whole.ids[:6])
        closed = 3 in whole.ids[:6].tolist()
        kinds.add(closed)
        assert sampled.inserted == ((0, 0) if closed else (6, 8))
        if closed:
            np.testing.assert_array_equal(sampled.ids, whole.ids)
        else:
            assert tuple(sampled.ids[6:8]) == close and not sampled.sampler_logprobs[6:8].any()
    assert kinds == {True, False}
    np.testing.assert_allclose(
        join(groups, "full_logprobs"), trainer_logprobs(model, asked, groups, 1.0), atol=1e-10
    )


def test_truncated_draws_keep_both_log_probabilities(tiny_model):
    model, asked, temperature = tiny_model(), requests((4, 9), 8), 0.7
    params = SamplingParams(12, temperature, truncation=Truncation(top_k=5, top_p=0.8))
    groups = generate(model, asked, params, PLENTY)
    np.testing.assert_allclose(
        join(groups, "full_logprobs"),
        trainer_logprobs(model, asked, groups, temperature),
        atol=1e-10,
    )
    assert (join(groups, "sampler_logprobs") >= join(groups, "full_logprobs") - 1e-12).all()
    request, first = asked[0], groups[0][0]
    logits = next_logits(model, (*request.prompt_ids, *first.ids[:-1].tolist()))
    kept = truncated_logprobs((logits / temperature).log_softmax(-1)[None], params.truncation)[0]
    assert first.sampler_logprobs[-1] == pytest.approx(kept[first.ids[-1]].item(), abs=1e-10)


def test_slots_stay_busy_while_prompts_wait(tiny_model):
    model, asked = tiny_model(seed=5), requests([8] * 60, 4)
    params = SamplingParams(64, 1.0, (3, 5))
    budget = 5 * 8 + 24 * 64
    whole = sampler.generate(model, asked, params, PLENTY)
    tight = sampler.generate(model, asked, params, budget)
    lengths = [len(sampled.ids) for sampled in flat(tight.groups)]
    assert slots_for(asked, 64, budget)[1] <= 24
    assert max(lengths) >= 10 * np.percentile(lengths, 10)
    assert whole.occupancy is None and tight.occupancy >= 0.9
    for ours, theirs in side_by_side(tight.groups, whole.groups):
        same(ours, theirs)


@pytest.mark.parametrize("stop_strings", [(), ("abc",)])
def test_each_completion_waits_runs_in_a_row_of_its_own_and_is_done(tiny_model, stop_strings):
    """The scheduler's books, after each of its steps: with slots that are too few, and dropped."""
    asked = requests((5, 17, 2, 9, 4, 8), (5, 1, 3, 1, 4, 5))
    params = SamplingParams(24, 1.0, (3, 5), stop_strings=stop_strings)
    handed_over = []

    def on_done(request, completion):
        handed_over.append((request, completion.sample_index))

    engine = sampler.Engine(tiny_model(), asked, params, 300, spell, on_done)
    num_rows = set()

    def check_the_books():
        by_status = {status: [] for status in sampler.Status}
        for completion in engine.completions:
            by_status[completion.status].append(completion)
        assert by_status[sampler.Status.WAITING] == list(engine.waiting)
        running = by_status[sampler.Status.RUNNING]
        assert {id(c) for c in running} == {id(c) for c in engine.running}
        entered = [c.entered for c in engine.running]
        assert entered == sorted(entered)
        rows = [c.row for c in running]
        assert sorted([*rows, *engine.free_rows]) == list(range(len(engine.rows)))
        held = {c.prompt.slot for c in running}
        assert len(held) == len({c.prompt.index for c in running})
        assert sampler.NO_SLOT not in held and not held & set(engine.free_prompt_slots)
        done = by_status[sampler.Status.DONE]
        assert all(c.result is not None and c.row == sampler.NO_SLOT for c in done)
        assert sorted(handed_over) == [(c.prompt.index, c.sample_index) for c in done]
        num_rows.add(len(engine.rows))

    with torch.inference_mode():
        while engine.waiting or engine.running:
            for step in (engine.admit, engine.draw, engine.retire, engine.feed):
                step()
                check_the_books()
    assert len(handed_over) == 19 and len(num_rows) > 1


def test_the_prompt_is_kept_once(tiny_model):
    model, P, G, R = tiny_model(), 50, 6, 10
    shared = sampler.generate(model, requests([P, P], G), SamplingParams(R), PLENTY).kv_bytes
    unshared = 2 * G * sampler.generate(model, requests([P], 1), SamplingParams(R), PLENTY).kv_bytes
    assert shared / unshared == pytest.approx((P + G * R) / (G * (P + R)), rel=1e-12)


def test_a_batch_that_is_done_stops_early(tiny_model):
    model, asked = tiny_model(), requests((5, 2), 2)
    calls = []
    hidden = model.hidden
    model.hidden = lambda *args: calls.append(1) or hidden(*args)
    (a, b), (c, d) = generate(model, asked, SamplingParams(500, 1.0, tuple(range(23))), PLENTY)
    assert [len(s.ids) for s in (a, b, c, d)] == [1, 1, 1, 1]
    # the prefill
    assert len(calls) == 1


@pytest.mark.parametrize("stops, reason", [((), "length"), (tuple(range(23)), "stop")])
def test_one_token_at_most(stops, reason, tiny_model):
    ((sampled,),) = generate(tiny_model(), requests((4,), 1), SamplingParams(1, 1.0, stops), PLENTY)
    assert len(sampled.ids) == 1 and sampled.finish_reason == reason


@pytest.mark.parametrize(
    "budget, slots", [(110, (1, 3)), (160, (2, 3)), (400, (5, 6)), (660, (8, 13)), (659, (8, 12))]
)
def test_slots_keep_to_the_budget(budget, slots):
    asked = requests((10, 3, 50, 2, 2, 2, 40, 40), (2, 1, 3, 1, 1, 1, 2, 2))
    assert slots_for(asked, 20, budget) == slots and slots[0] * 50 + slots[1] * 20 <= budget


def test_a_group_over_the_budget_is_refused(tiny_model):
    asked = requests((5, 13), 3)
    generate(tiny_model(), asked, SamplingParams(4), 25)
    with pytest.raises(
        UserError, match=r"needs 25 tokens .*prompt 13 \+ 3 x 4.*kv_budget_tokens from 24,"
    ):
        generate(tiny_model(), asked, SamplingParams(4), 24)


def test_limits_end_each_row_at_its_own_length(tiny_model):
    model, (asked,) = tiny_model(), requests((6,), 3)
    (whole,) = generate(model, [asked], SamplingParams(12), PLENTY)
    (cut,) = generate(model, [replace(asked, limits=(1, 12, 5))], SamplingParams(12), PLENTY)
    assert [len(s.ids) for s in cut] == [1, 12, 5] and all(s.finish_reason == "length" for s in cut)
    for short, full in zip(cut, whole, strict=True):
        np.testing.assert_array_equal(short.ids, full.ids[: len(short.ids)])


@pytest.mark.slow
@pytest.mark.parametrize("prompt, tokens, vocab", [(8192, 4, 23), (3, 4096, 23), (5, 6, 151_936)])
def test_extreme_shapes(prompt, tokens, vocab, tiny_model):
    model = tiny_model(dtype=torch.float32, vocab=vocab, layers=1)
    asked = requests((prompt, 2), 2, vocab=vocab)
    groups = generate(model, asked, SamplingParams(tokens), PLENTY)
    assert all(len(s.ids) == tokens for group in groups for s in group)
    np.testing.assert_allclose(
        join(groups, "full_logprobs"), trainer_logprobs(model, asked, groups, 1.0), atol=1e-3
    )


@pytest.mark.slow
def test_the_decode_step_compiles_whole_and_never_again(tiny_model):
    model, asked = tiny_model(dtype=torch.float32), requests((5, 9), 4)
    params = SamplingParams(12, 0.0)
    eager = generate(model, asked, params, PLENTY)
    engine = sampler.Engine(model, asked, params, PLENTY)
    torch._dynamo.reset()
    compiled = torch.compile(sampler.decode_step, fullgraph=True)
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        engine.admit()
        for _ in range(params.max_tokens - 1):
            engine.draw()
            # the width is that of the whole buffer, so that no shape changes
            hidden = compiled(model, engine.cache, engine.rows.last_tokens, params.max_tokens)
            engine.rows.hidden = hidden
            engine.cache.own_lengths += 1
        engine.draw()
        engine.retire()
    for ours, theirs in side_by_side(engine.result().groups, eager):
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_allclose(ours.full_logprobs, theirs.full_logprobs, atol=1e-4)


class Recorded(TorchDispatchMode):
    """A CUDA graph on a CPU: the operators of one run, with the very tensors they read and wrote.

    Python is not run again. What it made itself is overwritten after each replay, as by other graphs
    of its pool: those bytes are all 255.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self.given = set()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in storages_of((args, kwargs)):
            if storage.data_ptr() not in self.made:
                self.given.add(storage.data_ptr())
        out = function(*args, **(kwargs or {}))
        for storage in storages_of(out):
            if storage.data_ptr() not in self.given:
                self.made[storage.data_ptr()] = storage
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            if not isinstance(out, tuple | list):
                out, again = (out,), (again,)
            for old, new in zip(out, again, strict=True):
                # views share their memory, and so does what is written in place
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        for storage in self.made.values():
            storage.fill_(255)


def storages_of(tree):
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.fixture
def recorded(monkeypatch):
    """The captures of `generate` on a CPU: of its draw, and of a step for each width."""
    found = []

    def capture(self, work):
        work()
        with Recorded() as graph:
            work()
        found.append(graph)
        return graph.replay

    monkeypatch.setattr(graphs.Graphs, "capture", capture)
    monkeypatch.setattr(sampler, "GRAPHED", ("cpu",))
    monkeypatch.setattr(sampler, "GRAPH_WIDTH", 8)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "truncation": Truncation(top_k=9, top_p=0.9)},
        {"think_budget": 6, "think_close": (4, 5)},
        {"stop_strings": ("7", "11")},
    ],
)
@pytest.mark.parametrize("budget", [PLENTY, 250])
def test_replayed_decode_steps_give_what_eager_ones_give(
    tiny_model, recorded, monkeypatch, budget, options
):
    """Also while rows retire, enter and are dropped.

    The buffers that a graph was captured from are those it must read later.
    """
    model, asked = tiny_model(), requests((5, 9, 30, 2), 4)
    params = SamplingParams(20, stop_ids=(3,), **options)

    def decode(ids):
        return " ".join(map(str, ids))

    replayed = sampler.generate(model, asked, params, budget, decode)
    assert 3 <= len(recorded) < replayed.num_steps / 2
    monkeypatch.setattr(sampler, "GRAPHED", ())
    eager = generate(model, asked, params, budget, decode)
    for ours, theirs in side_by_side(replayed.groups, eager):
        same(ours, theirs)


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA's graphs on a CPU: what they are asked for, and from which capture on they fail."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    asked = SimpleNamespace(captures=[], pools=0, fail_from=10**6)

    def new_pool():
        asked.pools += 1
        return ("pool", asked.pools)

    @contextmanager
    def graph(graph, **options):
        asked.captures.append(options)
        with Recorded() as recorded:
            yield
        graph.replay = recorded.replay
        if len(asked.captures) > asked.fail_from:
            raise RuntimeError("operation not permitted when stream is capturing")

    names = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": nullcontext,
        "graph": graph,
        "graph_pool_handle": new_pool,
        "CUDAGraph": SimpleNamespace,
    }
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(sampler, "GRAPHED", ("cpu",))
    monkeypatch.setattr(sampler, "GRAPH_WIDTH", 8)
    asked.stream = stream
    return asked


def test_graphs_of_all_widths_share_a_pool_and_other_threads_may_call_cuda(tiny_model, fake_cuda):
    generate(tiny_model(), requests((5, 9), 4), SamplingParams(20, 1.0, (3,)), PLENTY)
    assert len(fake_cuda.captures) >= 3 and fake_cuda.pools == 1
    for options in fake_cuda.captures:
        assert options == {
            "pool": ("pool", 1),
            "stream": fake_cuda.stream,
            "capture_error_mode": "thread_local",
        }
    known = inspect.signature(REAL_GRAPH.__init__).parameters
    assert set(options) < set(known)


# the draw is captured first, then a step for each width
@pytest.mark.parametrize("fail_from", [0, 1, 2])
def test_a_failed_capture_is_not_tried_again_and_nothing_stays(
    tiny_model, fake_cuda, monkeypatch, fail_from
):
    """The engine, and with it the KV cache, is gone without the garbage collector: nothing that
    failed refers back to it. The tokens are those of eager decoding, also where graphs of shorter
    widths had worked."""
    model, asked = tiny_model(), requests((5, 9, 30, 2), 4)
    params = SamplingParams(30, 1.0, (3,))
    engines = []
    initialise = Engine.__init__

    def remembered(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        engines.append((weakref.ref(self), weakref.ref(self.cache)))

    monkeypatch.setattr(Engine, "__init__", remembered)
    fake_cuda.fail_from = fail_from
    gc.disable()
    try:
        with pytest.warns(
            UserWarning, match="without CUDA graphs: operation not permitted"
        ) as seen:
            found = generate(model, asked, params, 250)
        assert [ref() for ref in engines[0]] == [None, None]
    finally:
        gc.enable()
    assert len(seen) == 1 and len(fake_cuda.captures) == fail_from + 1
    monkeypatch.setattr(sampler, "GRAPHED", ())
    for ours, theirs in side_by_side(found, generate(model, asked, params, 250)):
        same(ours, theirs)


@pytest.mark.parametrize("dtype,atol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_attention_on_other_devices_equals_that_on_cpu(dtype, atol):
    torch.manual_seed(0)
    q, keys, values = (torch.randn(5, 2, n, 8, dtype=dtype) for n in (6, 40, 40))
    hidden = torch.arange(40) >= torch.tensor([1, 7, 20, 39, 40])[:, None]
    bias = torch.zeros(5, 40, dtype=dtype).masked_fill(hidden, -torch.inf)[:, None, None]
    elsewhere = kv_cache._mix(q, keys, values, bias)
    on_cpu = kv_cache._mix_cpu(q, keys, values, bias)
    for ours, theirs in zip(elsewhere, on_cpu, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("mix,times", [(kv_cache._mix_cpu, 1.0), (kv_cache._mix, 1.5)])
def test_bfloat16_attention_is_about_as_exact_as_the_library(tiny_model, monkeypatch, mix, times):
    """On a CPU more exact: nothing is rounded but the result."""
    monkeypatch.setattr(kv_cache, "_mix_cpu", mix)
    torch.manual_seed(0)
    config, P, own, H = tiny_model(dtype=torch.bfloat16).config, 200, 50, 4
    cache = KVCache.allocate(config, 1, P, 3, own + 1, torch.zeros(1, dtype=torch.bfloat16))
    cache.assign([0, 0, 0], 3)
    for x in (cache.prompt_keys, cache.prompt_values, cache.own_keys, cache.own_values):
        x.normal_()
    cache.prompt_lengths.fill_(P)
    cache.own_lengths.fill_(own)
    q, k, v = (torch.randn(3, h, config.head_dim, dtype=torch.bfloat16) for h in (H, 2, 2))
    ours = cache.decode_attend(own + 1)(0, q, k, v).double()

    def of_every_row(prompt, own):
        return torch.cat((prompt[0].expand(3, -1, -1, -1), own[0]), 2)

    keys = of_every_row(cache.prompt_keys, cache.own_keys)
    values = of_every_row(cache.prompt_values, cache.own_values)

    def attention_in(dtype):
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None].to(dtype), keys.to(dtype), values.to(dtype), enable_gqa=True
        )
        return mixed[:, :, 0].double()

    exact = attention_in(torch.float64)
    library = attention_in(torch.bfloat16)
    assert (ours - exact).norm() < times * (library - exact).norm()


def test_bfloat16_rounds_neither_logits_nor_scores(tiny_model):
    """As the trainer, which has both in float32: else one policy would have two distributions."""
    torch.manual_seed(0)
    model = tiny_model(dtype=torch.bfloat16)
    engine = sampler.Engine(model, requests((3,), 2), SamplingParams(5), PLENTY)
    hidden = torch.randn(2, model.config.hidden_size, dtype=torch.bfloat16)
    exact = hidden.double() @ model.head_weight.double().T
    found = engine.logits(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-6)

    q, keys, values = (torch.randn(5, 2, n, 8, dtype=torch.bfloat16) for n in (6, 40, 40))
    bias = torch.zeros(5, 1, 1, 40, dtype=torch.bfloat16)
    mixed, lse = kv_cache._mix(q, keys, values, bias)
    scores = q.double() @ keys.double().mT / 8**0.5
    torch.testing.assert_close(lse[..., 0].double(), scores.logsumexp(-1), atol=1e-5, rtol=0)
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("limits", [(1,), (1, 2, 3), (0, 4)])
def test_limits_that_do_not_fit_the_keys_are_refused(limits):
    with pytest.raises(ValueError, match="limits"):
        Request((1, 2), (0, 0), limits)
    with pytest.raises(ValueError, match="prompt is empty"):
        Request((), (0, 0))


@pytest.mark.parametrize(
    "options",
    [{"stop_strings": ("",)}, {"think_budget": 3}, {"think_budget": 10, "think_close": (1,)}],
)
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(ValueError, match="stop string|think_budget"):
        SamplingParams(10, **options)


def test_options_that_read_text_need_a_decode(tiny_model):
    params = SamplingParams(10, stop_strings=("a",))
    with pytest.raises(ValueError, match="they need decode"):
        generate(tiny_model(), requests((3,), 2), params, PLENTY)


@pytest.mark.parametrize("temperature", (0.0, 1.0, 0.7))
@pytest.mark.parametrize("architecture", ("Qwen3ForCausalLM", "Qwen2ForCausalLM"))
def test_rows_that_are_no_tokens_are_never_drawn(architecture, temperature, tiny_model):
    """Embeddings are padded, and the padding may well have the largest logit. The sampler and the
    trainer know the same distribution, over the tokens alone."""
    model = tiny_model(architecture)
    assert (model.head is None) == (architecture == "Qwen3ForCausalLM"), "tied, and not"
    model.config = replace(model.config, num_tokens=17)
    weight = model.embed.weight if model.head is None else model.head.weight
    weight.data[17:] = 3 * weight.data[:6]
    asked = requests([4, 1, 7], 6, vocab=17)
    groups = generate(model, asked, SamplingParams(12, temperature), PLENTY)
    assert max(int(c.ids.max()) for c in flat(groups)) < 17
    np.testing.assert_allclose(
        join(groups, "full_logprobs"),
        trainer_logprobs(model, asked, groups, temperature or 1.0),
        atol=1e-10,
    )

    # The probabilities of the tokens alone add up to one.
    ids = list(range(17))
    packed = pack_groups([asked[0].prompt_ids], [[[id] for id in ids]])
    logprobs, entropy, _ = model(packed)
    probabilities = logprobs.exp()
    assert abs(probabilities.sum().item() - 1) < 1e-12
    expected = -(probabilities * logprobs).sum()
    torch.testing.assert_close(entropy, expected.expand(17), rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), weight)
    assert gradient[17:].abs().max() == 0 and gradient[:17].abs().max() > 0

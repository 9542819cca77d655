"""What a CUDA device must agree on with the CPU; run by `make gpu`."""

import itertools
import json

import numpy as np
import pytest
import torch

from mar.policy.packing import pack_groups
from mar.run.compose import compose
from mar.sample import engine as sampler
from mar.sample.draws import SamplingParams, stream_key
from mar.sample.engine import Request, generate
from mar.train import run

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_precision():
    assert torch.cuda.is_available(), "make gpu needs a CUDA device"
    torch.backends.cuda.matmul.allow_tf32 = False


def groups():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 23, n).tolist() for n in (130, 7, 64)]
    return prompts, [[rng.integers(0, 23, n).tolist() for n in (40, 3, 17)] for _ in prompts]


def test_group_forward_and_gradients_equal_the_cpu(tiny_model):
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model(dtype=torch.float32).to(device)
        logprobs, entropy, _ = model(pack_groups(*groups(), device))
        (logprobs.sum() + entropy.sum()).backward()
        found.append([logprobs.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_sampler_equals_the_cpu(tiny_model):
    prompts, _ = groups()
    asked = [
        Request(tuple(p), tuple(stream_key("gpu", i, g) for g in range(8)))
        for i, p in enumerate(prompts)
    ]
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model(dtype=torch.float32).to(device)
        found.append(generate(model, asked, SamplingParams(64, 1.0, (3,)), 10**6).groups)
    rows = list(zip(*(itertools.chain(*group) for group in found), strict=True))
    # a draw on a border may fall either way
    assert sum(np.array_equal(a.ids, b.ids) for a, b in rows) >= len(rows) - 1
    for ours, theirs in rows:
        if np.array_equal(ours.ids, theirs.ids):
            np.testing.assert_allclose(ours.full_logprobs, theirs.full_logprobs, atol=1e-3)


@pytest.mark.filterwarnings("error:decoding goes on without CUDA graphs")
@pytest.mark.parametrize("budget", [10**6, 1500])
def test_replayed_graphs_equal_eager_decoding(tiny_model, budget, monkeypatch):
    model = tiny_model(dtype=torch.float32).to("cuda")
    asked = [
        Request(tuple(p), tuple(stream_key("gpu", i, g) for g in range(8)))
        for i, p in enumerate(groups()[0])
    ]
    limits = tuple(range(20, 161, 20))  # rows leave one after another, and a width of 128 is passed
    asked = [Request(r.prompt_ids, r.keys, limits) for r in asked]
    replayed = generate(model, asked, SamplingParams(160, 0.0), budget).groups
    monkeypatch.setattr(sampler, "GRAPHED", ())
    eager = generate(model, asked, SamplingParams(160, 0.0), budget).groups
    for ours, theirs in zip(itertools.chain(*replayed), itertools.chain(*eager), strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_allclose(ours.full_logprobs, theirs.full_logprobs, atol=1e-4)


def test_a_step_with_the_policy_in_cpu_memory_is_the_one_without(tmp_path):
    found = []
    for offload in ("false", "true"):
        words = [
            "+experiment=clinic",
            "train.steps=1",
            "eval.num_items=2",
            f"scale.offload={offload}",
            f"out={tmp_path / offload}",
        ]
        assert run(compose([*words, "logger.console=plain", "algo.prompts_per_step=2"])) == 0
        rows = (tmp_path / offload / "clinic/seed0/metrics.jsonl").read_text()
        found.append(json.loads(rows)["policy/loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)

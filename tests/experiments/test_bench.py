"""What the benchmarks count, on the shipped model, held to its present level; times are not tested."""

import pytest
import torch
import transformers

from experiments.bench import common, sampler
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model


@pytest.mark.slow
def test_counts_of_the_sampler_stay_where_they_are():
    folder = resolve_model("embedded", "embedded", None)[0]
    case = sampler.cases(True, {"embedded": folder})[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = sampler.counts(load_model(folder), theirs, case)
    assert found["ops_ratio"] <= 0.9 and found["flops_ratio"] <= 0.3
    assert (
        found["kv_ratio"] == pytest.approx(found["kv_formula"], rel=1e-12)
        and found["occupancy"] >= 0.9
    )


def test_no_run_begins_after_the_limit_and_each_side_has_one(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(common.time, "perf_counter", lambda: float(next(now)))
    sides = {"a": lambda run: 1.0, "b": lambda run: 1.0}
    found = common.alternate(5, sides, limit_s=0.0)
    assert {name: len(speeds) for name, speeds in found.items()} == {"a": 1, "b": 1}
    # a look at the clock before each run, and two around each side: 5 s a run
    found = common.alternate(5, sides, limit_s=9.0)
    assert {name: len(speeds) for name, speeds in found.items()} == {"a": 2, "b": 2}

"""What the benchmarks count, on the shipped model, held to its present level; times are not tested."""

import pytest
import torch
import transformers

from experiments.bench import sampler
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

"""What the benchmarks count, on the shipped model, held to its present level; times are not tested."""

import pytest
import torch
import transformers

from experiments.bench import common, sampler
from experiments.gpu import count_operators
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


@pytest.mark.parametrize(("way", "most"), [("in_operators", 44), ("in_triton", 13)])
def test_kernels_of_a_decode_step_on_cuda_stay_where_they_are(way, most):
    way = getattr(count_operators, way)
    few, drawn = count_operators.count(count_operators.QWEN3, 2, way)
    more, _ = count_operators.count(count_operators.QWEN3, 3, way)
    assert more - few <= most
    assert drawn <= 44


def test_no_run_begins_after_the_limit_and_each_side_has_one(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(common.time, "perf_counter", lambda: float(next(now)))
    sides = {"a": lambda run: 1.0, "b": lambda run: 1.0}
    found = common.alternate(5, sides, limit_s=0.0)
    assert {name: len(speeds) for name, speeds in found.items()} == {"a": 1, "b": 1}
    # a look at the clock before each run, and two around each side: 5 s a run
    found = common.alternate(5, sides, limit_s=9.0)
    assert {name: len(speeds) for name, speeds in found.items()} == {"a": 2, "b": 2}


def test_a_case_becomes_smaller_where_a_run_would_take_too_long():
    prompts = [(1,) * 512, (2,) * 512]
    case = sampler.Case("shared", "smollm2-135m", prompts, 16, 64)
    # as measured on two quiet cores, and on a machine that is ten times slower
    quiet = sampler.Price(prompt_s=0.9, token_s=0.05)
    slow = sampler.Price(prompt_s=9.0, token_s=0.5)
    assert sampler.fitted(case, quiet) == case
    smaller = sampler.fitted(case, slow)
    assert slow.of_run(smaller) <= sampler.LONGEST_RUN_SECONDS < slow.of_run(case)
    assert smaller.prompts == prompts
    assert smaller.name == f"shared as 2 x {smaller.group_size} rows, {smaller.max_tokens} tokens"
    single = sampler.Case("single", "smollm2-135m", prompts * 8, 1, 128)
    assert sampler.fitted(single, slow).num_rows < 16
    # never below the smallest
    stopped = sampler.fitted(case, sampler.Price(1e6, 1e6))
    assert (stopped.num_rows, stopped.max_tokens) == (4, 8)


def test_idle_cores_are_those_that_nothing_used(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    readings = iter(["cpu 0 0 0 0 0 0 0 0 0 0", "cpu 100 0 0 300 0 0 0 0 0 0"])

    def next_reading(*_):
        stat.write_text(next(readings) + "\n")
        return stat.open().read()

    stat.write_text("")
    monkeypatch.setattr(common, "Path", lambda _: stat)
    monkeypatch.setattr(type(stat), "read_text", next_reading)
    monkeypatch.setattr(common.time, "sleep", lambda _: None)
    monkeypatch.setattr(common.os, "cpu_count", lambda: 4)
    assert common.idle_cores() == 3
    readings = iter(["cpu 0 0 0 0 0 0 0 0 0 0", "cpu 400 0 0 0 0 0 0 0 0 0"])
    assert common.idle_cores() == 1

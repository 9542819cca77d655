"""The sweeps on clinic: their words, the multi-label variant, and what their tables read off."""

import json

import numpy as np
import pytest

from experiments.algorithms import run as algorithms_run
from experiments.algorithms import summary as algorithms
from experiments.common.commands import confidence_sums
from experiments.sweeps import run, summary
from mar.run.compose import compose
from mar.tasks import clinic


@pytest.mark.slow
def test_every_setting_is_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run.write_visits(run.VISITS, num=3)
    settings = [words for sweep in run.SWEEPS.values() for words in sweep.values()]
    configs = [
        compose(words)
        for words in settings
        + [[*algorithms_run.SHARED, *words] for words, _ in algorithms_run.SETTINGS.values()]
    ]
    assert all(
        config.train.steps == 140 and config.eval.num_items in (500, 1000) for config in configs
    )
    logs = [
        run.log_of(sweep, setting, 0)
        for sweep, settings in run.SWEEPS.items()
        for setting in settings
    ]
    assert len(set(logs)) == len(logs)


def test_a_condition_of_several_problems_is_right_with_its_own_probability(tmp_path):
    run.write_visits(tmp_path / "visits.jsonl", num=2000)
    rows = [json.loads(line) for line in (tmp_path / "visits.jsonl").read_text().splitlines()]
    examples = clinic.load("train", 2000, seed=1_000)
    p = np.array([[gold.probability for gold in example.golds] for example in examples])
    right = np.array(
        [
            [gold.name in {g["name"] for g in row["golds"]} for gold in e.golds]
            for row, e in zip(rows, examples, strict=True)
        ]
    )
    expected = 1 - (1 - p) ** 6
    assert expected.sum(1).mean() > 2.5
    spread = np.sqrt((expected * (1 - expected)).sum(0))
    assert (np.abs((right - expected).sum(0)) < 4 * spread).all()
    likely = p > 0.5  # the patients' own probabilities, not the same for all
    assert right[likely].mean() == pytest.approx(expected[likely].mean(), abs=0.02)


def test_slots_are_means_over_sets_of_the_right_form(tmp_path):
    def a_set(confidences, hits, reason=None):
        return {"answers": ["a", "b"], "confidences": confidences, "hits": hits, "reason": reason}

    rows = [
        {"protocol": {}},
        {"arm": "policy", "sets": [a_set([0.9, 0.3, 0.1], [1, 0]), a_set([0.5, 0.5], [0, 1])]},
        {"arm": "policy", "sets": [a_set([None, 0.5], [1, 1], "missing")]},
        {"arm": "base", "sets": [a_set([0.0, 0.0], [1, 1])]},
    ]
    (tmp_path / "eval_items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run.by_slot(tmp_path) == {"confidence": [0.7, 0.4], "right": [0.5, 0.5], "above_1": 0.5}


def test_sums_of_confidences_by_window(tmp_path):
    def row(step, confidences, reason=None, stage="train"):
        return {
            "step": step,
            "stage": stage,
            "answers": ["a", "b"],
            "confidences": confidences,
            "reason": reason,
        }

    rows = [
        row(20, [1.0, 1.0], stage="eval"),
        row(1, [0.5, 0.2, 0.9]),
        row(20, [0.1, 0.4]),
        row(21, [None, 0.5], "missing"),
        row(22, [None, None]),
    ]
    rows += [row(60, [1.0, 0.5]), row(60, [0.0, 0.5])]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert confidence_sums(tmp_path) == [pytest.approx(0.6), None, 1.0]


def test_the_best_confidences_that_add_up_to_one():
    assert summary.obedient([0.8, 0.7, 0.6]) == pytest.approx([0.43333, 0.33333, 0.23333], abs=1e-4)
    assert summary.obedient([0.9, 0.8, 0.1]) == pytest.approx(
        [0.55, 0.45, 0.0]
    ) and summary.obedient([0.5, 0.3, 0.1]) == [0.5, 0.3, 0.1]


def test_tables_by_hand(monkeypatch):
    def log(seed, coverage, ece):
        bars = {"floor": [0.3, 0.5], "ceiling": [0.6, 0.9]}
        return {
            "seed": seed,
            "num_answers": 2,
            "curve": {"coverage": [[coverage]]},
            "bars": bars,
            "metrics": {"ece": [ece]},
        }

    columns = {"gap": summary.gap, "ece": summary.metric("ece"), "q_mse": summary.metric("q_mse")}
    lines = summary.table_over_seeds(
        {"a": [log(0, 0.7, 0.1), log(1, 0.7, 0.3)]}, columns, "trained"
    ).splitlines()
    assert lines == [
        "| trained | seeds | gap | ece | q_mse |",
        "| --- | --- | --- | --- | --- |",
        "| a | 2 | 0.500 | 0.100, 0.300 | – |",
    ]


def test_differences_are_taken_seed_by_seed(monkeypatch):
    closed = {
        "rloo, to_go": [0.3, 0.5],
        "rloo, set": [0.1, 0.1],
        "grpo": [0.0, 0.1],
        "reinforce": [0.4],
        "own": [0.5, 0.9],
    }
    logs = {
        name: [{"seed": seed, "gap_closed": value} for seed, value in enumerate(values)]
        for name, values in closed.items()
    }
    monkeypatch.setattr(algorithms, "PAIRS", algorithms.PAIRS[:1])
    monkeypatch.setattr(algorithms, "read_logs", lambda: logs)
    assert (
        algorithms.paired().splitlines()[-1]
        == "| rloo, to_go − rloo, set | 2 | +0.300 (-0.971 to +1.571) |"
    )

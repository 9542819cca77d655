"""The summary of the comparison on clinic: intervals by hand, holes stay holes, stale results are seen."""

import json

import numpy as np
import pytest

from experiments.claims import confidences, run, summary
from mar.itemstats import AnswerSet, Item


def log(method: str, seed: int, coverage: list[float], K: int) -> dict:
    k = [K * (i + 1) for i in range(len(coverage))]
    curve = {
        "k": k,
        "tokens": [10.0 * n for n in k],
        "coverage": [[c, c, c] for c in coverage],
        "unique": [[1.0 + c, 1, 2] for c in coverage],
    }
    bars = {"k": [1, 2, 3], "floor": [0.3, 0.5, 0.6] + [0.7] * 27, "ceiling": [0.5, 0.7, 0.8] + [0.9] * 27}
    metrics = {"top1": [0.4 + seed / 10, 0.3, 0.5], "tokens_per_set": [30.0, 29, 31]} | ({"ece": [0.1, 0, 0.2]} if K > 1 else {})
    rows = {"reliability": [], "unique_histogram": {"3": 5, "4": 5 + seed}, "tokens": [30, 31], "num_answers": K, "num_sets": len(k)}
    return {"method": method, "seed": seed, "bars": bars, "metrics": metrics, "curve": curve, **rows}


def test_numbers_and_intervals_by_hand():
    logs = {
        "multi_rlcr": [log("multi_rlcr", s, [0.7 + s / 100, 0.75], 3) for s in (0, 2)],
        "rlvr_single": [log("rlvr_single", 0, [0.4] * 30, 1)],
    }
    found = summary.results(logs)
    multi, single = found["multi_rlcr"], found["rlvr_single"]
    assert multi["coverage@3"]["mean"] == pytest.approx(0.71) and multi["coverage@3"]["n"] == 2
    half = 12.71 * 0.02 / 2**0.5 / 2**0.5  # t of one degree of freedom x standard deviation / sqrt(2)
    assert multi["coverage@3"]["hi"] == pytest.approx(0.71 + half) and multi["coverage@3"]["lo"] == pytest.approx(0.71 - half)
    assert multi["gap_closed"]["mean"] == pytest.approx((0.71 - 0.6) / 0.2) and multi["coverage@9"]["mean"] is None
    assert single["coverage@30"] == {"mean": pytest.approx(0.4), "lo": None, "hi": None, "n": 1} and single["ece"]["mean"] is None
    assert (found["floor"]["gap_closed"]["mean"], found["ceiling"]["gap_closed"]["mean"]) == (0.0, 1.0)
    assert found["ceiling"]["ece"]["mean"] == 0 and found["floor"]["ece"]["mean"] is None and found["floor"]["top1"]["mean"] == 0.3
    line = next(row for row in summary.table(found).splitlines() if row.startswith("| multi_rlcr"))
    assert line.startswith("| multi_rlcr | 2 | 0.550 ±") and line.count("–") == 4  # coverage@30, unique@30, q_mse and tv_distance
    assert summary.averaged(logs["multi_rlcr"])["unique_histogram"] == {"3": 10, "4": 12}


def test_other_logs_make_results_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "HERE", tmp_path)
    (tmp_path / "logs").mkdir()
    for seed in (0, 1):
        (tmp_path / f"logs/multi_rlcr_seed{seed}.json").write_text(json.dumps(log("multi_rlcr", seed, [0.7, 0.75], 3)))
    assert summary.stale()
    (tmp_path / "results.json").write_text(json.dumps({"logs": summary.fingerprint(), **summary.results(summary.read_logs())}))
    assert not summary.stale() and "| multi_rlcr | 2 |" in summary.markdown()
    (tmp_path / "logs/multi_rlcr_seed1.json").write_text(json.dumps(log("multi_rlcr", 1, [0.8, 0.85], 3)))
    assert summary.stale()


def test_what_is_named_is_trained_anew(tmp_path, monkeypatch):
    called = []

    def command(module, *words):
        folder = tmp_path / "runs/multi_rlvr/seed0"
        folder.mkdir(parents=True, exist_ok=True)
        called.append(module)
        (folder / "eval.json").write_text('{"after": {}}')
        arm = {
            "num_answers": 3,
            "num_sets": 1,
            "metrics": {},
            "curve": {},
            "reliability": [],
            "unique_histogram": {},
            "format_failures": {},
        }
        (folder / "evaluation.json").write_text(
            json.dumps({"num_items": 1, "bars": {}, "arms": {"policy": arm | {"tokens": [len(called)]}}})
        )
        return 1.0

    monkeypatch.setattr(run, "command", command)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    both = ["mar.train", "mar.evaluate"]
    for again, expected in ((False, both), (False, []), (True, both)):
        called.clear()
        run.one("multi_rlvr", 0, again)
        assert called == expected
    (tmp_path / "logs/multi_rlvr_seed0.json").unlink()  # trained, and cut off before it was measured
    called.clear()
    run.one("multi_rlvr", 0, True)
    assert called == both[1:]


def test_error_of_confidences_by_hand():
    """Drawn and expected parts, with a patient's other answers, format failures and answers given once set apart."""

    def a_set(key, q, p, reason=None):
        return AnswerSet("", (key,), (q,), (0.0,), (p,), (key,), (False,), reason, 9)

    sets = (a_set("flu", 0.2, 0.5), a_set("flu", 0.4, 0.5), a_set("cold", 0.9, 0.1), a_set("flu", 0.0, 0.0, "unfinished"))
    items = [Item("p1", 2, False, 1.0, 9, sets), Item("p2", 2, False, 1.0, 9, (a_set("flu", 0.5, 0.9), a_set("flu", 0.5, 0.9)))]
    found = confidences.parts(items, (0,))
    assert found["q_mse"] == pytest.approx((0.09 + 0.01 + 0.64 + 0.16 + 0.16) / 5)
    assert found["drawn"] == pytest.approx((0.02 + 0.0) / 2)  # of 0.2 and 0.4, and of 0.5 twice
    assert found["expected"] == pytest.approx(((0.04 - 0.01) + 0.16) / 2)
    assert found["constant"] == pytest.approx(np.var([0.5, 0.5, 0.1, 0.9, 0.9]))

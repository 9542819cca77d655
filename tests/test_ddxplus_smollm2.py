"""What the experiment on DDXPlus computes beside the runs: the constant answer, completions to read, the calibration table."""

import json

import pytest

from experiments.ddxplus_smollm2 import run, summary
from experiments.ddxplus_smollm2.constant import covered
from mar.records import Example, Gold


def patient(*golds: str) -> Example:
    return Example("id", "ddxplus", "?", tuple(map(Gold, golds)), "uniform", multi_label=True)


def test_the_most_frequent_golds_of_training_said_to_all():
    train = [patient("a", "b"), patient("a", "c"), patient("c", "a"), patient("d")]
    assert covered(train, [patient("a", "c"), patient("c"), patient("b")], 2) == (pytest.approx(3 / 3), ["a", "c"])
    assert covered(train, [patient("a", "c"), patient("c"), patient("b")], 1) == (pytest.approx(1 / 3), ["a"])


def test_completions_to_read(tmp_path):
    def row(step, name, **more):
        told = {"step": step, "stage": "eval", "id": name, "answers": ["flu", "flu"], "confidences": [0.5, 0.25], "hits": [1.0, 0.0]}
        return told | {"repeated": [False, True], "reason": None, "targets": ["flu", "cold"], "question": "words of the data set"} | more

    rows = [row(0, "p1"), row(0, "p2"), row(9, "p1", stage="train"), row(5, "p1"), row(9, "p1", reason="unfinished"), row(9, "p2")]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    kept = run.to_read(tmp_path, patients=1)
    assert [(r["step"], r["id"], r["golds"]) for r in kept] == [(0, "p1", 2), (9, "p1", 2)] and "question" not in kept[0]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    assert summary.to_read(tmp_path / "kept.jsonl").splitlines()[-1] == "| 2 | **flu** 0.50 · ~~flu~~ 0.25 | *unfinished* |"


def test_mean_confidence_weighs_bins_by_their_answers(tmp_path):
    bins = [{"count": 3, "said": 0.1, "right": [0.2, 0, 1]}, {"count": 1, "said": 0.9, "right": [1.0, 0, 1]}]
    log = {
        "method": "multi_rlcr",
        "seed": 4,
        "reliability": bins,
        "metrics": {"ece": [0.1, 0, 1]},
        "curve": {"k": [3], "coverage": [[0.5, 0, 1]]},
    }
    (tmp_path / "log.json").write_text(json.dumps(log))
    assert summary.calibration(tmp_path).splitlines()[-1] == "| multi_rlcr, 4 | 1 | 0.300 | 0.400 | 0.100 | – | – | 0.500 |"

"""What the experiment on DDXPlus computes beside the runs: the constant answer, completions to
read, names that are counted.
"""

import json

import pytest

from experiments.ddxplus_smollm2 import names, run, summary
from experiments.ddxplus_smollm2.constant import covered
from mar.records import Example, Gold


def patient(*golds: str) -> Example:
    return Example("id", "ddxplus", "?", tuple(map(Gold, golds)), "uniform", multi_label=True)


def test_the_most_frequent_golds_of_training_said_to_all():
    train = [patient("a", "b"), patient("a", "c"), patient("c", "a"), patient("d")]
    assert covered(train, [patient("a", "c"), patient("c"), patient("b")], 2) == (
        pytest.approx(3 / 3),
        ["a", "c"],
    )
    assert covered(train, [patient("a", "c"), patient("c"), patient("b")], 1) == (
        pytest.approx(1 / 3),
        ["a"],
    )


def test_completions_to_read(tmp_path):
    def kept(folder, *sets):
        """What is kept of a run that wrote these sets, (answers, confidences, reason) each, for its
        first patient after training.
        """

        def told(answers, confidences, reason):
            hits, again = (
                [float(a == "flu") for a in answers],
                [a in answers[:i] for i, a in enumerate(answers)],
            )
            scored = {
                "hits": [h * (not r) for h, r in zip(hits, again, strict=True)],
                "repeated": again,
                "reason": reason,
            }
            return {"answers": answers, "confidences": confidences} | scored

        folder.mkdir()
        before = told(["cold", "flu"][: len(sets[0][0])], sets[0][1], None)
        texts = [{"step": step, "stage": stage, "id": name, "targets": ["flu", "cold"], "question": "the data set's", **before}
                 for step, stage, name in ((0, "eval", "p2"), (0, "eval", "p1"), (9, "train", "p1"), (9, "eval", "p1"))]  # fmt: skip
        texts[0]["answers"] = ["somebody else's"] * len(before["answers"])
        items = [{"protocol": {}}, {"arm": "base", "id": "p1", "num_golds": 2, "sets": []}]
        items += [
            {"arm": "policy", "id": name, "num_golds": 2, "sets": [told(*s) for s in sets]}
            for name in ("p1", "p2")
        ]
        for name, rows in (("completions.jsonl", texts), ("eval_items.jsonl", items)):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = run.to_read(folder, patients=1)
        assert [(row["step"], row["id"], row["golds"]) for row in found] == [
            (0, "p1", 2),
            *[(9, "p1", 2)] * len(sets),
        ]
        assert not any("question" in row or "text" in row for row in found)
        (folder / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        return folder / "kept.jsonl"

    sets = kept(
        tmp_path / "sets", (["flu", "flu"], [0.5, 0.25], None), (["cold", "flu"], [0.5, 0.25], None)
    )
    alone = [
        (["cold"], [None], None),
        (["flu"], [None], None),
        (["cold"], [None], None),
        (["gout"], [None], "unfinished"),
    ]
    shown = summary.to_read(sets, kept(tmp_path / "single", *alone)).splitlines()[-1]
    assert (
        shown
        == "| 2 | cold 0.50 · **flu** 0.25 | **flu** 0.50 · ~~flu~~ 0.25 | 2 x cold · 1 x **flu** · 1 x *unfinished* |"
    )


def test_names_of_conditions_are_counted_before_and_after_training(tmp_path):
    rows = [
        {"step": 0, "answers": ["Flu", "Fluux", None]},
        {"step": 9, "answers": ["flu", "cold"]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert names.counted(file, {"flu", "cold"}) == ["1 of 2", "2 of 2"]


def test_committed_logs_are_of_the_same_patients():
    logs = [
        log
        for own in summary.read_logs_by(summary.HERE / "logs", "method", summary.ORDER).values()
        for log in own
    ]
    assert len(logs) == 8 and len({log["num_items"] for log in logs}) == 1
    read = [
        (summary.HERE / f"logs/{method}_completions{seed}.jsonl").read_text()
        for method in run.METHODS
        for seed in (0, 1)
    ]
    assert (
        len(
            {
                tuple(dict.fromkeys(json.loads(line)["id"] for line in text.splitlines()))
                for text in read
            }
        )
        == 1
    )

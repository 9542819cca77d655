"""The later ideas on clinic: their words, what is kept of a run, and the differences in the table."""

import json

import pytest

from experiments.algorithms import ideas, ideas_summary
from mar.run.compose import compose


@pytest.mark.slow
def test_every_idea_is_a_config_with_a_log_of_its_own():
    for words in ideas.SETTINGS.values():
        config = compose([*ideas.SHARED, *words])
        assert config.train.steps == 200
        assert config.algo.prompts_per_step * config.algo.group_size == 64
    names = [ideas.name_of(setting) for setting in ideas.SETTINGS]
    assert len(set(names)) == len(names)


def test_the_logs_were_made_with_the_words_of_their_settings():
    files = [*ideas.LOGS.glob("*.json")]
    assert files
    for file in files:
        log = json.loads(file.read_text())
        name = ideas.name_of(log["setting"])
        assert file.name == f"{name}_seed{log['seed']}.json"
        of_run = [f"name={name}", f"seed={log['seed']}", f"out={ideas.RUNS}"]
        # The experiment had no bonus when they were made.
        shared = [word for word in ideas.SHARED if word != "algo.entropy_coef=0"]
        assert log["words"] == [*shared, *of_run, *ideas.SETTINGS[log["setting"]]]


def test_every_reference_is_a_setting():
    for setting, references in ideas_summary.REFERENCES.items():
        assert {setting, *references} <= ideas.SETTINGS.keys()
        assert setting not in references
    assert ideas.SETTINGS.keys() - ideas_summary.REFERENCES.keys() == {"own"}


def test_a_set_that_says_more_than_1_is_scaled_with_its_other(tmp_path):
    def a_set(confidences, other, reason=None):
        return {
            "answers": ["a", "b"],
            "confidences": confidences,
            "mass": [0.5, 0.25],
            "reason": reason,
            "text": f"<answer1>a</answer1><other>{other}</other>",
        }

    rows = [
        {"protocol": {}},
        # 0.8, 0.4 and 0.4 are half, a quarter and a quarter: no error is left
        {"arm": "policy", "sets": [a_set([0.8, 0.4], 0.4), a_set([0.1, 0.1], 0.1, "no_answer")]},
        # 0.5, 0 and 0.5: errors 0 and 0.25
        {"arm": "policy", "sets": [a_set([0.2, 0.0], 0.2), a_set([0.2, None], 0.2)]},
        {"arm": "single", "sets": [a_set([1.0, 1.0], 1.0)]},
    ]
    (tmp_path / "eval_items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = ideas.of_scaled_sets(tmp_path)
    assert found["said"] == pytest.approx((1.6 + 0.4) / 2)
    assert found["q_mse_scaled"] == pytest.approx((0 + 0.25**2 / 2) / 2)


def test_differences_of_ideas_are_taken_seed_by_seed(monkeypatch):
    def log(seed, covered, ece):
        return {
            "seed": seed,
            "curve": {"k": [3, 30], "coverage": [[covered], [0.9]], "unique": [[3.0], [5.0]]},
            "bars": {"floor": [0.3, 0.5, 0.6], "ceiling": [0.5, 0.7, 0.8]},
            "metrics": {"ece": [ece, 0.0, 1.0]} if ece else {},
            "words": [],
            "scaled": {"said": 0.5, "q_mse_scaled": 0.01},
        }

    logs = {
        "own": [log(0, 0.7, 0.1), log(1, 0.7, 0.2)],
        # its seed 1 is missing, and seed 2 has no partner
        "to_go": [log(0, 0.75, 0.1), log(2, 0.6, 0.1)],
        "single": [log(0, 0.66, None), log(1, 0.7, None)],
    }
    monkeypatch.setattr(ideas_summary, "read_logs", lambda: logs)
    head, _, *lines = ideas_summary.paired().splitlines()
    columns = [" difference ", " seeds ", *(f" {name} " for name in ideas_summary.COMPARED)]
    assert head == "|" + "|".join(columns) + "|"
    same = "+0.000 (+0.000 to +0.000)"
    assert lines == [
        "| to_go − own | 1 | +0.250 | +0.000 | – | – | +0.000 | +0.000 |",
        f"| single − own | 2 | -0.100 (-1.371 to +1.171) | – | – | – | {same} | {same} |",
    ]
    table = ideas_summary.markdown().splitlines()
    # without <other> nothing says what the confidences should add up to
    assert table[2].startswith("| own | 2 | 0.500 | 0.100, 0.200 | – | – | 5.0 | 0.900 | 0.500 |")

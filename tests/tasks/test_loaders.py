"""The paper's tasks: rows of each real schema become examples; what is drawn is drawn by the id; targets agree in expectation."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mar.answers.grammar import Grammar, parse, render
from mar.answers.rewards import RewardSpec, reward
from mar.errors import UserError
from mar.records import Example, Gold
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import load_data
from mar.tasks import ddxplus
from mar.tasks.ambigqa import merge
from mar.tasks.loading import Source, apply_target, split_of
from mar.tasks.registry import TASKS, get_task
from mar.verify.matching import expected_hits, matching_increments

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SPLITS = ("train", "validation", "test")
EVIDENCES = {
    "E_1": {"question_en": "Do you have a fever?", "value_meaning": {}},
    "E_2": {
        "question_en": "Where is the pain?",
        "value_meaning": {"V_3": {"en": "chest"}, "V_4": {"en": "N"}},
    },
}
PATIENT = {"age": 34, "sex": "F", "pathology": "Flu", "initial_evidence": "E_1", "evidences": ["E_1", "E_2_@_V_3", "E_2_@_V_4"],
           "differential": [["Flu", 0.6], ["Cold", 0.3], ["Gout", 0.05]]}  # fmt: skip
HOTPOT = {"question": "Who?", "answer": "Ann", "supporting_facts": [["t2", 0], ["t5", 1]],
          "context": [[f"t{n}", [f"Sentence {n}.", " More."]] for n in range(10)]}  # fmt: skip
QUESTION = {"id": "q", "question": "When was it?", "annotations": [
    {"type": "multipleQAs", "qaPairs": [{"question": "a?", "answer": ["1950", "in 1950"]}, {"question": "b?", "answer": ["1960"]}]},
    {"type": "singleAnswer", "answer": ["1950."]}]}  # fmt: skip
SURVEY = {"id": "s", "question": "name a fruit", "answers": {"apple": 60, "pear": 40}}
CLUSTERS = {
    "metadata": {"id": "c"},
    "question": {"normalized": "name a fruit"},
    "answers": {
        "clusters": {
            "c.0": {"count": 3, "answers": ["pear", "pears"]},
            "c.1": {"count": 7, "answers": ["apple"]},
        }
    },
}
PROGRAM = {
    "task_id": 1,
    "text": "Square a number.",
    "test_list": ["assert f(2) == 4", "assert f(3) == 9"],
    "test_setup_code": "",
}


def examples(task, folder, rows, name="rows.jsonl", **options):
    """Those of all splits, and what is said of the rows that were dropped."""
    path = folder / name
    path.write_text(
        json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    )
    found, said = [], ""
    for split in SPLITS:
        try:
            loaded = get_task(task).load(Source("path", split, path=str(path), **options))
            found, said = found + loaded.examples, f"{said} {loaded.dropped}"
        except UserError as error:
            if "is empty" not in str(error):
                raise
            said += str(error)
    return found, said


def test_a_patient_in_words_with_the_differential_from_min_prob(tmp_path):
    (tmp_path / ddxplus.EVIDENCES[0]).write_text(json.dumps(EVIDENCES))
    ((e,), _) = examples("ddxplus", tmp_path, [PATIENT])
    assert e.question.splitlines() == ["Age: 34", "Sex: female", "Chief complaint: Do you have a fever?", "- Do you have a fever? yes",
                                       "- Where is the pain? chest, no"]  # fmt: skip
    assert [g.name for g in e.golds] == ["Flu", "Cold"] and e.truth == "uniform" and e.multi_label
    assert all(g.probability is None for g in e.golds)  # the differential is no posterior
    ((drawn,), _) = examples("ddxplus", tmp_path, [PATIENT | {"pathology": "Gout"}], target="drawn")
    assert [g.name for g in drawn.golds] == ["Gout"] and drawn.truth == "single"
    with pytest.raises(UserError, match=r"rows.jsonl:1: 'evidences' has 'E_9'"):
        examples("ddxplus", tmp_path, [PATIENT | {"evidences": ["E_9"]}])


def statistics(folder):
    """Two conditions, 30 findings that are each almost a sign of one of them."""
    names = [f"E_{n}" for n in range(30)]
    table = {"conditions": ["a", "b"], "symptoms": names, "condition_counts": {"a": 3, "b": 1},
             "probabilities": {"a": dict.fromkeys(names[:15], 0.8), "b": dict.fromkeys(names[15:], 0.6)}}  # fmt: skip
    (folder / ddxplus.STATISTICS).write_text(json.dumps(table))
    (folder / ddxplus.EVIDENCES[0]).write_text(
        json.dumps({n: {"question_en": f"Sign {n}?"} for n in names})
    )


def test_drawn_patients_have_the_posterior_that_bayes_gives_and_one_split_each(tmp_path):
    statistics(tmp_path)
    parts = {
        s: get_task("ddxplus_bayes").load(Source("path", s, 60, 5, str(tmp_path))).examples
        for s in SPLITS
    }
    for split, found in parts.items():
        assert len(found) == 60 and all(split_of(e.question) == split for e in found)
    prior = {"a": 0.75, "b": 0.25}
    for e in parts["test"]:
        for name, low in (("a", 0), ("b", 15)):
            for line in e.question.splitlines()[1:]:
                n, yes = int(line.split("E_")[1].split("?")[0]), line.endswith("yes")
                p = (0.8 if name == "a" else 0.6) if low <= n < low + 15 else 0.0
                prior[name] *= p if yes else 1 - p
        total = sum(prior.values())
        assert [g.probability for g in e.golds] == pytest.approx(
            [prior[g.name] / total for g in e.golds]
        )
        prior = {"a": 0.75, "b": 0.25}
    again = get_task("ddxplus_bayes").load(Source("path", "test", 60, 5, str(tmp_path))).examples
    assert again == parts["test"]


def test_two_of_ten_paragraphs_are_gone(tmp_path):
    rows = [HOTPOT | {"id": f"h{n}", "question": f"Who is number {n}?"} for n in range(60)]
    found, _ = examples("hotpotqa", tmp_path, rows)
    removed = Counter(e.stratum for e in found)
    assert set(removed) == {"removed0", "removed1", "removed2"} and min(removed.values()) > 8
    for e in found:
        left = [line.split(":")[0] for line in e.question.splitlines() if line.startswith("t")]
        assert len(left) == 8 and e.stratum == f"removed{2 - len({'t2', 't5'} & set(left))}"
    assert (
        examples("hotpotqa", tmp_path, rows)[0]
        == found
        != examples("hotpotqa", tmp_path, rows, data_seed=1)[0]
    )
    assert (
        "1 not 10 paragraphs with 2 that matter"
        in examples("hotpotqa", tmp_path, [HOTPOT | {"context": HOTPOT["context"][:9]}])[1]
    )


def test_readings_that_share_a_spelling_are_one_gold(tmp_path):
    ((e,), _) = examples("ambigqa", tmp_path, [QUESTION], "rows.json")
    assert [(g.name, *g.aliases) for g in e.golds] == [
        ("1960",),
        ("1950", "in 1950", "1950."),
    ] and e.multi_label
    assert merge([["a", "b"], ["c"], ["B", "c"]]) == [["a", "b", "c", "B"]]
    with pytest.raises(UserError, match=r"rows.json\[0\]: 'annotations'"):
        examples("ambigqa", tmp_path, [QUESTION | {"annotations": []}], "rows.json")


def test_people_are_probabilities(tmp_path):
    for row, first in ((SURVEY, ("apple",)), (CLUSTERS, ("apple",))):
        ((e,), _) = examples("protoqa", tmp_path, [row])
        assert (
            (e.golds[0].name, *e.golds[0].aliases) == first
            and e.truth == "survey"
            and e.label is not None
        )
        assert [g.probability for g in e.golds] == pytest.approx(
            [0.6, 0.4] if row is SURVEY else [0.7, 0.3]
        )


def test_a_program_sees_its_first_test_only(tmp_path):
    ((e,), _) = examples("mbpp", tmp_path, [PROGRAM])
    assert (
        "f(2) == 4" in e.question
        and "f(3)" not in e.question
        and e.tests == tuple(PROGRAM["test_list"])
    )
    assert (
        "1 tests that no plain value"
        in examples("mbpp", tmp_path, [PROGRAM | {"test_list": ["assert f(1) == f(2)"]}])[1]
    )


def test_the_first_sentences_of_a_patient(tmp_path):
    row = {"question": "Which drug was given?", "context": ["A man has pain.", "He has a fever."], "answer": "X", "answer_idx": "A",
           "options": {"A": "X", "B": "Y", "C": "Z", "D": "W"}}  # fmt: skip
    ((whole,), _), ((part,), _) = (
        examples("medqa", tmp_path, [row], max_sentences=n) for n in (None, 1)
    )
    assert (
        "He has a fever." in whole.question
        and "He has a fever." not in part.question
        and part.id == whole.id
    )


def test_probabilities_are_the_expectation_over_labels():
    rng, grammar, spec = (
        np.random.default_rng(0),
        Grammar("rlcr_multi", 3, thinking=False, other=True),
        RewardSpec(),
    )
    for _ in range(50):
        p = rng.dirichlet(np.ones(4))
        golds = tuple(Gold(name, (), x) for name, x in zip("abcd", p, strict=True))
        answers, said = list(rng.choice(list("abcdx"), 3)), list(rng.integers(0, 30, 3) / 100)
        parsed = parse(render(grammar, answers, said, other=0.1), grammar, False)
        exact = reward(parsed, expected_hits(answers, golds), (False,) * 3, 1, grammar, spec)
        total = sum(
            x
            * reward(
                parsed, matching_increments(answers, (gold,))[0], (False,) * 3, 1, grammar, spec
            ).total
            for x, gold in zip(p, golds, strict=True)
        )
        assert exact.total == pytest.approx(total, abs=1e-12)


def test_a_target_is_for_tasks_that_have_it():
    label = Example("e", "t", "?", (Gold("a", (), 0.5), Gold("b", (), 0.5)), "exact", label=1)
    assert apply_target([label], "probabilities") == [replace(label, label=None)] and apply_target(
        [label], "drawn"
    ) == [label]
    with pytest.raises(UserError, match="data.target=probabilities"):
        apply_target([replace(label, truth="single")], "probabilities")
    assert all(("set" in t.targets) <= ("probabilities" not in t.targets) for t in TASKS.values())


REAL = {  # rows kept of the real files, over all splits
    "ambigqa/dev_light.json": 2002,
    "protoqa/dev.scraped.jsonl": 980,
    "hotpotqa/distractor_100_dev_reflexion.jsonl": 82,
    "ddxplus/patients_all49_en.jsonl": 617,
    "mbpp/mbpp.jsonl": 973,
}


@pytest.mark.skipif(not DATA.is_dir(), reason="the real files are not here (../shared/data)")
@pytest.mark.parametrize("file", REAL)
def test_real_rows(file):
    task = file.partition("/")[0]
    config = compose([f"+experiment={task}", "data.source=path", f"data.path={DATA / file}"])
    kept = [
        e for split in SPLITS for e in load_data(config, split, None, 0, Display("plain", 0, 0))
    ]
    assert len({e.id for e in kept}) == len(kept) == REAL[file] and all(e.golds for e in kept)

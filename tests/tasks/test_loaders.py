"""The paper's tasks: rows of each real schema become examples; what is drawn is drawn by the id; targets agree in expectation."""

import csv
import gzip
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from mar.answers.grammar import Grammar, parse, render
from mar.answers.rewards import RewardSpec, reward
from mar.errors import UserError
from mar.records import Example, Gold
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import load_data
from mar.tasks import ddxplus, jsonl
from mar.tasks.ambigqa import merge
from mar.tasks.loading import Source, apply_target, rows_of_file, split_of
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
            found, said = found + list(loaded.examples), f"{said} {loaded.dropped}"
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


def test_findings_in_two_lists_ask_the_same_patients(tmp_path, monkeypatch):
    statistics(tmp_path)
    short = tmp_path / "short.json"
    short.write_text(json.dumps({f"E_{n}": f"sign {n}" for n in range(30)}))
    monkeypatch.setattr(ddxplus, "SHORT_WORDS", short)
    options = {"findings": "lists", "num_asked": (2, 4)}
    source = Source("path", "train", 60, 5, str(tmp_path), **options)
    prior = {"a": 0.75, "b": 0.25}
    for e in get_task("ddxplus_bayes").load(source).examples:
        present, absent = e.question.splitlines()
        assert present.startswith("Present: ") and absent.startswith("Absent: ")
        findings = [(int(n), True) for n in re.findall(r"sign (\d+)", present)]
        findings += [(int(n), False) for n in re.findall(r"sign (\d+)", absent)]
        assert len(findings) in (2, 4) and e.stratum == f"asked{len(findings)}"
        mass = dict(prior)
        for name, low in (("a", 0), ("b", 15)):
            for n, yes in findings:
                p = (0.8 if name == "a" else 0.6) if low <= n < low + 15 else 0.0
                mass[name] *= p if yes else 1 - p
        expected = [mass[g.name] / sum(mass.values()) for g in e.golds]
        assert [g.probability for g in e.golds] == pytest.approx(expected)


def test_two_lists_say_none():
    assert (
        ddxplus.two_lists(["cough"], ["fever", "rash"]) == "Present: cough.\nAbsent: fever, rash."
    )
    assert ddxplus.two_lists([], ["fever"]) == "Present: none.\nAbsent: fever."


def test_lists_and_numbers_that_the_statistics_do_not_have_are_refused(tmp_path, monkeypatch):
    statistics(tmp_path)
    short = tmp_path / "short.json"
    short.write_text(json.dumps({"E_0": "sign 0"}))
    monkeypatch.setattr(ddxplus, "SHORT_WORDS", short)
    load = get_task("ddxplus_bayes").load
    with pytest.raises(UserError, match=r"finding E_1, for which short.json has no words"):
        load(Source("path", "train", 2, 5, str(tmp_path), findings="lists"))
    with pytest.raises(UserError, match="asks for 31 findings, and 30 of"):
        load(Source("path", "train", 2, 5, str(tmp_path), num_asked=[31]))


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


def test_spellings_of_one_answer_are_one_gold_of_the_survey(tmp_path):
    """train.simplified writes the count of a cluster beside each of its spellings."""
    answers = {"the door": 10, "gate": 6, "door": 10, "\u200b": 4}
    ((e,), _) = examples("protoqa", tmp_path, [SURVEY | {"answers": answers}])
    found = [(gold.name, gold.probability) for gold in e.golds]
    assert found == [("the door", pytest.approx(10 / 16)), ("gate", pytest.approx(6 / 16))]


@pytest.mark.parametrize("deep", ["-" * 20_000 + "1", "f(1)" + ".a" * 20_000, "1+" * 20_000 + "1"])
def test_a_test_that_is_nested_too_deeply_is_a_sentence(deep, tmp_path):
    with pytest.raises(UserError, match=r"rows\.json\[0\] has another form"):
        examples(
            "mbpp", tmp_path, [PROGRAM | {"test_list": [f"assert f(1) == {deep}"]}], "rows.json"
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
    "mbpp/mbpp.jsonl": 966,
}


@pytest.mark.skipif(not DATA.is_dir(), reason="the real files are not here (../shared/data)")
@pytest.mark.parametrize("file", REAL)
def test_real_rows(file):
    task = file.partition("/")[0]
    words = ["data.source=path", f"data.path={DATA / file}", "model=embedded"]
    config = compose([f"+experiment={task}", *words])
    kept = [
        e for split in SPLITS for e in load_data(config, split, None, 0, Display("plain", 0, 0))
    ]
    assert len({e.id for e in kept}) == len(kept) == REAL[file] and all(e.golds for e in kept)


# --- files and rows as they come ---------------------------------------------------------------

ROWS = [{"question": f"Name a planet ({n})?", "golds": "Mars", "id": f"r{n}"} for n in range(40)]


def packed(content: bytes) -> bytes:
    """The same bytes at any time: gzip writes the time down, and a test's name has them."""
    return gzip.compress(content, mtime=0)


def questions_of(path) -> set[str]:
    return {row["question"] for _, row in rows_of_file(str(path))}


def test_tables_and_packed_files_are_read(tmp_path):
    jsonl = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = "question,golds,id\n" + "".join(
        f'"{row["question"]}",Mars,{row["id"]}\n' for row in ROWS
    )
    (tmp_path / "a.jsonl.gz").write_bytes(packed(jsonl))
    (tmp_path / "no-ending").write_bytes(packed(jsonl))
    (tmp_path / "a.csv").write_text(table)
    (tmp_path / "a.csv.gz").write_bytes(packed(table.encode()))
    (tmp_path / "a.tsv").write_text(table.replace(",", "\t"))
    (tmp_path / "[a]*::.CSV").write_bytes(b"\xef\xbb\xbf" + table.replace("\n", "\r\n").encode())
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "lines.json").write_bytes(jsonl)
    (tmp_path / "a.json.gz").write_bytes(packed(json.dumps(ROWS).encode()))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    wanted = {row["question"] for row in ROWS}
    for path in sorted(tmp_path.iterdir()):
        assert questions_of(path) == wanted, path.name
    where, row = next(iter(rows_of_file(str(tmp_path / "a.csv"))))
    assert where.endswith("a.csv[0]") and row == ROWS[0]


def test_a_cell_that_says_none_is_a_word(tmp_path):
    (tmp_path / "a.csv").write_text("question,golds\nWhat is left?,None\nWhich country code?,NA\n")
    assert [row["golds"] for _, row in rows_of_file(str(tmp_path / "a.csv"))] == ["None", "NA"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    (
        ("a.jsonl", '{"question": "x"}'.encode("utf-16"), "UTF-16, which is not read: give jsonl"),
        ("a.csv", "question\nx".encode("utf-16"), "UTF-16, which is not read"),
        ("a.xlsx", b"PK\x03\x04....", "zip archive .* not read"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd....", "zstandard, which is not read"),
        ("a.jsonl", b"PAR1....", r"let its name end in \.parquet"),
        ("a.parquet", b"PAR1....", "no readable parquet table"),
        ("a.csv", b'question\n"x', "no readable table .* near line"),
        ("a.csv", "question\ncaf\u00e9".encode("latin-1"), "is not in UTF-8 .*utf-8"),
        ("a.csv", b"question,golds\nx,y\na\n", r"a\.csv\[1\] has 1 cells for 2 columns"),
        ("a.csv", b"question;golds\nx;y\n", "has one column, 'question;golds'"),
        ("a.csv", b"question,question\nx,y\n", "two columns 'question'"),
        ("a.csv", b"", "is an empty table"),
        ("a.parquet.gz", packed(b"PAR1"), "holds a packed parquet file: unpack it"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
        ("a.jsonl", b"<!doctype html>", "a page of HTML"),
        ("a.jsonl", '{"question": "x"}'.encode("utf-16-le"), "UTF-16, or no text"),
        ("a.jsonl.gz", packed("{}".encode("utf-16")), "holds text in UTF-16"),
        ("a.jsonl.gz", packed(packed(b"{}")), "holds a packed file again"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not valid JSON .* or give jsonl"),
        ("a.json", b"[" * 100_000, "is not valid JSON"),
        (
            "a.jsonl",
            b'{"question": "x"}\nhi',
            r"a\.jsonl:2 is not valid JSON .* or remove the line",
        ),
        ("a.jsonl.gz", packed(b'{"question": "x"}\n' * 999)[:-9], "cannot be read .* copy"),
        ("a.jsonl", b'{"question": "half \\ud83d pair"}', r"a\.jsonl:1 holds half a character"),
        ("a.jsonl", b'{"a": [{"b": "\\uDE00"}]}', r"half a character \(\\ude00"),
        ("a.json", b'[{"question": "half \\ud83d pair"}]', r"a\.json\[0\] holds half a character"),
        # JSON does not skip a form feed, as Python does
        ("a.jsonl", b'{"question": "x"}\n\x0c\n', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl.gz", packed(b'{"question": "x"}\n\x0b\n'), r"a\.jsonl\.gz:2 is not valid JSON"),
    ),
)
def test_what_is_not_read_is_named(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        questions_of(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_whole_characters_beyond_the_first_plane_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "\\ud83d\\ude00", "x": "\\\\ud83d"}')
    assert questions_of(tmp_path / "a.jsonl") == {"\U0001f600"}


def test_cells_are_texts_and_lists_of_them(tmp_path):
    cells = ["7", "007", "[0, 1) is", "[5]", "['a', \"b\"]", '{"A": "x"}', "[]", "[['x', 0.5]]"]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question"], *([cell] for cell in cells)])
    read = [row["question"] for _, row in rows_of_file(str(tmp_path / "a.csv"))]
    assert read == [*cells[:4], ["a", "b"], {"A": "x"}, "[]", [["x", 0.5]]]


def test_the_same_rows_from_a_table_and_from_lines(tmp_path):
    """What the release has as CSV: numbers and lists are cells of text."""
    (example,), _ = examples("medqa", tmp_path, [MEDQA_FORMS["medmcqa"]])
    (tmp_path / "a.csv").write_text("question,opa,opb,cop\nWhich drug?,X,Y,1\n")
    path = str(tmp_path / "a.csv")
    for split in SPLITS:
        source = Source("path", split, path=path)
        try:
            (of_table,) = get_task("medqa").load(source).examples
        except UserError:
            continue
        assert (of_table.question, of_table.golds) == (example.question, example.golds)
    (tmp_path / "a.csv").write_text("question,golds\nWhat?,['Mars']\n")
    golds = [jsonl.read(row, where).example.golds for where, row in rows_of_file(path)]
    assert golds == [(Gold("Mars"),)]


MEDQA_FORMS = {
    "letters": {
        "question": "Which drug?",
        "options": {"A": "X", "B": "Y"},
        "answer": "Y",
        "answer_idx": "B",
    },
    "bigbio source": {
        "question": "Which drug?",
        "options": [{"key": "A", "value": "X"}, {"key": "B", "value": "Y"}],
        "answer": "Y",
        "answer_idx": "B",
    },
    "bigbio qa": {
        "question": "Which drug?",
        "type": "multiple_choice",
        "choices": ["X", "Y"],
        "context": "",
        "answer": ["Y"],
    },
    "openlifescienceai": {
        "id": "x1",
        "data": {
            "Question": "Which drug?",
            "Options": {"A": "X", "B": "Y"},
            "Correct Answer": "Y",
            "Correct Option": "B",
        },
        "subject_name": "Drugs",
    },
    "medmcqa": {"question": "Which drug?", "opa": "X", "opb": "Y", "cop": 1},
    "swag": {"sent1": "Which drug?", "sent2": "", "ending0": "X", "ending1": "Y", "label": 1},
    "mmlu": {"question": "Which drug?", "choices": ["X", "Y"], "answer": 1},
    "arc": {
        "question": "Which drug?",
        "choices": {"text": ["X", "Y"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "commonsense_qa": {
        "question": "Which drug?",
        "choices": [{"label": "A", "text": "X"}, {"label": "B", "text": "Y"}],
        "answerKey": "B",
    },
    "medxpertqa": {"question": "Which drug?", "options": {"A": "X", "B": "Y"}, "label": "B"},
    "a letter alone": {"question": "Which drug?", "options": {"A": "X", "B": "Y"}, "answer": "B"},
    "a text that is a letter": {
        "question": "Which drug?",
        "options": {"A": "Y", "B": "A"},
        "answer": "Y",
    },
    "parquet": {
        "question": "Which drug?",
        "options": {"A": "X", "B": "Y", "C": None},
        "answer_idx": "B",
        "answer": "Y",
    },
    "numbers as letters": {
        "question": "Which drug?",
        "options": [{"key": 1, "value": "Y"}, {"key": 2, "value": "X"}],
        "answer_idx": 1,
    },
    "a number as text": {"question": "Which drug?", "options": ["X", "Y"], "answer_idx": "1"},
    "texts with their letters": {
        "question": "Which drug?",
        "options": ["A. X", "B. Y"],
        "answer": "B. Y",
    },
    "brackets around letters": {
        "question": "Which drug?",
        "options": {"A": "(A) X", "B": "(B) Y"},
        "answer_idx": "B",
        "answer": "Y",
    },
    "a letter in brackets": {
        "question": "Which drug?",
        "options": ["X", "Y"],
        "answer": "(B)",
    },
    "a letter and its text": {
        "question": "Which drug?",
        "options": ["X", "Y"],
        "answer": "B. Y",
    },
}


def test_a_label_that_is_a_part_of_the_text_stays(tmp_path):
    """Only what all options begin with, each with its own letter, is a label."""
    for options in ({"1": "1.5 mg", "2": "2.5 mg"}, {"A": "A. flavus", "B": "Candida"}):
        row = {"question": "Which?", "options": options, "answer_idx": list(options)[0]}
        ((example,), _) = examples("medqa", tmp_path, [row])
        assert example.golds[0].name == list(options.values())[0]


@pytest.mark.parametrize("answer", ["(C)", "B. X", "B: Z"])
def test_a_label_that_names_no_option_is_refused(answer, tmp_path):
    row = {"question": "Which drug?", "options": ["X", "Y"], "answer": answer}
    with pytest.raises(UserError, match="names none of the options A, B"):
        examples("medqa", tmp_path, [row])


@pytest.mark.parametrize("form", MEDQA_FORMS)
def test_medqa_in_every_common_form(form, tmp_path):
    ((example,), _) = examples("medqa", tmp_path, [MEDQA_FORMS[form]])
    assert example.question == "Which drug?" and example.golds[0].name == "Y"


def test_medmcqa_numbers_its_options(tmp_path):
    row = {"question": "Which drug?", "opa": "X", "opb": "Y", "opc": "Z", "opd": "W", "cop": 2}
    ((example,), _) = examples("medqa", tmp_path, [row])
    assert example.golds[0].name == "Z"
    with pytest.raises(UserError, match=r"'answer_idx' \(-1\) names none of the options"):
        examples("medqa", tmp_path, [row | {"cop": -1}])


@pytest.mark.parametrize(
    ("tests", "reason"),
    (
        (["assert f(2) == 4"], "no test but the one in the prompt"),
        (["assert f(2) == 4", "assert f(2)==4"], "no test but the one in the prompt"),
        (["assert f(2) == True", "assert f(3)"], "tests that one constant passes"),
        (["assert not f(2)", "assert f(3) == 0"], "tests that one constant passes"),
        (["assert f(2) == [1]", "assert f(9) == [1]"], "tests that one constant passes"),
        (["assert set(f(2)) == {1}", "assert set(f(3)) == {1}"], "tests that one constant passes"),
        (["assert f(2) > 1", "assert f(3) == 9"], "tests that one constant passes"),
    ),
)
def test_tests_that_leave_nothing_to_solve_are_dropped_and_counted(tests, reason, tmp_path):
    good = PROGRAM | {
        "task_id": 2,
        "text": "Cube it.",
        "test_list": ["assert f(2) == 8", "assert f(3) == 27"],
    }
    kept, said = examples("mbpp", tmp_path, [PROGRAM | {"test_list": tests}, good])
    assert [example.id for example in kept] == ["mbpp-2"] and f"1 {reason}" in said

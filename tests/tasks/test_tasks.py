"""Loaders: every row is either a question or a counted reason, and a malformed file is named by line and key."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from mar.errors import UserError
from mar.records import Gold
from mar.tasks import ddxplus, jsonl, medqa
from mar.tasks import loading as common
from mar.tasks.loading import Source, chance_line, split_of
from mar.tasks.registry import get_task
from mar.verify.matching import matching_increments

REAL = (
    Path(__file__).resolve().parents[3] / "shared" / "data" / "medqa" / "medqa_usmle_4opt_dev.jsonl"
)
SPLITS = ("train", "validation", "test")
OPTIONS = {"A": "Asthma", "B": "Pneumonia", "C": "Sarcoidosis", "D": "Tuberculosis"}


def write(path, rows):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows),
        encoding="utf-8",
    )
    return str(path)


def medqa_row(
    number, question="Patient {}. Which of the following is the most likely diagnosis?", **changes
):
    row = {
        "question": question.format(number),
        "options": OPTIONS,
        "answer": "Pneumonia",
        "answer_idx": "B",
    }
    return {**row, "realidx": number, **changes}


def id_in(split, prefix, start=0):
    """A number whose id falls into the split."""
    return next(n for n in range(start, start + 1000) if split_of(f"{prefix}-{n}") == split)


def load(task, path, split="train", **options):
    return get_task(task).load(Source("path", split, path=path, **options))


# --- the dictionary -------------------------------------------------------------------------------------------------


def test_unknown_task_names_the_known():
    with pytest.raises(
        UserError,
        match="unknown task 'medq': data.task is one of ambigqa, clinic, ddxplus, ddxplus_bayes, hotpotqa, jsonl, mbpp, medqa, protoqa",
    ):
        get_task("medq")


def test_what_an_answer_is_called():
    nouns = {
        name: get_task(name).noun
        for name in ("clinic", "ddxplus", "ddxplus_bayes", "medqa", "mbpp")
    }
    assert nouns == {
        **dict.fromkeys(("clinic", "ddxplus", "ddxplus_bayes"), "diagnosis"),
        "medqa": "answer",
        "mbpp": "program",
    }


def test_clinic_is_embedded_and_finite():
    loaded = get_task("clinic").load(Source("embedded", "train", 3, seed=1))
    assert len(loaded.examples) == 3 and not loaded.dropped
    with pytest.raises(UserError, match="data.source=hub"):
        get_task("clinic").load(Source("hub", "train", 3))
    with pytest.raises(UserError, match="data.num_train"):
        get_task("clinic").load(Source("embedded", "train"))


@pytest.mark.parametrize("task", ["medqa", "jsonl"])
def test_no_silent_fall_back(task, tmp_path):
    with pytest.raises(UserError, match="data.source=embedded has no rows"):
        get_task(task).load(Source("embedded", "train"))
    with pytest.raises(UserError, match=r"data.path=.*nowhere.jsonl is not there"):
        load(task, str(tmp_path / "nowhere.jsonl"))


# --- splits and samples ---------------------------------------------------------------------------------------------


def test_splits_part_the_file_by_id_alone(tmp_path):
    rows = [medqa_row(n) for n in range(300)]
    path, turned = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[::-1][:200])
    parts = {split: {e.id for e in load("medqa", path, split).examples} for split in SPLITS}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 300
    assert (
        180 < len(parts["train"]) < 240
        and 40 < len(parts["validation"]) < 80
        and 15 < len(parts["test"]) < 45
    )
    assert all(
        {e.id for e in load("medqa", turned, split).examples} <= parts[split] for split in SPLITS
    )


def test_num_is_a_random_sample_that_grows_in_place(tmp_path):
    path = write(tmp_path / "a.jsonl", [medqa_row(n) for n in range(300)])
    everything = [e.id for e in load("medqa", path).examples]
    few, more, other = (
        [e.id for e in load("medqa", path, num=n, seed=s).examples]
        for n, s in ((20, 0), (40, 0), (20, 1))
    )
    assert few == more[:20] and set(few) != set(everything[:20]) and set(few) != set(other)
    assert len(load("medqa", path, num=10_000).examples) == len(everything)


def test_empty_split_says_so_in_one_sentence(tmp_path):
    path = write(tmp_path / "a.jsonl", [medqa_row(id_in("train", "medqa"))])
    with pytest.raises(
        UserError, match=r"a.jsonl: split 'test' is empty \(1 rows; none of them falls into it\)"
    ):
        load("medqa", path, "test")
    path = write(
        tmp_path / "b.jsonl",
        [
            medqa_row(
                id_in("train", "medqa"), answer="x y z w", options=["x y z w", "b"], answer_idx=0
            )
        ],
    )
    with pytest.raises(UserError, match="split 'train' is empty .*1 answer too long"):
        load("medqa", path)


def test_duplicates_are_dropped_across_splits_and_counted(tmp_path):
    first, again = id_in("train", "medqa"), id_in("test", "medqa")
    text = "Same  question. Which of the following is the most likely diagnosis?"
    other = medqa_row(id_in("test", "medqa", again + 1))
    path = write(
        tmp_path / "a.jsonl",
        [medqa_row(first, text), medqa_row(again, text.upper().replace("  ", " ")), other],
    )
    assert [e.id for e in load("medqa", path).examples] == [f"medqa-{first}"]
    held_out = load("medqa", path, "test")
    assert [e.id for e in held_out.examples] == [f"medqa-{other['realidx']}"]
    assert held_out.dropped == Counter({"duplicate question": 1})


def test_one_id_for_two_questions_is_an_error(tmp_path):
    path = write(
        tmp_path / "a.jsonl", [medqa_row(7), medqa_row(7, "Another patient {}. What is it?")]
    )
    with pytest.raises(UserError, match=r"a.jsonl:2: the id 'medqa-7' is also that of .*a.jsonl:1"):
        load("medqa", path)


def test_ids_without_realidx_come_from_the_question(tmp_path):
    rows = [
        {k: v for k, v in medqa_row(n).items() if k != "realidx"} | {"id": n} for n in range(50)
    ]
    ids = [
        {e.question: e.id for e in load("medqa", write(tmp_path / "a.jsonl", r)).examples}
        for r in (rows, rows[::-1])
    ]
    assert ids[0] == ids[1] and len(set(ids[0].values())) == len(ids[0])
    renumbered = write(tmp_path / "a.jsonl", [row | {"id": 0} for row in rows])
    assert {e.question: e.id for e in load("medqa", renumbered).examples} == ids[0]


# --- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def hub_answers(monkeypatch):
    monkeypatch.setattr(common, "hub_fault", lambda kind, hub_id: "")


def put_on_hub(monkeypatch, **splits):
    hub = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda hub_id: hub)


def load_hub(split):
    return [
        e.id for e in get_task("medqa").load(Source("hub", split, hub_id="owner/name")).examples
    ]


def test_hub_splits_are_taken_as_they_are(monkeypatch):
    put_on_hub(
        monkeypatch,
        train=[medqa_row(n) for n in range(9)],
        dev=[medqa_row(n) for n in range(9, 12)],
    )
    assert load_hub("train") == [f"medqa-{n}" for n in range(9)]
    assert load_hub("dev") == [f"medqa-{n}" for n in range(9, 12)]
    with pytest.raises(UserError, match="owner/name has no split 'validation': .*train, dev"):
        load_hub("validation")


def test_hub_without_validation_has_its_train_cut(monkeypatch):
    put_on_hub(
        monkeypatch,
        train=[medqa_row(n) for n in range(200)],
        test=[medqa_row(n) for n in range(200, 230)],
    )
    train, validation, test = (load_hub(split) for split in SPLITS)
    assert (
        sorted(train + validation) == sorted(f"medqa-{n}" for n in range(200))
        and 25 < len(validation) < 55
    )
    assert test == [f"medqa-{n}" for n in range(200, 230)]


def test_a_hub_that_breaks_off_says_which_flags_work(monkeypatch):
    def fail(hub_id):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError,
        match=r"owner/name .*ConnectionError: no network.*data.source=path.*data.source=embedded",
    ) as caught:
        load_hub("train")
    assert "\n" not in str(caught.value)


def test_ddxplus_needs_its_table_from_the_hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(ddxplus, "hub_fault", lambda kind, hub_id: "ConnectError: away")
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *_, **__: (_ for _ in ()).throw(OSError("not in the cache")),
    )
    with pytest.raises(
        UserError,
        match=r"cannot load release_evidences.json of owner/name from the hub \(ConnectError: away\)",
    ):
        get_task("ddxplus").load(Source("hub", "train", hub_id="owner/name"))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        load("jsonl", tmp_path, "train")


# --- medqa ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question, opened",
    [
        (
            "Which of the following is the most likely diagnosis?",
            "What is the most likely diagnosis?",
        ),
        (
            "An MRI is most likely to show which of the following?",
            "An MRI is most likely to show what?",
        ),
        (
            "Which of the following best explains these findings?",
            "What best explains these findings?",
        ),
        (
            "Which of the following enzymes is most likely deficient?",
            "Which enzyme is most likely deficient?",
        ),
        (
            "Which of the following infectious agents caused it?",
            "Which infectious agents caused it?",
        ),
        ("Which of the following therapies would help?", "Which therapy would help?"),
        ("Which of the following findings are most likely?", "Which findings are most likely?"),
        (
            "Inhibition of which of the following processes is likely?",
            "Inhibition of which process is likely?",
        ),
        (
            "She is at risk for which of the following complications?",
            "She is at risk for which complication?",
        ),
        ("Of the following options, which is the next best step?", "What is the next best step?"),
        ("Of the following, which one best describes it?", "What best describes it?"),
        (
            "In addition to rest, which of the following is indicated?",
            "In addition to rest, what is indicated?",
        ),
        ("What is the diagnosis?", "What is the diagnosis?"),
        ("Which of the following is NOT necessary?", None),
        ("Which of the following statements is correct?", None),
        ("Which of the following is least likely to help?", None),
        ("All of the following are indicated except:", None),
        ("Given the following options, what is next?", None),
        ("Which of the symptoms below is typical?", None),
    ],
)
def test_open_question(question, opened):
    vignette = "A man takes one of the following drugs: a, b. He feels well. "
    assert medqa.open_question(question) == opened
    assert medqa.open_question(vignette + question) == (opened and vignette + opened)


def test_open_ended_by_default_and_drops_are_counted(tmp_path):
    keep, long, closed, above = (id_in("train", "medqa", n) for n in (0, 100, 200, 300))
    rows = [
        medqa_row(keep),
        medqa_row(
            long, answer="Give two more units", options=OPTIONS | {"B": "Give two more units"}
        ),
        medqa_row(closed, "{} Which of the following statements is true?"),
        medqa_row(above, answer="All of the above", options=OPTIONS | {"B": "All of the above"}),
    ]
    path = write(tmp_path / "a.jsonl", rows)
    loaded = load("medqa", path, max_gold_words=4)
    assert [e.id for e in loaded.examples] == [f"medqa-{keep}", f"medqa-{long}"]
    loaded = load("medqa", path)
    assert (
        loaded.dropped == Counter({medqa.LONG_GOLD: 2, medqa.NEEDS_OPTIONS: 1})
        and loaded.num_options is None
    )
    (example,) = loaded.examples
    assert example.question == f"Patient {keep}. What is the most likely diagnosis?"
    assert (example.task, example.truth, example.multi_label, example.label) == (
        "medqa",
        "single",
        False,
        None,
    )
    assert example.golds == (Gold("Pneumonia"),)


def test_shown_options_keep_every_row_and_take_letters(tmp_path):
    number = id_in("train", "medqa")
    row = medqa_row(
        number, answer="Give two more units now", options=OPTIONS | {"B": "Give two more units now"}
    )
    loaded = load("medqa", write(tmp_path / "a.jsonl", [row]), show_options=True)
    (example,) = loaded.examples
    assert loaded.num_options == 4 and not loaded.dropped
    assert (
        example.question.startswith(row["question"])
        and "\nB. Give two more units now\n" in example.question
    )
    for answer, hit in {
        "B": 1,
        "b.": 1,
        "B) give two more units now": 1,
        "Give two more units now": 1,
        "A": 0,
        "Asthma": 0,
    }.items():
        assert matching_increments([answer], example.golds)[0] == (hit,), answer
    assert matching_increments(["B", "Give two more units now"], example.golds)[0] == (1, 0)


def test_a_letter_that_is_also_a_text_is_no_alias(tmp_path):
    row = medqa_row(
        id_in("train", "medqa"), options={"A": "B", "B": "A", "C": "D", "D": "C"}, answer="A"
    )
    (example,) = load("medqa", write(tmp_path / "a.jsonl", [row]), show_options=True).examples
    assert matching_increments(["B"], example.golds)[0] == (0,) and matching_increments(
        ["A"], example.golds
    )[0] == (1,)


def test_chance_line():
    assert chance_line(3, 4) == "chance, 4 options shown: coverage@3 0.750, top-1 0.250"
    assert "coverage@5 1.000" in chance_line(5, 4)


def test_shown_options_must_be_equally_many(tmp_path):
    path = write(tmp_path / "a.jsonl", [medqa_row(0), medqa_row(1, options=OPTIONS | {"E": "Flu"})])
    with pytest.raises(UserError, match=r"data.show_options=true: rows have \[4, 5\] options"):
        load("medqa", path, show_options=True)


def test_options_as_a_list_and_abbreviations(tmp_path):
    number = id_in("train", "medqa")
    row = {
        "question": "What is it?",
        "options": ["Flu", "Systemic lupus erythematosus (SLE)"],
        "answer_idx": 1,
        "realidx": number,
    }
    (example,) = load("medqa", write(tmp_path / "a.jsonl", [row])).examples
    (gold,) = example.golds
    assert set(gold.aliases) == {"SLE", "Systemic lupus erythematosus"}
    row |= {"options": ["Flu", "t(9;22)"], "answer": "t(9;22)", "answer_idx": None}
    (example,) = load("medqa", write(tmp_path / "a.jsonl", [row])).examples
    assert example.golds == (Gold("t(9;22)"),)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"question": None}, "'question' is missing"),
        ({"question": " "}, "'question' is empty"),
        ({"question": ["a"]}, "'question' is list, not a string"),
        ({"options": None}, "'options' must hold two or more texts"),
        ({"options": {"A": "x"}}, "'options' must hold two or more texts"),
        ({"options": {"A": "x", "B": ""}}, "'options' must hold two or more texts"),
        ({"answer_idx": "E"}, r"'answer_idx' \('E'\) names none of the options A, B, C, D"),
        ({"answer_idx": ["B"]}, "'answer_idx'"),
        ({"answer_idx": None, "answer": "Flu"}, "'answer_idx'"),
        ({"answer": "Asthma"}, r"'answer' \('Asthma'\) is not option B \('Pneumonia'\)"),
    ],
)
def test_malformed_medqa_row(change, words, tmp_path):
    bad = (
        medqa_row(id_in("test", "medqa")) | change
    )  # in another split than the one that is asked for
    path = write(tmp_path / "a.jsonl", [medqa_row(id_in("train", "medqa")), bad])
    with pytest.raises(UserError, match=rf"a.jsonl:2: {words}"):
        load("medqa", path)


@pytest.mark.skipif(not REAL.exists(), reason="the real MedQA file is not here (../shared/data)")
def test_real_medqa():
    parts = [load("medqa", str(REAL), split) for split in SPLITS]
    examples = [example for part in parts for example in part.examples]
    dropped = sum((part.dropped for part in parts), Counter())
    assert len(examples) == 839 and dropped == {medqa.LONG_GOLD: 422, medqa.NEEDS_OPTIONS: 11}
    assert not [e.question for e in examples if "of the following" in e.question.lower()[-300:]]
    assert all(len(e.golds) == 1 and e.golds[0].name for e in examples)
    assert (
        sum(len(load("medqa", str(REAL), split, show_options=True).examples) for split in SPLITS)
        == 1272
    )


# --- jsonl ----------------------------------------------------------------------------------------------------------

COIN = [{"name": "heads", "probability": 0.25}, {"name": "tails", "probability": 0.75}]


def jsonl_examples(tmp_path, rows):
    path = write(tmp_path / "a.jsonl", rows)
    loaded = []
    for split in SPLITS:
        try:
            loaded += load("jsonl", path, split).examples
        except UserError as error:
            assert "is empty" in str(error)
    return {e.id: e for e in loaded}


def test_jsonl_kinds_of_truth(tmp_path):
    flu = {"name": "influenza", "aliases": ["flu"]}
    rows = [
        {"question": "One?", "golds": ["a"], "id": 1},
        {"question": "Several?", "golds": ["a", flu], "id": "two"},
        {"question": "Coin?", "golds": COIN, "id": 3},
        {"question": "People?", "golds": COIN, "id": 4, "truth": "survey"},
        {"question": "No id?", "golds": [flu]},
    ]
    found = jsonl_examples(tmp_path, ["\ufeff" + json.dumps(rows[0]) + "\n\n", *rows[1:]])
    one, two, coin, people = (found[f"jsonl-{id}"] for id in (1, "two", 3, 4))
    assert (one.truth, one.multi_label, one.label, one.golds) == (
        "single",
        False,
        None,
        (Gold("a"),),
    )
    assert (two.truth, two.multi_label, two.label) == ("uniform", True, None)
    assert two.golds[1] == Gold("influenza", ("flu",)) and len(two.targets()) == 2
    assert (coin.truth, coin.multi_label) == ("exact", False) and coin.targets() == (
        coin.golds[coin.label],
    )
    assert people.truth == "survey" and people.label is not None
    assert len(found) == 5


def test_jsonl_draws_by_id_from_the_distribution(tmp_path):
    rows = [{"question": f"Coin {n}?", "golds": COIN, "id": n} for n in range(400)]
    found = jsonl_examples(tmp_path, rows)
    again = jsonl_examples(
        tmp_path, [row | {"question": "Other " + row["question"]} for row in rows[::-1]]
    )
    assert {id: e.label for id, e in found.items()} == {id: e.label for id, e in again.items()}
    assert abs(sum(e.label for e in found.values()) / 400 - 0.75) < 0.07  # three standard errors


@pytest.mark.parametrize(
    "row, words",
    [
        ("{'question': 1}\n", "a.jsonl:2 is not valid JSON"),
        ("[1, 2]\n", "a.jsonl:2 is list, not an object"),
        ({"golds": ["a"]}, "a.jsonl:2: 'question' is missing"),
        ({"question": "Q?"}, "a.jsonl:2: 'golds' must be a list of at least one"),
        ({"question": "Q?", "golds": []}, "a.jsonl:2: 'golds' must be a list of at least one"),
        ({"question": "Q?", "golds": "a"}, "a.jsonl:2: 'golds' must be a list"),
        ({"question": "Q?", "golds": ["a", " "]}, "a.jsonl:2: 'golds': 'name' is empty"),
        (
            {"question": "Q?", "golds": [{"aliases": ["a"]}]},
            "a.jsonl:2: 'golds': 'name' is missing",
        ),
        ({"question": "Q?", "golds": [{"name": "a", "alias": ["b"]}]}, "a.jsonl:2: .*is no gold"),
        ({"question": "Q?", "golds": [3]}, "a.jsonl:2: 3 is no gold"),
        (
            {"question": "Q?", "golds": [{"name": "a", "aliases": "b"}]},
            "a.jsonl:2: 'aliases' must be a list of texts",
        ),
        (
            {"question": "Q?", "golds": [{"name": "a", "probability": 2}]},
            "a.jsonl:2: 'probability' must be a number",
        ),
        (
            {"question": "Q?", "golds": [*COIN, "edge"]},
            "a.jsonl:2: 'golds' must have a 'probability' each",
        ),
        (
            {"question": "Q?", "golds": COIN[:1]},
            "a.jsonl:2: the probabilities of 'golds' sum to 0.25",
        ),
        (
            {"question": "Q?", "golds": ["a"], "truth": "gut"},
            "a.jsonl:2: 'truth' is 'gut': choose one of exact",
        ),
        (
            {"question": "Q?", "golds": ["a"], "truth": "exact"},
            "a.jsonl:2: 'truth' is 'exact', which needs",
        ),
        (
            {"question": "Q?", "golds": ["a", "b"], "truth": "single"},
            "a.jsonl:2: 'truth' is 'single', which the 'golds'",
        ),
    ],
)
def test_malformed_jsonl_row(row, words, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "Fine?", "golds": ["yes"]}, row])
    for split in SPLITS:
        with pytest.raises(UserError, match=words):
            load("jsonl", path, split)


@pytest.mark.parametrize(
    "task, row",
    [
        (
            "protoqa",
            {"question": "q", "answers": {"clusters": {"1": {"count": 5, "answers": [3]}}}},
        ),
        ("protoqa", {"question": "q", "answers": {"clusters": [{"count": 5, "answers": ["a"]}]}}),
        ("ambigqa", {"question": "q", "annotations": ["x"]}),
        ("ambigqa", {"question": "q", "annotations": {"type": ["singleAnswer"], "answer": []}}),
        ("mbpp", {"text": "q", "test_list": ["assert f()==1"], "test_imports": [1]}),
        (
            "hotpotqa",
            {
                "question": "q",
                "answer": "a",
                "context": [[n, [1]] for n in "abcdefghij"],
                "supporting_facts": [["a", 0], ["b", 0]],
            },
        ),
    ],
)
def test_rows_of_another_form_are_one_sentence(task, row, tmp_path):
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match="a.jsonl:1"):
        load(task, path, "train")


def test_documented_rows_load(tmp_path):
    """The rows in the module's own text are what a user copies."""
    text = jsonl.__doc__
    rows = [line.strip() + "\n" for line in text.splitlines() if line.strip().startswith("{")]
    assert len(rows) == 3 and len(jsonl_examples(tmp_path, rows)) == 3

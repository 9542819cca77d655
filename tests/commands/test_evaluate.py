"""`mar.evaluate` on the embedded model: the same bytes again, also after an interruption; texts
from outside; every mistake in one sentence."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mar import evaluate
from mar.answers.grammar import Grammar, grammar_of, render
from mar.answers.prompts import fit_grammar
from mar.answers.tokenizer import load_tokenizer
from mar.errors import UserError
from mar.measure.baselines import build_arms
from mar.measure.comparison import coverage_at_tokens
from mar.measure.held_out import measure
from mar.measure.shown_metrics import evaluation_metrics
from mar.records import Completion
from mar.run import answering
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.evaluation_folder import claimed, make_current
from mar.run.setup import build_training
from mar.run.summary import show_evaluation
from mar.run.words import read_words
from tests.helpers.processes import start

EMBEDDED = Path("mar/embedded/model").absolute()
DISPLAY = Display("plain", 0, 0)
FEW = [
    "+experiment=clinic",
    "eval.num_items=5",
    "k=6",
    "num_answers=2..3",
    "arms=policy,single,K=2",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    return evaluate.run(["base", *FEW, f"out={out}"], DISPLAY)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mar.train import run

    out = tmp_path_factory.mktemp("runs")
    words = [
        "+experiment=clinic",
        "train.steps=2",
        "train.stop_at=1",
        "checkpoint.every=1",
        "algo.group_size=2",
        "algo.prompts_per_step=2",
    ]
    assert (
        run(
            compose(
                [*words, "eval.num_items=5", "eval.every=1", f"out={out}", "logger.console=plain"]
            )
        )
        == 0
    )
    return out / "clinic/seed0"


def document(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def test_an_evaluation_holds_what_it_says(base: Path) -> None:
    rows = [json.loads(line) for line in (base / "eval_items.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + 3 * 5 and "protocol" in rows[0]
    found = document(base)
    assert set(found["arms"]) == {"policy", "single", "K=2"}
    policy, single = found["arms"]["policy"], found["arms"]["single"]
    assert (policy["num_sets"], single["num_sets"]) == (2, 6)
    assert policy["curve"]["k"] == [3, 6] and single["curve"]["k"] == [1, 2, 3, 4, 5, 6]
    assert len(found["bars"]["floor"]) == 6
    for name in (
        "coverage@3",
        "coverage@6",
        "pass@6",
        "unique@6",
        "ece",
        "auroc",
        "set_ece",
        "q_mse",
        "tv_distance",
        "regret",
        "overlap_rouge_l",
    ):
        middle, low, high = policy["metrics"][name]
        assert low <= middle <= high, name
    equal = found["equal_tokens"][0]
    assert equal["policy"] == policy["curve"]["coverage"][0][0]
    assert equal["single"] == pytest.approx(
        coverage_at_tokens(single["curve"], policy["curve"]["tokens"][0])
    )


def test_the_first_set_is_what_training_measures(base: Path, tmp_path: Path) -> None:
    training = build_training(
        compose(["+experiment=clinic", "eval.num_items=5"]), EMBEDDED, DISPLAY
    )
    metrics, rollouts = measure(training.learner.policy, training.held_out)
    rows = [json.loads(line) for line in (base / "eval_items.jsonl").read_text().splitlines()]
    first = [row["sets"][0]["text"] for row in rows if row.get("arm") == "policy"]
    assert first == [r.text for r in rollouts]
    for name in ("coverage@3", "top1", "brier", "ece", "q_mse", "format_rate"):
        low, high = metrics["interval"][name]
        assert low <= metrics[name] <= high


@pytest.mark.parametrize("cut", ["middle of a line", "middle of an arm"])
def test_an_interrupted_evaluation_goes_on(
    cut: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "COMPLETIONS_PER_WRITE", 4)  # two items of the policy at a time
    evaluate.run(["base", *FEW, f"out={tmp_path / 'whole'}"], DISPLAY)
    expected = (tmp_path / "whole/eval_items.jsonl").read_bytes()
    lines = expected.splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    kept = b"".join(lines[:4]) + lines[4][:40] if cut == "middle of a line" else b"".join(lines[:9])
    (tmp_path / "cut/eval_items.jsonl").write_bytes(kept)
    asked = []
    sample_items = answering.sample_items
    monkeypatch.setattr(
        answering,
        "sample_items",
        lambda arm, **rest: asked.append(arm.name) or sample_items(arm, **rest),
    )
    evaluate.run(["base", *FEW, f"out={tmp_path / 'cut'}"], DISPLAY)
    assert (tmp_path / "cut/eval_items.jsonl").read_bytes() == expected
    assert document(tmp_path / "cut") == document(tmp_path / "whole")
    # The third item is half a chunk: it is asked again.
    assert asked.count("policy") == (2 if cut == "middle of a line" else 0)
    assert [row["metrics"] for row in document(base)["arms"].values()] == [
        row["metrics"] for row in document(tmp_path / "cut")["arms"].values()
    ]


def test_a_damaged_row_is_asked_again(base: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(base, tmp_path / "out")
    file = tmp_path / "out/eval_items.jsonl"
    whole = file.read_bytes()
    of_nobody = json.loads(whole.splitlines()[2]) | {"arm": "nobody"}
    for row in ({"x": 1}, {"arm": "policy", "id": 3}, of_nobody):
        lines = whole.splitlines(keepends=True)
        lines[2] = json.dumps(row).encode() + b"\n"
        file.write_bytes(b"".join(lines))
        evaluate.run(["base", *FEW, f"out={tmp_path / 'out'}"], Display("plain", 0, 0))
        assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())
        assert "has 1 damaged rows" in " ".join(capsys.readouterr().out.split())


def test_a_run_is_the_same_by_any_path(trained: Path, tmp_path: Path, monkeypatch) -> None:
    words = ["k=3", "arms=policy", "num_answers=", "eval.num_items=2", f"out={tmp_path / 'out'}"]
    evaluate.run([str(trained), *words], DISPLAY)
    monkeypatch.chdir(trained.parent)
    evaluate.run([trained.name, *words], DISPLAY)
    assert not list((tmp_path / "out").glob("evaluation~*"))


def test_an_item_that_is_too_long_for_one_arm_is_asked_of_none(base: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (base / "eval_items.jsonl").read_text().splitlines()[1:]]
    lengths = {
        arm: {r["id"]: r["prompt_tokens"] for r in rows if r["arm"] == arm}
        for arm in ("policy", "single")
    }
    limit = sorted(lengths["policy"].values())[2]
    kept = [id for id, length in lengths["policy"].items() if length <= limit]
    assert len(kept) < 5
    assert max(lengths["single"].values()) <= limit  # asked for one answer, all would fit
    evaluate.run(["base", *FEW, f"model.max_prompt_tokens={limit}", f"out={tmp_path}"], DISPLAY)
    again = [
        json.loads(line) for line in (tmp_path / "eval_items.jsonl").read_text().splitlines()[1:]
    ]
    assert [(r["arm"], r["id"]) for r in again] == [
        (arm, id) for arm in ("policy", "single", "K=2") for id in kept
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


RESULTS = ("eval_items.jsonl", "evaluation.json")


def test_another_evaluation_moves_the_old_one_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["base", *FEW[:-1], "num_answers=", "arms=policy", f"out={tmp_path}"]
    evaluate.run(words, DISPLAY)
    first = files_of(tmp_path)
    assert set(first) == set(RESULTS)
    evaluate.run([*words, "seed=1"], Display("plain", 0, 0))
    said = " ".join(capsys.readouterr().out.split())
    assert f"it is {tmp_path}/evaluation~1 now" in said
    second = files_of(tmp_path)
    assert {name: second[f"evaluation~1/{name}"] for name in RESULTS} == first
    assert json.loads(second["eval_items.jsonl"].splitlines()[0])["protocol"]["seed"] == 1

    # A, B, A, B: what was measured comes back, and nothing is measured twice.
    monkeypatch.setattr(answering, "sample_items", lambda **_: pytest.fail("measured again"))
    evaluate.run(words, Display("plain", 0, 0))
    said = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path}/evaluation~1 held an evaluation with these settings: it is back" in said
    third = files_of(tmp_path)
    of_second = {f"evaluation~2/{name}": second[name] for name in RESULTS}
    assert third == first | of_second and not (tmp_path / "evaluation~1").exists()
    evaluate.run(words, DISPLAY)
    assert files_of(tmp_path) == third, "the same command changes nothing"
    evaluate.run([*words, "seed=1"], DISPLAY)
    assert files_of(tmp_path) == second
    with pytest.raises(UserError, match="with the same settings, which comes back"):
        evaluate.run([*words, f"against={tmp_path}/evaluation~1"], DISPLAY)


def test_an_evaluation_that_comes_back_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    """A move between any two of its files, and an evaluation that moved before it was whole."""
    for number in (1, 2):
        (tmp_path / f"evaluation~{number}").mkdir()
        items = tmp_path / f"evaluation~{number}/eval_items.jsonl"
        items.write_text('{"protocol": {"seed": 0}}\n')
    (tmp_path / "evaluation~1/evaluation.json").write_text("the whole one's")
    make_current(tmp_path, {"seed": 0}, print)
    left = {"evaluation~2/eval_items.jsonl"}
    assert set(files_of(tmp_path)) == {*RESULTS, *left}, "the one that has a result"
    (tmp_path / "evaluation.json").rename(tmp_path / "evaluation~2/evaluation.json")
    make_current(tmp_path, {"seed": 0}, print)
    assert (tmp_path / "eval_items.jsonl").exists(), "its items are here: they go on"


def test_a_move_that_was_cut_off_is_finished(tmp_path: Path) -> None:
    (tmp_path / "evaluation~1").mkdir()
    (tmp_path / "evaluation~1/evaluation.json").write_text("the first one's")
    (tmp_path / "eval_items.jsonl").write_text('{"protocol": "the first one"}\n')
    make_current(tmp_path, {"seed": 1}, print)
    assert set(files_of(tmp_path)) == {f"evaluation~1/{name}" for name in RESULTS}
    make_current(tmp_path, {"seed": 1}, print)
    (tmp_path / "evaluation.json").write_text("without its items")
    make_current(tmp_path, {"seed": 1}, print)
    assert (tmp_path / "evaluation~2/evaluation.json").read_text() == "without its items"


def evaluate_until(point: int, words: list[str]) -> None:
    """Evaluate, and be killed before a change of a file, counted from 1; says each before it."""
    calls = 0

    def deadly(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            print(f"about-to-{name}", flush=True)
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return wrapped

    answering.append_jsonl = deadly(answering.append_jsonl, "append")
    answering.write_jsonl = deadly(answering.write_jsonl, "items")
    evaluate.write_json = deadly(evaluate.write_json, "result")
    Path.rename = deadly(Path.rename, "move")
    Path.replace = deadly(Path.replace, "replace")
    evaluate.run(words, DISPLAY)


@pytest.mark.slow
@pytest.mark.parametrize("point", range(1, 9))
def test_results_survive_a_kill_and_every_repeated_command(
    point: int, base: Path, tmp_path: Path
) -> None:
    """Killed before its every change of a file, and repeated: the first evaluation is whole, in
    one place, and the second ends as if nothing had happened."""
    for name in RESULTS:
        (tmp_path / name).write_bytes((base / name).read_bytes())
    few = ["+experiment=clinic", "eval.num_items=2", "k=3", "num_answers=", "arms=policy"]
    words = ["base", *few, f"out={tmp_path}"]
    said = tmp_path.parent / f"{tmp_path.name}.out"
    process = start(evaluate_until, point, words, said=said)
    process.join(120)
    moves = ["move", "move", "items", "replace", "append", "result", "replace"]
    assert process.exitcode == (-signal.SIGKILL if point <= len(moves) else 0), said.read_text()
    done = [word for word in said.read_text().split() if word.startswith("about-to-")]
    assert done == [f"about-to-{move}" for move in moves[:point]]
    for _ in range(2):
        evaluate.run(words, DISPLAY)
        found = files_of(tmp_path)
        for name in RESULTS:
            assert found[f"evaluation~1/{name}"] == (base / name).read_bytes()
        assert set(found) == {*RESULTS, *(f"evaluation~1/{name}" for name in RESULTS)}
        assert document(tmp_path)["num_items"] == 2


def test_paired_comparisons_survive_a_command_without_them(base: Path, tmp_path: Path) -> None:
    words = ["base", *FEW[:3], "num_answers=", "arms=policy", f"out={tmp_path / 'out'}"]
    evaluate.run([*words, f"against={base}"], DISPLAY)
    pairs = document(tmp_path / "out")["paired"]
    assert set(pairs) == {f"policy - {base}"}
    evaluate.run(words, DISPLAY)
    assert document(tmp_path / "out")["paired"] == pairs


def test_nobody_measures_into_a_folder_twice_at_once(tmp_path: Path) -> None:
    with (
        claimed(tmp_path, {"seed": 0}, print),
        pytest.raises(UserError, match="choose another out="),
        claimed(tmp_path, {}, print),
    ):
        pass


def test_completions_of_others_measure_alike(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [
        row
        for line in (base / "eval_items.jsonl").read_text().splitlines()
        if (row := json.loads(line)).get("arm") == "policy"
    ]
    file = tmp_path / "theirs.jsonl"
    texts = [{"id": i["id"], "text": s["text"]} for i in items for s in i["sets"]] + [
        {"id": "clinic-test-999999", "text": "?"}
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts) + '{"id": "clinic-te')
    evaluate.run(
        [f"completions={file}", "+experiment=clinic", "eval.num_items=7", f"out={tmp_path}"],
        Display("plain", 0, 0),
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "10 of 11 texts: 2 for each of 5 of 7 questions" in said
    assert "Skipped 1 broken line(s)" in said
    assert ":12" in said
    ours = document(base)["arms"]["policy"]["metrics"]
    theirs = document(tmp_path)["arms"]["policy"]["metrics"]
    for name in ours:
        assert theirs[name] == ours[name], name
    # Other texts into the same folder: the first ones stay.
    first = files_of(tmp_path)
    words = ["+experiment=clinic", "eval.num_items=7", f"out={tmp_path}"]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts[::-1]))
    evaluate.run([f"completions={file}", *words], Display("plain", 0, 0))
    for name in RESULTS:
        assert files_of(tmp_path)[f"evaluation~1/{name}"] == first[name]


def test_a_run_against_its_untrained_self(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = evaluate.run(
        [
            str(trained),
            "k=3",
            "arms=policy,base",
            "num_answers=",
            f"against={base}",
            f"out={tmp_path}",
        ],
        Display("plain", 0, 0),
    )
    assert "unfinished: measuring step 1 of 2" in " ".join(capsys.readouterr().out.split())
    found = document(out)
    assert found["step"] == 1 and found["num_items"] == 5
    assert set(found["paired"]) == {"policy - base", f"policy - {base}"}
    rows = {
        row["arm"]: row
        for line in (out / "eval_items.jsonl").read_text().splitlines()
        if "arm" in (row := json.loads(line))
    }
    assert rows["policy"]["sets"] != rows["base"]["sets"]  # the step has changed the policy
    middle, low, high = found["paired"]["policy - base"]["coverage@3"]
    arms = found["arms"]
    assert middle == pytest.approx(
        arms["policy"]["metrics"]["coverage@3"][0] - arms["base"]["metrics"]["coverage@3"][0],
        abs=2e-6,
    )


def test_questions_that_were_changed_are_asked_anew(tmp_path: Path) -> None:
    def asked(question: str) -> bytes:
        rows = [{"id": f"q{n}", "question": f"{question} {n}?", "golds": ["x"]} for n in range(2)]
        for name, part in (("train", rows[:1]), ("eval", rows[1:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (tmp_path / f"{name}.jsonl").write_text(lines)
        files = [f"data.{name}_path={tmp_path}/{name}.jsonl" for name in ("train", "eval")]
        words = ["base", "data=jsonl", "model=embedded", *files, "k=3", "num_answers="]
        out = evaluate.run([*words, "arms=policy", f"out={tmp_path / 'out'}"], DISPLAY)
        return (out / "eval_items.jsonl").read_bytes()

    first = asked("Which dog")
    assert asked("Which dog") == first
    assert asked("Which very large cat") != first
    assert asked("Which dog") == first, "the earlier one comes back"


def test_what_one_side_has_no_confidences_for_is_not_compared(base: Path, tmp_path: Path) -> None:
    words = ["base", *FEW[:2], "reward=multi_rlvr", "k=3", "num_answers=", "arms=policy"]
    bare = evaluate.run([*words, f"out={tmp_path / 'bare'}"], DISPLAY)
    words = ["base", *FEW[:2], "k=3", "num_answers=", "arms=policy", f"against={bare}"]
    out = evaluate.run([*words, f"out={tmp_path / 'rated'}"], DISPLAY)
    paired = document(out)["paired"][f"policy - {bare}"]
    assert "coverage@3" in paired and "brier" in document(out)["arms"]["policy"]["metrics"]
    assert not {"brier", "value", "regret", "top1_conf"} & set(paired)


def test_a_checkpoint_of_transformers_evaluates_the_same(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).save_pretrained(
        tmp_path / "theirs"
    )
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(tmp_path / "theirs")
    words = [
        "model.thinking=false",
        "model.explain_decimals=false",
        "model.max_completion_tokens=96",
        "model.max_prompt_tokens=384",
    ]
    out = evaluate.run([str(tmp_path / "theirs"), *words, *FEW, f"out={tmp_path / 'out'}"], DISPLAY)
    assert document(out)["arms"] == document(base)["arms"]


@pytest.mark.slow
def test_the_same_coverage_through_transformers_generate(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["+experiment=clinic", "eval.num_items=150", "k=3", "num_answers=", "arms=policy"]
    ours = document(evaluate.run(["base", *words, f"out={tmp_path / 'ours'}"], DISPLAY))
    training = build_training(
        compose(["+experiment=clinic", "eval.num_items=150"]), EMBEDDED, DISPLAY
    )
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    torch.manual_seed(0)
    inputs = tokenizer(
        [p.text for p in training.held_out.prompts],
        return_tensors="pt",
        padding=True,
        add_special_tokens=False,
    )
    stops = list(training.held_out.params.stop_ids)
    ids = model.generate(
        **inputs,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=96,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    file = tmp_path / "generated.jsonl"
    file.write_text(
        "".join(
            json.dumps({"id": p.id, "text": t}) + "\n"
            for p, t in zip(training.held_out.prompts, texts, strict=True)
        )
    )
    theirs = document(
        evaluate.run(
            [
                f"completions={file}",
                *words,
                f"against={tmp_path / 'ours'}",
                f"out={tmp_path / 'theirs'}",
            ],
            DISPLAY,
        )
    )
    _, low, high = theirs["paired"][f"policy - {tmp_path / 'ours'}"]["coverage@3"]
    assert low < 0 < high and theirs["arms"]["policy"]["metrics"]["format_rate"][0] > 0.95
    assert (
        abs(
            theirs["arms"]["policy"]["metrics"]["coverage@3"][0]
            - ours["arms"]["policy"]["metrics"]["coverage@3"][0]
        )
        < 0.08
    )


def test_arms() -> None:
    multi = {a.name: a for a in build_arms(Grammar("rlcr_multi", 3), 30, [1, 3, 5], trained=True)}
    assert list(multi) == ["policy", "base", "single", "prompted_k", "verbalized", "K=1", "K=5"]
    assert [a.num_sets for a in multi.values()] == [10, 1, 30, 1, 1, 1, 1]
    assert [n for n, a in multi.items() if a.trained] == ["policy", "K=1", "K=5"]
    assert multi["prompted_k"].style == "prompted_k"
    assert multi["K=1"].grammar == Grammar("rlcr_multi", 1)
    single = {
        a.name: a for a in build_arms(Grammar("rlvr_single", 1), 30, [1, 3, 5], trained=False)
    }
    assert list(single) == ["policy", "prompted_k", "verbalized"]
    assert single["policy"].num_sets == 30
    assert single["prompted_k"].grammar == Grammar("rlvr_multi", 3)


def test_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of_sweep = tmp_path / "algo.credit=own/seed0"
    run_of_sweep.mkdir(parents=True)
    words = read_words(evaluate.COMMAND, [str(run_of_sweep), "seed=1"])
    assert (words.places, words.settings) == ([str(run_of_sweep)], ["seed=1"])
    assert evaluate.main(["--help"]) == 0
    assert "completions=texts.jsonl" in capsys.readouterr().out
    given = ["runs/x", "k=6", "eval.num_items=5", "+experiment=clinic", "completions="]
    words = read_words(evaluate.COMMAND, given)
    assert words.places == ["runs/x"] and words.settings == given[2:4]
    assert words.options == evaluate.EvaluateOptions(k=6)
    assert evaluate.parse_sizes("2..4") == [2, 3, 4]
    assert evaluate.parse_sizes("2,5") == [2, 5]
    assert evaluate.parse_sizes("") == []
    curve = {"tokens": [10.0, 20.0], "coverage": [[0.5, 0, 1], [0.7, 0, 1]]}
    assert coverage_at_tokens(curve, 15) == pytest.approx(0.6)
    # A set that just misses the budget is got by a share of the items.
    assert coverage_at_tokens(curve, 5) == pytest.approx(0.25)
    # No third set fits into 29 tokens; whether it would into 30 was not sampled.
    assert coverage_at_tokens(curve, 29) == pytest.approx(0.7)
    assert coverage_at_tokens(curve, 30) is None


def broken_inputs(tmp_path: Path, trained: Path) -> dict[str, tuple[list[str], str]]:
    (tmp_path / "young").mkdir()
    (tmp_path / "young/config.yaml").write_text((trained / "config.yaml").read_text())
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.yaml").write_text(
        (trained / "config.yaml").read_text().replace("grad_clip:", "clip_norm:")
    )
    (tmp_path / "no_ids.jsonl").write_text('{"text": "flu"}\n')
    (tmp_path / "other_ids.jsonl").write_text('{"id": "q1", "text": "flu"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    one = {"id": "clinic-test-000000", "text": "flu"}
    (tmp_path / "length.jsonl").write_text(json.dumps(one | {"num_tokens": -5}) + "\n")
    (tmp_path / "one.jsonl").write_text(json.dumps(one) + "\n")
    (tmp_path / "two.jsonl").write_text(json.dumps(one | {"id": "clinic-test-000001"}) + "\n")
    other_texts = tmp_path / "other_texts"
    words = [f"completions={tmp_path}/two.jsonl", "+experiment=clinic", "eval.num_items=3"]
    evaluate.run([*words, f"out={other_texts}"], DISPLAY)
    (tmp_path / "tiny.jsonl").write_text('{"id": "only", "question": "Q?", "golds": ["x"]}\n')
    clinic = ["+experiment=clinic", "eval.num_items=3"]
    own = [
        "data=jsonl",
        "model=embedded",
        f"data.path={tmp_path}/tiny.jsonl",
        "data.eval_split=test",
    ]
    return {
        "nothing": ([], "name one thing to measure"),
        "two things": (["base", "other"], "one word too many"),
        "no such place": (["nowhere"], "nowhere is not there: name a run"),
        "no checkpoint yet": ([str(tmp_path / "young")], "no readable checkpoint"),
        "another schema": ([str(tmp_path / "old")], "another version"),
        "misspelt setting": ([str(trained), "eval.nun_items=3"], "did you mean eval.num_items=3?"),
        "no ids": ([f"completions={tmp_path}/no_ids.jsonl", *clinic], "keys id and text"),
        "no rows": ([f"completions={tmp_path}/empty.jsonl", *clinic], "one JSON object a line"),
        "a length below 0": ([f"completions={tmp_path}/length.jsonl", *clinic], "num_tokens=-5"),
        "texts of other questions": (
            [f"completions={tmp_path}/one.jsonl", f"against={other_texts}", *clinic],
            "other questions",
        ),
        "other ids": ([f"completions={tmp_path}/other_ids.jsonl", *clinic], "clinic-test-000000"),
        "no file": ([f"completions={tmp_path}/none.jsonl", *clinic], "no such file"),
        "unknown arm": (["base", "arms=policy,singel", *clinic], "arms=singel"),
        "bad sizes": (["base", "num_answers=many", *clinic], "num_answers=many"),
        "bad k": (["base", "k=many", *clinic], "k=many"),
        "large sizes": (["base", "num_answers=1..60", *clinic], "1 to 10"),
        "empty set": (["base", "+experiment=clinic", *own], "tiny.jsonl"),
        "not evaluated": (
            [str(trained), "k=3", "arms=policy", f"against={tmp_path}", f"out={tmp_path}/o"],
            "is a folder of 2 runs: name one of them",
        ),
    }


def test_mistakes_are_one_sentence(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (words, expected) in broken_inputs(tmp_path, trained).items():
        before = files_of(tmp_path)
        assert evaluate.main(words) == 2, name
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and expected in said, (
            name,
            said,
        )
        assert files_of(tmp_path) == before, name
        assert not (tmp_path / "o").exists(), name


def test_what_is_refused_touches_nothing_and_measures_nothing(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("config.yaml", "eval.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    few = [str(tmp_path), "k=3", "num_answers=", "arms=policy"]
    evaluate.run(few, DISPLAY)
    before = files_of(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(trained, elsewhere)
    (elsewhere / "eval_items.jsonl").write_text('{"arm": "policy", "id": "x"}\n')
    others = tmp_path / "others"
    others.mkdir()
    rows = (tmp_path / "eval_items.jsonl").read_text().replace("clinic-test-", "other-")
    (others / "eval_items.jsonl").write_text(rows)
    (tmp_path / "file").write_text("in the way")
    before = files_of(tmp_path)
    monkeypatch.setattr(answering, "sample_items", lambda **_: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = {
        "device=cuda": "device=cuda",
        f"against={tmp_path}/none": "is not there: name a run",
        f"against={elsewhere}": "damaged",
        f"against={others}": "other questions",
        f"against={tmp_path}": "evaluation~1",
        "arms=policy,singel": "arms=singel",
        "num_answers=7,70": "1 to 10",
        "num_answers=6..2": "smaller number first",
        "k=2": "k=3",
        "k=many": "k=many",
        f"out={tmp_path}/file": "choose another out=",
        f"out={tmp_path}/file/o": "choose another out=",
        "model.max_completion_tokens=5000": "positions",
    }
    for word, expected in refused.items():
        assert evaluate.main([*few, "seed=1", word]) == 2, word
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1, (word, said)
        assert files_of(tmp_path) == before, word
    broken = tmp_path / "broken"
    shutil.copytree(EMBEDDED, broken)
    (broken / "model.safetensors").write_bytes(b"")
    before = files_of(tmp_path)
    words = [
        str(broken),
        "+experiment=clinic",
        *few[1:],
        "eval.num_items=2",
        "model.thinking=false",
    ]
    assert evaluate.main([*words, f"out={tmp_path}"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert files_of(tmp_path) == before


def test_more_answers_than_in_training_get_no_more_room_than_there_is(tmp_path):
    """Training fits the model's 2,048 positions, and six answers with twice the room would not."""
    words = ["+experiment=clinic", "model.max_completion_tokens=1200", "eval.num_items=2"]
    display = Display("plain", 0, 0)
    target = answering.find_target("base", words, tmp_path, None, display)
    tokenizer = load_tokenizer(target.model_folder)
    arms = build_arms(fit_grammar(grammar_of(target.config), tokenizer), 3, [6], trained=False)
    questions = answering.prepare_questions(target.config, arms, tokenizer, display)
    models = answering.prepare_models(target, arms, questions)
    longest = max(len(prompt.ids) for prompt in questions.prompts["K=6"])
    assert models.params["policy"].max_tokens == 1200
    assert models.params["K=6"].max_tokens == 2048 - longest < 2400


def test_sizes_that_are_asked_for_are_measured_beside_named_arms(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = build_arms(Grammar("rlcr_multi", 3), 6, [2, 3, 4], trained=True)

    def chosen(text: str, asked: bool) -> list[str]:
        return [arm.name for arm in evaluate.choose_arms(arms, text, asked)]

    assert chosen("policy,base", asked=True) == ["policy", "base", "K=2", "K=4"]
    assert chosen("policy,base", asked=False) == ["policy", "base"]
    assert chosen("single,K=4", asked=False) == ["policy", "single", "K=4"]
    single = ["base", "+experiment=clinic", "reward=rlcr_single", "eval.num_items=3"]
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"id": "clinic-test-000000", "text": "?"}\n')
    given = [f"completions={texts}", "+experiment=clinic", f"out={tmp_path / 'out'}"]
    refused = [
        ([*single, "num_answers=2"], "this policy gives one answer"),
        ([*given, "num_answers=2"], "completions= has its texts"),
        ([*given, "arms=policy,single"], "completions= has its texts"),
    ]
    for words, expected in refused:
        assert evaluate.main(words) == 2
        assert expected in capsys.readouterr().err


def test_all_arms_are_compared_at_a_multiple_of_a_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.whole_sets(30, 4, print) == 28
    assert "k=30 is no multiple of the 4 answers of a set: 28" in capsys.readouterr().out
    assert evaluate.whole_sets(30, 3, print) == 30 and not capsys.readouterr().out
    with pytest.raises(UserError, match="take k=4"):
        evaluate.whole_sets(3, 4, print)


def test_a_table_has_no_row_twice() -> None:
    assert evaluation_metrics(3, 3).count("coverage@3") == 1
    assert evaluation_metrics(3, 6)[:3] == ("coverage@3", "coverage@6", "unique@6")


def test_a_table_has_no_row_that_no_arm_has(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(base)
    for name in ("single", "K=2"):
        del found["arms"][name]
    metrics = found["arms"]["policy"]["metrics"]
    found["arms"]["policy"]["num_sets"] = 1
    del metrics["unique@6"]
    show_evaluation(found | {"paired": {}}, Display("plain", 0, 0))
    said = capsys.readouterr().out
    assert said.count("coverage@3") == 1 and "unique@" not in said and "top1" in said


def test_nothing_of_a_resampled_interval_depends_on_the_order_of_arms(base: Path) -> None:
    with pytest.raises(UserError, match="other questions"):
        answering.require_common(base, answering.read_other(base, Path("elsewhere")), ["q1"])
    assert np.isfinite(document(base)["arms"]["policy"]["metrics"]["coverage@3"]).all()


def test_programs_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer of every set passes, the second is the same with another name, the third is
    wrong. Every other set begins with the second."""
    row = {"text": "Square a number.", "test_list": ["assert f(2) == 4", "assert f(3) == 9"]}
    data = tmp_path / "mbpp.jsonl"
    data.write_text(
        "".join(
            json.dumps(row | {"task_id": n, "text": f"{n}: square a number."}) + "\n"
            for n in range(60)
        )
    )
    right, wrong = "def f(x):\n    return x * x", "def f(x):\n    return x + x"

    def write(model, prompts, group_size, **_):
        group = []
        for g in range(group_size):
            first, second = (right, right.replace("x", "y"))[:: 1 if g % 2 == 0 else -1]
            ids = np.array(
                tokenizer(
                    render(
                        Grammar("rlcr_multi", 3, thinking=False),
                        [first, second, wrong],
                        [0.9, 0.2, 0.1],
                    )
                )["input_ids"]
            )
            group.append(Completion(g, ids, ids * 0.0, ids * 0.0, "length"))
        return [group for _ in prompts], None

    tokenizer = load_tokenizer(EMBEDDED)
    monkeypatch.setattr("mar.measure.baselines.sample", write)
    settings = [
        "+experiment=mbpp",
        "model=embedded",
        "data.source=path",
        f"data.path={data}",
        "reward.sandbox=unsafe",
        "eval.num_items=3",
    ]
    words = [*settings, "k=6", "num_answers=", "arms=policy"]
    out = evaluate.run(["base", *words, f"out={tmp_path / 'out'}"], DISPLAY)
    metrics = document(out)["arms"]["policy"]["metrics"]
    expected = {
        "coverage@3": 1,
        "coverage@6": 1,
        "unique@6": 2,
        "recall@3": 1 / 3,
        "top1": 1,
        "repeats_per_set": 1,
        "format_rate": 1,
    }
    assert {n: metrics[n][0] for n in expected} == pytest.approx(expected)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"id": "mbpp-1", "text": "x"}))
    with pytest.raises(UserError, match="answers in words"):
        evaluate.run([f"completions={texts}", *words, f"out={tmp_path / 'b'}"], DISPLAY)


def test_the_last_line_is_json_in_a_pipe_and_a_file_on_a_terminal(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["base", *FEW, f"out={base}"]
    assert evaluate.main(words) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    whole = document(base)
    assert said["out"] == str(base) and said["num_items"] == 5
    assert said["arms"].keys() == whole["arms"].keys()
    assert said["arms"]["policy"]["top1"] == whole["arms"]["policy"]["metrics"]["top1"]
    assert said["paired"]["policy - single"].items() <= whole["paired"]["policy - single"].items()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "300")  # the folder's name is long
    assert evaluate.main(words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"all numbers, for programs: {base / 'evaluation.json'}"

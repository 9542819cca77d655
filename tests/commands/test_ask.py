"""Asking a policy: what is shown, what is pooled, and what is refused."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mar import ask
from mar.run.asking import AnswerSet, PooledAnswer, open_policy, pool
from mar.run.compose import compose
from mar.tasks import clinic
from mar.train import run

QUESTION = clinic.load("test", 1)[0].question


def answers(*pairs: tuple[str, float | None], reason: str | None = None) -> AnswerSet:
    names, confidences = zip(*pairs, strict=True)
    return AnswerSet("text", names, confidences, reason)


def test_sets_are_pooled_by_meaning():
    sets = [
        answers(("flu", 0.6), ("cold", 0.2), ("Flu", 0.9)),  # a repeat counts once
        answers(("the flu", 0.4), ("covid", 0.4), ("gout", 0.0)),
        answers(("flu", 1.0), ("gout", 1.0), ("cold", 1.0), reason="unfinished"),
    ]
    assert pool(sets) == [
        PooledAnswer("flu", 1.0, 0.5),
        PooledAnswer("covid", 0.5, 0.2),
        PooledAnswer("cold", 0.5, 0.1),
        PooledAnswer("gout", 0.5, 0.0),
    ]
    assert pool([answers(("a", None), ("b", None)), answers(("a", None), ("a", None))]) == [
        PooledAnswer("a", 1.0, None),
        PooledAnswer("b", 0.5, None),
    ]
    assert pool(sets[2:]) == []


def test_the_same_question_and_seed_give_the_same_answers(capsys: pytest.CaptureFixture[str]):
    policy = open_policy("embedded", ["algo.temperature=0.5"])
    sets = policy.ask(QUESTION, num_sets=3, seed=0)
    assert sets == policy.ask(QUESTION, 3, 0) and sets != policy.ask(QUESTION, 3, 1)
    assert sets[:1] == policy.ask(QUESTION, 1, 0)
    assert all(len(one.answers) == 3 for one in sets)
    ask.show(QUESTION, sets[:1], ask.Console(width=80))
    said = capsys.readouterr().out
    for answer, confidence in zip(sets[0].answers, sets[0].confidences, strict=True):
        assert f"{answer}" in said and f"{confidence:.2f}" in said and "█" in said


@pytest.mark.parametrize(
    ("given", "sentence"),
    [(b"", "no question came"), (b"\n \n", "no question came"), (b"caf\xe9?\n", "is not in UTF-8")],
)
def test_a_pipe_without_a_question_is_one_sentence(given, sentence, monkeypatch, capsys):
    pipe = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", pipe)
    assert ask.main(["embedded"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and sentence in said


@pytest.mark.slow
def test_a_reader_that_has_gone_ends_the_command_quietly():
    code = f"from mar import ask; import sys; sys.exit(ask.main(['embedded', {QUESTION!r}, 'json=true']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.slow
def test_a_run_answers_from_its_newest_checkpoint_and_a_pipe_is_read(tmp_path: Path):
    words = [
        "+experiment=clinic",
        "train.steps=1",
        "algo.prompts_per_step=2",
        "algo.group_size=2",
        "eval.num_items=2",
        "model.lr=1",
        f"out={tmp_path}",
        "logger.console=plain",
    ]
    assert run(compose(words)) == 0
    command = [sys.executable, "-m", "mar.ask", str(tmp_path / "clinic/seed0"), "json=true"]
    done = subprocess.run(
        [*command, "samples=2"],
        input=f"{QUESTION}\n\n{QUESTION}\n",
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first == second and first["question"] == QUESTION and len(first["sets"]) == 2
    untrained = open_policy("embedded", []).ask(QUESTION, 2, 0)
    assert first["sets"][0]["text"] != untrained[0].text


BAD = {
    "nothing there": (["nowhere"], "nowhere is not there: name a run"),
    "two questions": (["embedded", "a", "b"], "texts with spaces in quotes"),
    "no sets": (["embedded", "a", "samples=0"], "samples=0 is out of range"),
    "unknown setting": (["embedded", "a", "algo.temprature=1"], "algo.temperature"),
    "a book": (["embedded", "fever " * 3000], "shorten it"),
    "beyond its positions": (
        ["embedded", "a", "model.max_completion_tokens=3000"],
        "2048 positions",
    ),
    "no GPU here": (["embedded", "a", "device=cuda"], "device=auto"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_sentence(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words, expected = BAD[name]
    assert ask.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and expected in said and said.count("\n") == 1


def test_what_a_model_wrote_is_not_obeyed(capsys: pytest.CaptureFixture[str]):
    ask.show("?", [answers(("\x1b[2Jgone", 0.5))], ask.Console(width=80))
    assert "\\x1b[2Jgone" in capsys.readouterr().out


def test_a_bar_stays_in_the_line_of_a_narrow_terminal() -> None:
    for width in (80, 60, 50):
        line = ask.bar_line("a rather long name of an illness", 0.5, " 100% of sets", width)
        assert len(line.plain) <= max(width, 57) and "0.50" in line.plain
    assert ask.bar_line("x" * 50, 1.0, "", 200).plain.startswith("  " + 32 * "x" + " 1.00")

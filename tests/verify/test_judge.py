"""A judge behind a stub of an OpenAI-compatible server, on loopback: what it is asked, what its reply is worth, and what happens without one."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from mar.answers.grammar import Grammar, render
from mar.answers.rewards import RewardSpec
from mar.errors import UserError
from mar.measure.answer_sets import read_item
from mar.records import Completion, Example, Gold, Prompt
from mar.sample.rollout import Scorer, judge_groups, judged_only
from mar.verify import judge
from mar.verify.verifiers import find_verifier

GRAMMAR = Grammar("rlvr_multi", 2, thinking=False)
FLU = Example(
    "q", "test", "What is it?", (Gold("influenza", ("flu",)), Gold("common cold")), "uniform", True
)


@contextmanager
def server(reply):
    """A server that says reply(question text); yields its URL and the list of what it was asked."""
    asked = []

    class Stub(BaseHTTPRequestHandler):
        def do_POST(self):
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][1][
                "content"
            ]
            asked.append(text)
            said = "1" if "capital of France" in text else reply(text)
            self.send_response(200 if isinstance(said, str) else said)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        running.shutdown()
        running.server_close()


def about(answer):
    """A reply that finds 1 where the quoted answer is this one, else 0."""
    return lambda text: "1" if text.endswith(f"Answer (JSON string): {json.dumps(answer)}") else "0"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(judge.time, "sleep", lambda _: None)


def make(url, folder, timeout_s=5.0):
    return find_verifier("medqa", "text", "auto", False, (url, "m", timeout_s), folder)


def rollout(verifier, *answers):
    text = render(GRAMMAR, list(answers), [None] * 2)
    ids = np.array([0, 1])
    done = Completion(0, ids, np.zeros(2, np.float32), np.zeros(2, np.float32), "stop")
    return judge_groups(
        [Prompt(FLU, "?", (1,))],
        [[done]],
        Scorer(GRAMMAR, RewardSpec(brier="none"), verifier, lambda ids: text if ids else ""),
    )[0][0]


def test_a_meant_gold_is_a_hit_and_words_are_not_asked_about(tmp_path):
    with server(about("grippe")) as (url, asked):
        verifier = make(url, tmp_path)
        got = rollout(verifier, "La Grippe".removeprefix("La "), "the flu")
        assert (got.hits, got.repeated, got.unjudged) == ((1.0, 0.0), (False, True), 0)
        assert (
            len(asked) == 2
            and "1. influenza\n2. common cold" in asked[1]
            and "What is it?" in asked[1]
        )
        assert rollout(verifier, "flu", "x" * 201).hits == (1.0, 0.0) and len(asked) == 2


def test_it_is_asked_once_and_its_verdicts_stay_on_disk(tmp_path):
    with server(about("grippe")) as (url, asked):
        rollout(make(url, tmp_path), "grippe", "gout")
        file = next(tmp_path.glob("*.jsonl"))
        file.write_text(file.read_text() + '[["What is it?", "gri')
        again = make(url, tmp_path)
        assert rollout(again, "Grippe!", "GOUT").hits == (1.0, 0.0)
        assert len(asked) == 4, "two first questions and one for each answer"


@pytest.mark.parametrize("said", ["1 and pay me", "I think 1", "3", "", "-1", 500, "one"])
def test_a_reply_that_is_no_number_of_a_gold_is_no_verdict(tmp_path, said):
    with server(lambda _: said) as (url, asked):
        verifier = make(url, tmp_path)
        got = rollout(verifier, "grippe", "flu")
        assert (got.unjudged, len(asked)) == (1, 1 + judge.TRIES)
        with pytest.raises(UserError, match="the judge"):
            judged_only([[got]])
        prompt = Prompt(FLU, "?", (1,))
        with pytest.raises(UserError, match="gives no verdict"):
            read_item(prompt, [(got.text, 3)], GRAMMAR, verifier)
    assert next(tmp_path.glob("*.jsonl")).read_text() == ""


def test_a_server_that_hangs_costs_its_timeout(tmp_path):
    wait = threading.Event()
    with server(lambda _: str(wait.wait(20))) as (url, _):
        began = time.perf_counter()
        assert rollout(make(url, tmp_path, 0.2), "grippe", "gout").unjudged == 2
        assert time.perf_counter() - began < 5
        wait.set()


def test_a_server_that_died_does_not_hold_up_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "PATIENCE", 0)
    with server(about("grippe")) as (url, asked):
        assert rollout(make(url, tmp_path), "grippe", "gout").unjudged == 2 and len(asked) == 1


def test_texts_from_elsewhere_are_judged_too(tmp_path):
    with server(about("grippe")) as (url, _):
        item = read_item(
            Prompt(FLU, "?", (1,)),
            [(render(GRAMMAR, ["grippe", "cold"], [None] * 2), 9)],
            GRAMMAR,
            make(url, tmp_path),
        )
        assert item.sets[0].hits == (1.0, 0.0) and item.sets[0].keys == ("influenza", "cold")


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="reward.judge_model=m.* gives no verdict"):
        make("http://127.0.0.1:9/v1", tmp_path)
    with pytest.raises(UserError, match="data.verifier=math"):
        find_verifier("medqa", "text", "math", False, ("http://127.0.0.1:9/v1", "", 1.0), tmp_path)
    with pytest.raises(UserError, match="choose auto, text, math"):
        find_verifier("medqa", "text", "maths", False, (None, "", 1.0), tmp_path)
    with pytest.raises(UserError, match="are programs"):
        find_verifier("mbpp", "program", "math", False, (None, "", 1.0), tmp_path)
    with server(lambda _: "0") as (url, _), pytest.raises(UserError, match="MAR_CACHE"):
        (tmp_path / "file").write_text("")
        make(url, tmp_path / "file" / "judge")

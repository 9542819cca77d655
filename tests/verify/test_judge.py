"""A judge behind a stub of an OpenAI-compatible server, on this machine.

What it is asked, what its reply is worth, and what happens without one.
"""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from mar.answers.grammar import Grammar, render
from mar.answers.rewards import RewardSpec
from mar.config import DataOptions, RewardOptions
from mar.errors import UserError
from mar.measure.answer_sets import read_item
from mar.records import Completion, Example, Gold, Prompt
from mar.sample.rollout import Scorer, judge_groups, judged_only
from mar.verify import judge
from mar.verify.verifiers import make_answer_checker

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
            body = self.rfile.read(int(self.headers["Content-Length"]))
            text = json.loads(body)["messages"][1]["content"]
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


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MAR_CACHE", str(tmp_path))


def checker(task_verifier="text", verifier="auto", url=None, model="m", timeout_s=5.0):
    """What the options ask for; verdicts are kept in the folder `judge` of the cache."""
    data = DataOptions(task="the task", verifier=verifier)
    reward = RewardOptions(judge=url, judge_model=model, judge_timeout_s=timeout_s)
    return make_answer_checker(task_verifier, data, reward)


def rollout(verifier, *answers):
    text = render(GRAMMAR, answers)
    zeros = np.zeros(2, np.float32)
    done = Completion(0, np.array([0, 1]), zeros, zeros, "stop")
    scorer = Scorer(GRAMMAR, RewardSpec(brier="none"), verifier, lambda ids: text if ids else "")
    ((found,),) = judge_groups([Prompt(FLU, "?", (1,))], [[done]], scorer)
    return found


def test_a_meant_gold_is_a_hit_and_words_are_not_asked_about(tmp_path):
    with server(about("grippe")) as (url, asked):
        verifier = checker(url=url)
        got = rollout(verifier, "Grippe", "the flu")
        assert (got.hits, got.repeated, got.unjudged) == ((1.0, 0.0), (False, True), 0)
        assert len(asked) == 2
        assert "1. influenza\n2. common cold" in asked[1]
        assert "What is it?" in asked[1]
        assert rollout(verifier, "flu", "x" * 201).hits == (1.0, 0.0)
        assert len(asked) == 2


def test_it_is_asked_once_and_its_verdicts_stay_on_disk(tmp_path):
    with server(about("grippe")) as (url, asked):
        rollout(checker(url=url), "grippe", "gout")
        file = next(tmp_path.glob("judge/*.jsonl"))
        file.write_text(file.read_text() + '[["What is it?", "gri')
        again = checker(url=url)
        assert rollout(again, "Grippe!", "GOUT").hits == (1.0, 0.0)
        assert len(asked) == 4, "two first questions and one for each answer"


@pytest.mark.parametrize("said", ["1 and pay me", "I think 1", "3", "", "-1", 500, "one"])
def test_a_reply_that_is_no_number_of_a_gold_is_no_verdict(tmp_path, said):
    with server(lambda _: said) as (url, asked):
        verifier = checker(url=url)
        got = rollout(verifier, "grippe", "flu")
        assert (got.unjudged, len(asked)) == (1, 1 + judge.TRIES)
        with pytest.raises(UserError, match="the judge"):
            judged_only([[got]])
        prompt = Prompt(FLU, "?", (1,))
        with pytest.raises(UserError, match="gives no verdict"):
            read_item(prompt, [(got.text, 3)], GRAMMAR, verifier)
    assert next(tmp_path.glob("judge/*.jsonl")).read_text() == ""


def test_a_server_that_hangs_costs_its_timeout(tmp_path):
    wait = threading.Event()
    with server(lambda _: str(wait.wait(20))) as (url, _):
        began = time.perf_counter()
        assert rollout(checker(url=url, timeout_s=0.2), "grippe", "gout").unjudged == 2
        assert time.perf_counter() - began < 5
        wait.set()


def test_a_server_that_died_does_not_hold_up_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "PATIENCE", 0)
    with server(about("grippe")) as (url, asked):
        assert rollout(checker(url=url), "grippe", "gout").unjudged == 2 and len(asked) == 1


def test_texts_from_elsewhere_are_judged_too(tmp_path):
    with server(about("grippe")) as (url, _):
        text = render(GRAMMAR, ["grippe", "cold"])
        item = read_item(Prompt(FLU, "?", (1,)), [(text, 9)], GRAMMAR, checker(url=url))
        assert item.sets[0].hits == (1.0, 0.0)
        assert item.sets[0].keys == ("influenza", "cold")


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    nobody = "http://127.0.0.1:9/v1"
    with pytest.raises(UserError, match="reward.judge_model=m.* gives no verdict"):
        checker(url=nobody)
    with pytest.raises(UserError, match="data.verifier=math"):
        checker(verifier="math", url=nobody)
    with pytest.raises(UserError, match="choose auto, text, math"):
        checker(verifier="maths")
    with pytest.raises(UserError, match="the task are programs"):
        checker("program", verifier="math")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAR_CACHE", str(tmp_path / "file"))
    with server(lambda _: "0") as (url, _), pytest.raises(UserError, match="MAR_CACHE"):
        checker(url=url)

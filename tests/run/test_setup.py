"""How a run's settings become the sampler's."""

import shutil

import pytest

from mar.answers.grammar import Grammar
from mar.answers.prompts import load_tokenizer
from mar.errors import UserError
from mar.policy.sources import environment, resolve_model
from mar.run.compose import compose
from mar.run.setup import sampling_params


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert environment()["commit"] is None


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_model("embedded", "embedded", None)[0])


def params(tokenizer, *overrides, thinking=True):
    config = compose(["+experiment=clinic", *overrides])
    return sampling_params(config, Grammar(thinking=thinking), tokenizer)


def test_a_thinking_budget_becomes_tokens_that_close_the_thoughts(tokenizer):
    p = params(tokenizer, "sampler.think_budget=20", "sampler.stop_strings=[END]")
    assert (p.max_tokens, p.think_budget, p.stop_strings) == (96, 20, ("END",))
    assert tokenizer.decode(p.think_close) == "</think>" and p.stop_ids == (tokenizer.eos_token_id,)
    assert params(tokenizer).think_close == () and params(tokenizer).think_budget is None


def test_a_thinking_budget_keeps_room_for_the_answers(tokenizer):
    params(tokenizer, "sampler.think_budget=50")
    with pytest.raises(
        UserError, match=r"think_budget=90 leaves 6 tokens and 3 answers need about \d\d"
    ):
        params(tokenizer, "sampler.think_budget=90")
    with pytest.raises(UserError, match="model.thinking=true"):
        params(tokenizer, "sampler.think_budget=20", thinking=False)

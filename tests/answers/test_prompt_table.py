"""Prompts are made when they are asked for, and those over the limit are known without making all."""

import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mar.answers.grammar import Grammar
from mar.answers.prompt_table import PromptTable
from mar.answers.prompts import build_prompt, fit_grammar, tokens_beside_question
from mar.answers.tokenizer import MOST_BYTES, load_tokenizer, most_tokens, tokens_around
from mar.errors import UserError
from mar.policy.sources import EMBEDDED
from mar.records import Example, Prompt
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import make_prompts, prompt_table
from tests.helpers.small_tokenizers import KINDS


def test_no_character_becomes_more_bytes_than_the_bound_says():
    longest = 0
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if 0xD800 <= code < 0xE000:
            continue
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            normal = unicodedata.normalize(form, character)
            longest = max(longest, len(normal.encode()), len(normal.casefold().encode()))
            assert code >= 128 or normal == character
    assert longest == MOST_BYTES


@pytest.fixture(scope="module", params=("embedded", *KINDS))
def tokenizer(request, tmp_path_factory):
    if request.param == "embedded":
        return load_tokenizer(EMBEDDED)
    return load_tokenizer(KINDS[request.param](tmp_path_factory.mktemp(request.param)))


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=60), st.booleans())
def test_no_prompt_has_more_tokens_than_the_bound(tokenizer, text, first):
    grammar = fit_grammar(Grammar(thinking=False), tokenizer)
    beside = tokens_beside_question(grammar, tokenizer, "flu", "ranked")
    for question in (text, text + "<|im_end|>", "\u0958\ufdfa" + text, " " * 30, "<tool>[INST]"):
        example = Example("e", "t", question, ())
        try:
            prompt = build_prompt(example, grammar, tokenizer, "flu", request_first=first)
        except UserError:  # some controls cannot be spelt out
            continue
        assert len(prompt.ids) <= beside + most_tokens(question)


def test_a_template_that_changes_what_it_is_told_has_no_bound():
    tokenizer = load_tokenizer(EMBEDDED)
    assert tokens_around(tokenizer, False) < 100
    tokenizer.chat_template = "{{ messages[0]['content'] | tojson }}"
    assert tokens_around(tokenizer, False) is None
    assert tokens_beside_question(Grammar(thinking=False), tokenizer, "flu", "ranked") is None
    tokenizer.chat_template = "{{ messages[0]['content'] * 2 }}"
    assert tokens_around(tokenizer, False) is None


# --- the table -------------------------------------------------------------------------------


class Made:
    """Makes prompts of as many tokens as the question says, and counts them."""

    def __init__(self):
        self.ids = []

    def __call__(self, example):
        self.ids.append(example.id)
        return Prompt(example, example.question, [7] * int(example.question))


LENGTHS = [3, 9, 4, 30, 5, 8, 30, 2]
EXAMPLES = [Example(str(n), "t", str(length), ()) for n, length in enumerate(LENGTHS)]


def table(made, known, bounds=None, **options):
    bounds = np.array(LENGTHS) + 1 if bounds is None else bounds
    return PromptTable(EXAMPLES, made, bounds, limit=8, known=known, **options)


@pytest.mark.parametrize("known", (-1, 2, 6, 8))
def test_the_same_prompts_are_left_however_many_are_made_at_once(known):
    found = table(Made(), known)
    assert [p.id for p in found] == ["0", "2", "4", "5", "7"]
    assert [p.id for p in found[1:3]] == ["2", "4"] and found[np.int64(3)].id == "5"
    assert (len(found), found.num_dropped, found.longest) == (5, 3, 30)
    assert found.longest_asked == 8
    assert found[0].ids.dtype == np.int32 and found[-1].ids.tolist() == [7, 7]


def test_only_what_can_be_too_long_is_made_at_once():
    made = Made()
    found = table(made, known=8)
    assert made.ids == ["1", "3", "5", "6"]
    assert found[3].id == "5" and len(made.ids) == 4  # kept
    assert found[0].id == "0" and made.ids[4:] == ["0"]
    assert len(table(Made(), known=8, most_kept=0).kept) == 0


def test_a_prompt_that_breaks_its_bound_is_told():
    found = table(Made(), known=8, bounds=np.full(8, 3))
    assert len(found) == 8 and found[0].id == "0"
    with pytest.raises(UserError, match=r"makes 30 tokens of 3, .*max_prompt_tokens is 8: raise"):
        found[3]


@pytest.mark.parametrize("limit", (70, 75, 5000))
def test_a_run_asks_the_same_whether_its_prompts_are_made_or_not(limit, capsys):
    tokenizer = load_tokenizer(EMBEDDED)
    grammar = fit_grammar(Grammar(thinking=False), tokenizer)
    examples = [Example(str(n), "t", "fever " * (n % 5) + "é", ()) for n in range(10)]
    config = compose(["+experiment=clinic", f"model.max_prompt_tokens={limit}"])
    parts = (config, examples, grammar, tokenizer, "train", Display("plain", 0, 0))
    try:
        everything = make_prompts(*parts)
    except UserError as error:
        with pytest.raises(UserError, match=str(error).split(";")[0]):
            prompt_table(*parts, known=10_000)
        return
    said = capsys.readouterr().out
    lazy = prompt_table(*parts, known=10_000)
    assert capsys.readouterr().out == said
    assert tuple(lazy) == everything
    assert [p.ids.tolist() for p in lazy] == [p.ids.tolist() for p in everything]
    assert len(lazy.kept) == (0 if limit == 5000 else len(everything))

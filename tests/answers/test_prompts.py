"""The words of a request, with and without the sentence that says which decimals are read."""

import pytest

from mar.answers.grammar import Grammar, parse
from mar.answers.prompts import build_prompt, fit_grammar, instructions, tokens_beside_question
from mar.answers.tokenizer import load_tokenizer
from mar.policy.sources import EMBEDDED
from mar.records import Example

GRAMMAR = Grammar("rlcr_multi", 2, thinking=False, other=True)
FORM = (
    "<answer1>...</answer1><confidence1>0.5</confidence1>"
    "<answer2>...</answer2><confidence2>0.5</confidence2><other>0.5</other>"
)
SHORT = f"""\
Give exactly 2 different diagnoses, most likely first. A confidence is the probability (0 to 1) \
that its answer is right, judged by its accuracy. In <other> give the probability that none is \
right. Write the bare diagnosis in an answer tag and nothing outside the tags:
{FORM}"""
EXPLAINED = f"""\
Give exactly 2 different diagnoses, most likely first. A confidence is the probability that its \
answer is right, a plain decimal from 0 to 1 such as 0.25, judged by its accuracy. In <other> give \
the probability that none is right, also as a plain decimal. Write the bare diagnosis in an answer \
tag and nothing outside the tags:
{FORM}"""


def test_the_request_in_both_wordings():
    """The first is what the embedded model was trained on: not a letter of it may change."""
    assert instructions(GRAMMAR, "diagnosis") == SHORT
    assert instructions(GRAMMAR, "diagnosis", explain_decimals=True) == EXPLAINED


def test_the_decimal_that_the_request_names_is_read():
    text = FORM.replace("0.5", "0.25").replace("...", "flu", 1).replace("...", "cold")
    assert parse(text, GRAMMAR).confidences == (0.25, 0.25)


@pytest.mark.parametrize("form", ["rlvr_multi", "rlvr_single"])
def test_where_there_are_no_confidences_nothing_is_said_of_decimals(form):
    grammar = Grammar(form, 2 if form == "rlvr_multi" else 1)
    assert instructions(grammar, "answer", explain_decimals=True) == instructions(grammar, "answer")


def test_the_bound_on_a_prompts_tokens_counts_the_longer_request():
    tokenizer = load_tokenizer(EMBEDDED)
    grammar = fit_grammar(GRAMMAR, tokenizer)
    example = Example("e", "t", "?", ())
    for explain in (False, True):
        prompt = build_prompt(example, grammar, tokenizer, "flu", explain_decimals=explain)
        beside = tokens_beside_question(grammar, tokenizer, "flu", "ranked", explain)
        assert (" such as 0.25" in prompt.text) is explain
        assert beside is not None and len(prompt.ids) <= beside + len("?")
    longer = tokens_beside_question(grammar, tokenizer, "flu", "ranked", True)
    assert longer > tokens_beside_question(grammar, tokenizer, "flu", "ranked", False)

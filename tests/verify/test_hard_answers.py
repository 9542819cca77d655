"""Answers that a quick look takes for a gold, and spellings that it does not."""

import pytest

from mar.records import Gold
from mar.verify.matching import text_verifier
from mar.verify.normaliser import normalise
from tests.helpers.hard_answers import RIGHT, WRONG


def test_the_list_is_long_and_has_no_case_twice():
    assert len({frozenset(pair) for pair in WRONG}) == len(WRONG) >= 150


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_no_wrong_answer_is_taken_for_a_gold(gold, answer):
    assert text_verifier(answer, [Gold(gold)]) == ()
    assert text_verifier(gold, [Gold(answer)]) == ()
    assert text_verifier(gold, [Gold(gold)]) == text_verifier(answer, [Gold(answer)]) == (0,)


@pytest.mark.parametrize("spellings", RIGHT)
def test_spellings_of_one_thing_are_one_answer(spellings):
    assert len({normalise(spelling) for spelling in spellings}) == 1

"""What no completion may earn, however it is written."""

import time

import pytest

from mar.answers.grammar import parse
from mar.answers.rewards import RewardSpec, reward
from mar.verify.matching import matching_increments, repeats
from tests.helpers.hostile_answers import (
    ANSWERS,
    GOLDS,
    GRAMMAR,
    HONEST,
    NUMBERS,
    RIGHT,
    SIGNS,
    SUM_RULE,
    write,
)


def earn(text, spec=None):
    parsed = parse(text, GRAMMAR)
    hits, _ = matching_increments(parsed.answers, GOLDS)
    return reward(
        parsed, hits, repeats(parsed.answers, GOLDS), len(GOLDS), GRAMMAR, spec or RewardSpec()
    )


def test_the_honest_one_is_paid():
    assert earn(HONEST).parts["coverage"] == 3
    assert earn(write(*RIGHT)).total == earn(HONEST).total


@pytest.mark.parametrize("name", ANSWERS)
def test_hostile_answers_earn_no_more_than_they_know(name):
    text, most = ANSWERS[name]
    began = time.perf_counter()
    earned = earn(text)
    assert earned.parts["coverage"] <= most
    assert earned.total <= 0.5 + most
    assert time.perf_counter() - began < 10
    if most == 0:  # nothing beats an honest "I do not know"
        assert earned.total <= earn(write("x", "y", "z", q=("0", "0", "0"))).total


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_makes_another_answer(name):
    """One answer that covers many numbers would be right too often."""
    assert matching_increments(SIGNS[name], NUMBERS)[0] == (0.0, 0.0, 0.0)
    plain = ("5 MG", "10 percent", "65 dollars")
    assert matching_increments(plain, NUMBERS)[0] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("confidences", "allowed"), SUM_RULE.items())
def test_the_sum_rule_has_a_tolerance_and_no_more(confidences, allowed):
    earned = earn(write(*RIGHT, q=confidences), RewardSpec(sum_rule=True))
    assert earned.parts["coverage"] == 3 * allowed
    assert earned.parts["sum_rule_breach"] == (not allowed)

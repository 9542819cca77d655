"""Answers that are mathematics: equal in value, one value each; a child that hangs is killed."""

import time

import pytest

from mar.records import Gold
from mar.verify import mathematics
from mar.verify.mathematics import math_verifier

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("\\frac12", "0.5"),
        ("1/2", "\\frac{1}{2}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("x = 3", "3"),
        ("$\\boxed{3}$", "3"),
        ("\\{2, 1\\}", "\\{1, 2\\}"),
        ("y=2x", "y = 2x"),
        ("sqrt(8)", "2\\sqrt{2}"),
        ("three", "3"),
    ],
)
def test_equal(answer, gold):
    assert math_verifier(answer, [Gold("7"), Gold("11", (gold,))]) == (1,)


@pytest.mark.parametrize(
    "answer",
    [
        "1, 2, 3",
        "3 = 4",
        "4 = 3",
        "x == 3",
        "4$ $3",
        "3 \\text{ or } 4",
        "3 or 4",
        "[0, 10]",
        "3 \\pm 0.5",
        "\\boxed{4}\\boxed{3}",
        "\\{1,2,3\\}",
        "3;4",
        "34",
        "x",
        "",
        "$",
        "\x00",
        "\ud800",
        "nan",
        "3\n4",
        "3" + "+0" * 150,
        "\\infty",
        "\\input{/etc/passwd}",
    ],
)
def test_several_values_or_none_are_no_gold(answer):
    assert math_verifier(answer, [Gold("3")]) == ()


def test_what_never_ends_is_killed_and_the_next_answer_is_read(monkeypatch):
    monkeypatch.setattr(mathematics, "WALL_S", 0.5)
    assert math_verifier("1", [Gold("1.0")]) == (0,)
    child = mathematics._child()
    began = time.perf_counter()
    assert math_verifier("9^{9^{9^{9}}}", [Gold("3")]) == ()
    assert time.perf_counter() - began < 5
    assert child.poll() is not None
    assert math_verifier("2/4", [Gold("1/2")]) == (0,)
    mathematics._child().kill()
    mathematics._child().wait()
    assert math_verifier("3/6", [Gold("1/2")]) == (0,)

"""Answers that are mathematics: equal in value, one value each; a child that hangs is killed."""

import time

import pytest

from mar.records import Example, Gold
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
        ("2x'+x'", "3x'"),
    ],
)
def test_equal(answer, gold):
    assert math_verifier(answer, [Gold("7"), Gold("11", (gold,))]) == (1,)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("-x", "x"),
        ("-\\frac{1}{2}", "\\frac{1}{2}"),
        ("\\sqrt{2}", "-\\sqrt{2}"),
        ("\\infty", "-\\infty"),
        ("-(x+1)", "x+1"),
        ("x y", "x - y"),
        ("2 x", "2-x"),
        ("a b", "a-b"),
        ("x'", "x"),
        ("f'(x)", "f(x)"),
        ("y''", "y'"),
        ("y^{\\prime}", "y"),
    ],
)
def test_a_sign_that_words_lose_is_a_part_of_a_formula(answer, gold):
    assert not math_verifier(answer, [Gold(gold)]) and not math_verifier(gold, [Gold(answer)])


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("Even", "even"), ("non-negative", "nonnegative"), ("- 5", "-5"), ("[0, 1)", "[0,1)")],
)
def test_words_and_the_same_letters_are_equal(answer, gold):
    assert math_verifier(answer, [Gold(gold)]) == (0,)


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


ENDLESS = "9^{9^{9^{9}}}"


def test_what_never_ends_is_killed_and_the_next_answer_is_read(monkeypatch):
    monkeypatch.setattr(mathematics, "WALL_S", 0.5)
    assert math_verifier("1", [Gold("1.0")]) == (0,)
    began = time.perf_counter()
    assert math_verifier(ENDLESS, [Gold("3")]) == ()
    assert math_verifier(ENDLESS, [Gold("3")]) == ()
    assert time.perf_counter() - began < 5
    assert math_verifier("2/4", [Gold("1/2")]) == (0,)
    child = mathematics._take_child()
    child.kill()
    child.wait()
    mathematics._idle.put(child)
    assert math_verifier("3/6", [Gold("1/2")]) == (0,)


@pytest.mark.slow
def test_answers_of_a_step_share_a_budget_and_the_slow_cost_the_others_nothing(monkeypatch):
    """Ten that never end come first: the right ones behind them are still compared."""
    mathematics._verdicts.clear()
    math_verifier("1", [Gold("1.0")])
    monkeypatch.setattr(mathematics, "MOMENT_S", 0.3)
    # Each that is killed costs a child's imports, which a busy machine takes many seconds for.
    monkeypatch.setattr(mathematics, "STEP_S", 120.0)
    example = Example("q", "test", "?", (Gold("1/2"), Gold("7")))
    slow = [f"{n}^{{9^{{9^{{9}}}}}}" for n in range(11, 13)]
    right = ["0.5", "2/4", "\\frac{3}{6}", "14/2"]
    began = time.perf_counter()
    mathematics.compare_ahead([(example, answer) for answer in slow + right])
    assert time.perf_counter() - began < 150

    def forbidden(*_):
        raise AssertionError("asked again")

    monkeypatch.setattr(mathematics, "_ask", forbidden)
    assert [math_verifier(a, example.golds) for a in right] == [(0,), (0,), (0,), (1,)]
    assert [math_verifier(a, example.golds[1:]) for a in right] == [(), (), (), (0,)]
    assert [math_verifier(a, example.golds) for a in slow] == [(), ()]


def test_what_is_left_when_the_budget_ends_equals_none(monkeypatch):
    mathematics._verdicts.clear()
    monkeypatch.setattr(mathematics, "STEP_S", 0.0)
    example = Example("q", "test", "?", (Gold("1/2"),))
    mathematics.compare_ahead([(example, "4/8")])
    assert math_verifier("4/8", example.golds) == ()
    # the next step asks again
    monkeypatch.setattr(mathematics, "STEP_S", 30.0)
    mathematics.compare_ahead([(example, "4/8")])
    assert math_verifier("4/8", example.golds) == (0,)

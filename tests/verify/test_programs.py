"""K programs in a completion.

Coverage counts distinct correct ones, and a breakdown of the sandbox leaves the completion out.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from mar.answers.grammar import Grammar, render
from mar.answers.rewards import RewardSpec
from mar.errors import UserError
from mar.records import Completion, Example, Prompt
from mar.sample.rollout import Scorer, judge_groups, judged_only
from mar.verify import programs
from mar.verify.programs import ProgramRunner, Verdict, parse_tests
from tests.helpers.hostile_programs import HONEST, TESTS

GRAMMAR = Grammar("rlvr_multi", 3, thinking=False)
TWICE = "def double(x):\n    return 2 * x"
RENAMED = HONEST.replace("x", "y")
WRONG = "def double(x): return x"


def judge(groups, verifier=None, spec=None):
    """Rollouts of completions given as lists of three programs; decoded character by character."""
    prompt = Prompt(Example("q", "test", "?", (), truth="rule", tests=TESTS), "?", (1,))
    zeros = np.zeros(1, np.float32)

    def completion(answers):
        ids = np.array([ord(c) for c in render(GRAMMAR, answers)] + [0])
        return Completion(0, ids, zeros, zeros, "stop")

    spec = spec or RewardSpec(brier="none")
    groups = [[completion(answers) for answers in group] for group in groups]
    return judge_groups(
        [prompt] * len(groups),
        groups,
        Scorer(GRAMMAR, spec, verifier or ProgramRunner(), lambda ids: "".join(map(chr, ids))),
    )


@pytest.mark.skipif(
    not shutil.which("bwrap"), reason="no bubblewrap here (apt-get install bubblewrap)"
)
def test_distinct_correct_programs_are_counted():
    cases = {
        (HONEST, TWICE, WRONG): ((1, 1, 0), (False, False, False)),
        (HONEST, RENAMED, TWICE): ((1, 0, 1), (False, True, False)),
        (WRONG, WRONG, HONEST): ((0, 0, 1), (False, True, False)),
        ("no program", "while True", HONEST): ((0, 0, 1), (False, False, False)),
    }
    (group,) = judge([list(map(list, cases))])
    assert [(r.hits, r.repeated) for r in group] == list(cases.values())
    assert [r.total for r in group] == [0.5 + sum(hits) for hits, _ in cases.values()]
    assert not any(r.unjudged for r in group)


def breaks_down(program, tests, unsafe):
    return Verdict("infrastructure_error" if "2 *" in program else "passed", program)


def test_a_breakdown_leaves_the_completion_out(monkeypatch):
    monkeypatch.setattr(programs, "verify_program", breaks_down)
    a = [HONEST, RENAMED, WRONG]
    b = [HONEST, TWICE, WRONG]
    c = [TWICE, TWICE, TWICE]
    groups = judge([[a, b, a], [a, b], [c, c], [a]])
    assert [[r.unjudged for r in group] for group in groups] == [[0, 1, 0], [0, 1], [1, 1], [0]]
    kept = judged_only(groups)
    assert [[r.answers for r in group] for group in kept] == [[tuple(a), tuple(a)], [tuple(a)]]
    with pytest.raises(UserError, match="sandbox"):
        judged_only(groups[2:3])


def test_one_run_per_distinct_program(monkeypatch):
    asked = []
    monkeypatch.setattr(
        programs, "verify_program", lambda *job: asked.append(job) or breaks_down(*job)
    )
    judge([[[HONEST, RENAMED, WRONG]] * 2] * 3)
    judge([[[HONEST, RENAMED, WRONG]]], ProgramRunner(unsafe=True))
    assert sorted(asked) == sorted(
        (p, TESTS, unsafe) for p in (HONEST, RENAMED, WRONG) for unsafe in (False, True)
    )


def test_what_began_early_runs_once_and_a_breakdown_is_tried_again(monkeypatch):
    outcomes = iter(["infrastructure_error", "passed", "passed"])
    monkeypatch.setattr(
        programs, "verify_program", lambda program, *_: Verdict(next(outcomes), program)
    )
    runner, example = ProgramRunner(), Example("q", "test", "?", (), truth="rule", tests=TESTS)
    runner.submit([(example, HONEST)])
    assert [judge([[[HONEST] * 3]], runner)[0][0].unjudged for _ in range(2)] == [1, 0]
    assert next(outcomes) == "passed", "two runs"


@pytest.mark.parametrize("coverage", ["fraction_golds", "fraction_answers"])
def test_full_marks_are_k_distinct_programs(monkeypatch, coverage):
    monkeypatch.setattr(programs, "verify_program", lambda program, *_: Verdict("passed", program))
    ((whole, part),) = judge(
        [[[HONEST, TWICE, WRONG], [HONEST, HONEST, TWICE]]], spec=RewardSpec(coverage, "none")
    )
    assert (whole.parts["coverage"], part.parts["coverage"]) == (1, pytest.approx(2 / 3))


def test_a_test_with_a_key_that_python_refuses_is_a_fault_of_its_row():
    with pytest.raises(UserError, match="compares the program with itself"):
        parse_tests(("assert f(1) == {[1]: 2}",))


def test_groups_that_shrink_too_far_are_left_out():
    whole, broken = (SimpleNamespace(unjudged=n) for n in (0, 1))
    groups = [[whole] * 4, [whole] * 3 + [broken], [whole, broken]]
    assert [len(group) for group in judged_only(groups)] == [4, 3]
    assert [len(group) for group in judged_only(groups, 4)] == [4]
    assert judged_only([[whole]]) == [[whole]]
    with pytest.raises(UserError, match="stopped working"):
        judged_only([[broken, broken]])

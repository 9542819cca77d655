"""Answers that are programs: which of K programs are right and distinct (tasks whose `truth` is `rule`).

A test is taken apart: the calls of the program under test run in the sandbox, everything else of the assertion (the
expected value, the comparison) stays here, on plain data. A program never sees what it is compared with, and an
object that equals everything does not get out.
"""

import ast
import math
import operator
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mar.errors import UserError
from mar.records import Example
from mar.verify.sandbox import run_program

Check = Callable[[Sequence[Any]], Any]  # from the values of the probes

INFRASTRUCTURE = "infrastructure_error"

Tests = tuple[str, ...]

OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "math.isclose": math.isclose, "isclose": math.isclose, "sys.getsizeof": sys.getsizeof, "set": set, "sorted": sorted,
}  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """A test suite taken apart: trusted set-up code, the probes to evaluate inside, and what must hold of their values."""

    setup: str
    probes: tuple[str, ...]
    checks: tuple[Check, ...]

    def passed(self, values: Sequence[Any]) -> bool:
        try:
            return all(check(values) for check in self.checks)
        except (
            TypeError,
            ValueError,
            ArithmeticError,
            RecursionError,
        ):  # such as a list where a number is compared
            return False


def _take_apart(node: ast.expr, probes: list[str]) -> Check:
    """The part of an assertion that is computed here; the rest becomes probes."""
    if isinstance(node, ast.Compare) and all(type(op) in OPERATORS for op in node.ops):
        sides, pairs = [], []
        for side in (node.left, *node.comparators):
            before = len(probes)
            sides.append(_take_apart(side, probes))
            pairs.append(len(probes) > before)
        if sum(pairs) > 1:
            raise UserError(
                f"the test {ast.unparse(node)!r} compares the program with itself: give the expected value"
            )
        steps = [
            (OPERATORS[type(op)], a, b)
            for op, a, b in zip(node.ops, sides, sides[1:], strict=False)
        ]
        return lambda values: all(op(a(values), b(values)) for op, a, b in steps)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _take_apart(node.operand, probes)
        return lambda values: not inner(values)
    if isinstance(node, ast.Call) and ast.unparse(node.func) in FUNCTIONS:
        function, given = (
            FUNCTIONS[ast.unparse(node.func)],
            [_take_apart(a, probes) for a in node.args],
        )
        named = {k.arg or "": _take_apart(k.value, probes) for k in node.keywords}
        return lambda values: function(
            *(a(values) for a in given), **{k: a(values) for k, a in named.items()}
        )
    try:
        constant = ast.literal_eval(node)
        return lambda values: constant
    except (ValueError, TypeError):  # such as a list as a key
        probes.append(ast.unparse(node))
        return operator.itemgetter(len(probes) - 1)


@lru_cache(maxsize=1 << 12)
def parse_tests(tests: Tests) -> Suite:
    """A suite from its statements: assertions are tests, anything else is set-up that runs after the program.

    Raises UserError for a test that no value of the program enters, or that has nothing else to compare it with.
    """
    setup, probes, checks = [], list[str](), []
    for text in tests:
        try:
            body = ast.parse(text).body
        except SyntaxError as error:
            raise UserError(
                f"the test {text!r} is no Python ({error.msg}): mend or remove its row"
            ) from None
        for statement in body:
            if not isinstance(statement, ast.Assert):
                setup.append(ast.unparse(statement))
                continue
            before = len(probes)
            checks.append(_take_apart(statement.test, probes))
            if len(probes) == before:
                raise UserError(
                    f"the test {text!r} asks nothing of the program: mend or remove its row"
                )
    if not checks:
        raise UserError("an item whose answers are programs has no assertion: remove its row")
    return Suite("\n".join(setup), tuple(probes), tuple(checks))


@dataclass(frozen=True)
class Verdict:
    """`outcome`: passed, failed, timeout or infrastructure_error. `key`: equal for programs that differ in names only."""

    outcome: str
    key: str


def unfenced(answer: str) -> str:
    """The source in an answer: what stands inside one Markdown fence, where there is one."""
    lines = answer.strip().splitlines()
    fenced = len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```"
    return "\n".join(lines[1:-1]) if fenced else answer


def verify_program(program: str, tests: Tests, unsafe: bool = False) -> Verdict:
    """Run one program against its tests. A sandbox that did not start is tried once more."""
    suite, program = parse_tests(tests), unfenced(program)
    reply = run_program(program, suite.probes, suite.setup, unsafe)
    if reply.outcome == INFRASTRUCTURE:
        reply = run_program(program, suite.probes, suite.setup, unsafe)
    key = reply.key or program
    if reply.outcome != "returned":
        return Verdict(reply.outcome, key)
    passed = len(reply.values) == len(suite.probes) and suite.passed(reply.values)
    return Verdict("passed" if passed else "failed", key)


@dataclass(frozen=True, eq=False)
class ProgramRunner:
    """Runs programs side by side on all cores, each distinct (program, tests) once. `ask` does not wait, so that programs run while other completions
    are still being sampled; `verdict` does. `unsafe`: without a sandbox."""

    unsafe: bool = False
    running: dict[tuple[str, Tests], Future[Verdict]] = field(default_factory=dict)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(os.cpu_count()))

    def submit(self, answers: Iterable[tuple[Example, str]]) -> None:
        for example, program in answers:
            if (program, example.tests) not in self.running:
                self.running[program, example.tests] = self.pool.submit(
                    verify_program, program, example.tests, self.unsafe
                )

    def verdict(self, example: Example, program: str) -> Verdict:
        return self.running[program, example.tests].result()

    def has_verdict(self, example: Example, program: str) -> bool:
        return self.verdict(example, program).outcome != INFRASTRUCTURE

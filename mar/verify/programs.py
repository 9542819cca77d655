"""Answers that are programs: which of K programs are right and distinct.

For tasks whose `Example.truth` is `rule`. A test such as

    assert double(2) == 4

is taken apart: the call of the program, `double(2)`, is a *probe* and runs in the sandbox. All
else of the assertion, the 4 and the `==`, stays here and sees the probe's value as plain data. So
a program never sees what it is compared with, and an object that equals everything does not get
out.
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

# statements: assertions, and set-up code for them
Tests = tuple[str, ...]

# a part of an assertion, as a function of the values of the probes
Check = Callable[[Sequence[Any]], Any]

INFRASTRUCTURE = "infrastructure_error"

# what an assertion may compute here
OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "math.isclose": math.isclose,
    "isclose": math.isclose,
    "sys.getsizeof": sys.getsizeof,
    "set": set,
    "sorted": sorted,
}


@dataclass(frozen=True)
class Suite:
    """Tests, taken apart."""

    # trusted code that runs after the program
    setup: str
    # expressions to evaluate in the sandbox
    probes: tuple[str, ...]
    # what must hold of their values
    checks: tuple[Check, ...]

    def passed(self, values: Sequence[Any]) -> bool:
        try:
            return all(check(values) for check in self.checks)
        except (TypeError, ValueError, ArithmeticError, RecursionError):
            # such as a list where a number is compared
            return False


def _check_of(node: ast.expr, probes: list[str]) -> Check:
    """A part of an assertion as a function; appends to `probes` what has to run in the sandbox."""
    if isinstance(node, ast.Compare) and all(type(op) in OPERATORS for op in node.ops):
        return _comparison(node, probes)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        operand = _check_of(node.operand, probes)
        return lambda values: not operand(values)
    if isinstance(node, ast.Call) and ast.unparse(node.func) in FUNCTIONS:
        return _call(node, probes)
    try:
        constant = ast.literal_eval(node)
    except (ValueError, TypeError):
        # no constant: a call of the program, or what Python refuses, such as a list as a key
        probes.append(ast.unparse(node))
        return operator.itemgetter(len(probes) - 1)
    return lambda values: constant


def _comparison(node: ast.Compare, probes: list[str]) -> Check:
    """A chain `a == b < c`. Only one side of it may come from the program."""
    sides = []
    num_of_program = 0
    for side in (node.left, *node.comparators):
        before = len(probes)
        sides.append(_check_of(side, probes))
        num_of_program += len(probes) > before
    if num_of_program > 1:
        raise UserError(
            f"the test {ast.unparse(node)!r} compares the program with itself: "
            "give the expected value"
        )
    operators = [OPERATORS[type(op)] for op in node.ops]
    steps = list(zip(operators, sides[:-1], sides[1:], strict=True))
    return lambda values: all(
        compare(left(values), right(values)) for compare, left, right in steps
    )


def _call(node: ast.Call, probes: list[str]) -> Check:
    """A call of one of FUNCTIONS."""
    function = FUNCTIONS[ast.unparse(node.func)]
    positional = [_check_of(argument, probes) for argument in node.args]
    named = {keyword.arg or "": _check_of(keyword.value, probes) for keyword in node.keywords}

    def call(values: Sequence[Any]) -> Any:
        arguments = [argument(values) for argument in positional]
        keywords = {name: argument(values) for name, argument in named.items()}
        return function(*arguments, **keywords)

    return call


@lru_cache(maxsize=1 << 12)
def parse_tests(tests: Tests) -> Suite:
    """Take tests apart: assertions become checks, anything else is set-up code.

    Raises UserError for a test that no value of the program enters, or that has nothing else to
    compare it with.
    """
    setup: list[str] = []
    probes: list[str] = []
    checks: list[Check] = []
    for text in tests:
        try:
            statements = ast.parse(text).body
        except SyntaxError as error:
            raise UserError(
                f"the test {text!r} is no Python ({error.msg}): mend or remove its row"
            ) from None
        for statement in statements:
            if not isinstance(statement, ast.Assert):
                setup.append(ast.unparse(statement))
                continue
            before = len(probes)
            checks.append(_check_of(statement.test, probes))
            if len(probes) == before:
                raise UserError(
                    f"the test {text!r} asks nothing of the program: mend or remove its row"
                )
    if not checks:
        raise UserError("an item whose answers are programs has no assertion: remove its row")
    return Suite("\n".join(setup), tuple(probes), tuple(checks))


@dataclass(frozen=True)
class Verdict:
    """What the tests say of a program."""

    # passed, failed, timeout or infrastructure_error
    outcome: str
    # equal for programs that differ in names, comments and the like alone
    key: str


def without_fence(answer: str) -> str:
    """The source in an answer: what stands inside one Markdown fence, where there is one."""
    lines = answer.strip().splitlines()
    fenced = len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```"
    return "\n".join(lines[1:-1]) if fenced else answer


def verify_program(program: str, tests: Tests, unsafe: bool = False) -> Verdict:
    """Run one program against its tests. A sandbox that did not start is tried once more."""
    suite = parse_tests(tests)
    source = without_fence(program)
    reply = run_program(source, suite.probes, suite.setup, unsafe)
    if reply.outcome == INFRASTRUCTURE:
        reply = run_program(source, suite.probes, suite.setup, unsafe)
    key = reply.key or source
    if reply.outcome != "returned":
        return Verdict(reply.outcome, key)
    passed = len(reply.values) == len(suite.probes) and suite.passed(reply.values)
    return Verdict("passed" if passed else "failed", key)


@dataclass(frozen=True, eq=False)
class ProgramRunner:
    """Runs programs side by side on all cores, each distinct (program, tests) once.

    `submit` does not wait, so that programs run while other completions are still being sampled;
    `verdict` does.
    """

    # without a sandbox
    unsafe: bool = False
    running: dict[tuple[str, Tests], Future[Verdict]] = field(default_factory=dict)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(os.cpu_count()))

    def submit(self, answers: Iterable[tuple[Example, str]]) -> None:
        """Begin to run the programs that are not running yet."""
        for example, program in answers:
            if (program, example.tests) in self.running:
                continue
            self.running[program, example.tests] = self.pool.submit(
                verify_program, program, example.tests, self.unsafe
            )

    def verdict(self, example: Example, program: str) -> Verdict:
        """Of a program that was submitted."""
        return self.running[program, example.tests].result()

    def has_verdict(self, example: Example, program: str) -> bool:
        """False where the sandbox broke down, which says nothing about the program."""
        return self.verdict(example, program).outcome != INFRASTRUCTURE

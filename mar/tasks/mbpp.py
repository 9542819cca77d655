"""MBPP (Austin et al. 2021): a task in words, and tests that a Python function has to pass.

Every correct program is right. Rows are {text or prompt, test_list, test_setup_code or
test_imports}. The first test is shown, for name and signature; the others decide unseen. Each
distinct program that passes is a hit, so coverage is the number of DISTINCT correct programs.
Rows whose tests leave nothing unseen, or accept a constant, are dropped and counted.
"""

import ast
from collections.abc import Sequence

from mar.errors import UserError
from mar.records import Example, Gold
from mar.tasks.loading import Candidate, Row, example_id, required_text
from mar.verify.programs import Suite, parse_tests

NO_VALUE = "tests that no plain value can be compared with"
ALL_SHOWN = "no test but the one in the prompt"
ONE_CONSTANT = "tests that one constant passes"


def read(row: Row, where: str) -> Candidate:
    """One row. Raises UserError with position and key where it is malformed."""
    text = required_text(row, "text" if "text" in row else "prompt", where)
    tests = row.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise UserError(f"{where}: 'test_list' must be a list of asserts that is not empty")
    imports = row.get("test_imports") or []
    if not isinstance(imports, list):
        raise UserError(f"{where}: 'test_imports' must be a list of statements")

    setup = "\n".join([*imports, row.get("test_setup_code") or ""]).strip()
    statements = (setup, *tests) if setup else tuple(tests)
    question = (
        f"{text}\nFor example:\n{tests[0].strip()}\n"
        "Answer with the Python source of the whole function."
    )
    example = Example(
        id=example_id(row, "task_id", "mbpp", f"{text} {tests[0]}"),
        task="mbpp",
        question=question,
        golds=(Gold("a program that passes its tests"),),
        truth="rule",
        multi_label=True,
        tests=statements,
    )
    return Candidate(example, f"{text}\n{tests[0]}", _fault(statements, tests))


def _fault(statements: tuple[str, ...], tests: Sequence[str]) -> str | None:
    """Why these tests do not tell a right program from a wrong one; None: they do."""
    try:
        suite = parse_tests(statements)
    except UserError:
        return NO_VALUE
    if len({ast.unparse(ast.parse(test)) for test in tests}) == 1:
        return ALL_SHOWN
    if _one_constant_passes(suite, tests):
        return ONE_CONSTANT
    return None


def _one_constant_passes(suite: Suite, tests: Sequence[str]) -> bool:
    """Whether a function that always returns the same value passes: one that the tests mention, or
    a truth value."""
    constants: list[object] = [True, False, None]
    for test in tests:
        for node in ast.walk(ast.parse(test)):
            if not isinstance(node, ast.expr):
                continue
            try:
                constants.append(ast.literal_eval(node))
            except (ValueError, TypeError):
                continue  # no constant
    return any(suite.passed([constant] * len(suite.probes)) for constant in constants)

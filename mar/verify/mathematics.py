"""Answers that are mathematics (`data.verifier=math`).

math-verify says whether two formulas are equal, in a child process that is killed where it does
not come back. An answer names one value: lists, several formulas and chains of equations are no
gold unless the gold is one.
"""

import importlib.util
import json
import re
import select
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache

from mar.errors import UserError
from mar.records import Gold
from mar.verify.matching import text_verifier

WALL_S = 3.0  # of one answer
START_S = 60.0  # of the child's imports

MAX_ANSWER = 300  # characters

# reads [answer, names of each gold] a line, writes the indices of the golds that are equal
CHILD = """
import json, logging, resource, sys
from math_verify import LatexExtractionConfig, parse, verify

logging.disable()
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

def read(text):
    return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)

print("ready", flush=True)
for line in sys.stdin:
    answer, golds = json.loads(line)
    said = read(answer)
    equal = []
    for index, names in enumerate(golds):
        if any(verify(read(name), said, timeout_seconds=None) for name in names):
            equal.append(index)
    print(json.dumps(equal), flush=True)
"""


def require_math_verify() -> None:
    """UserError where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "data.verifier=math needs the package math-verify: pip install -e '.[eval]'"
        )


@lru_cache(maxsize=1)
def _child() -> subprocess.Popen[str]:
    """The process that waits for questions. It ends with ours, whose pipe it reads."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if _next_line(child, START_S) != "ready\n":
        raise UserError("math-verify does not start: run python -c 'import math_verify'")
    return child


def _next_line(child: subprocess.Popen[str], wall_s: float) -> str:
    """What the child says next. "" where it says nothing in time; then it is killed."""
    assert child.stdout
    line = ""
    in_time, _, _ = select.select([child.stdout], [], [], wall_s)
    if in_time:
        line = child.stdout.readline()
    if not line:
        child.kill()
        child.wait()
    return line


def _bare(text: str) -> str:
    """A formula without the dollar signs and the box around it."""
    text = text.strip().strip("$").strip()
    boxed = re.fullmatch(r"\\boxed\{([^{}]*)\}", text)
    return boxed[1] if boxed else text


@lru_cache(maxsize=1 << 16)
def _equal(answer: str, names_of_golds: tuple[tuple[str, ...], ...]) -> tuple[int, ...]:
    """The golds that have a name of the same value as the answer."""
    was_killed = _child().poll() is not None
    if was_killed:
        _child.cache_clear()
    child = _child()
    assert child.stdin
    child.stdin.write(json.dumps([answer, names_of_golds]) + "\n")
    child.stdin.flush()
    return tuple(json.loads(_next_line(child, WALL_S) or "[]"))


def math_verifier(answer: str, golds: Sequence[Gold]) -> tuple[int, ...]:
    """The golds that the answer equals, in words or in value.

    What math-verify cannot decide in time equals none.
    """
    names_of_golds = tuple(
        tuple(_bare(name) for name in (gold.name, *gold.aliases)) for gold in golds
    )
    # `x = 3` says 3
    said = re.sub(r"^[A-Za-z]\s*=(?!=)", "", _bare(answer)).strip()
    golds_have_equations = any("=" in name for names in names_of_golds for name in names)
    several_values = "$" in said or ("=" in said and not golds_have_equations)
    equal: tuple[int, ...] = ()
    if not several_values and 0 < len(said) <= MAX_ANSWER:
        equal = _equal(said, names_of_golds)
    return tuple(sorted({*equal, *text_verifier(answer, golds)}))

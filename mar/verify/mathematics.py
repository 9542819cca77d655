"""Answers that are mathematics (data.verifier=math): math-verify says whether two are equal, in a child process that is killed where it does not
come back. An answer names one value: lists, several formulas and chains of equations are no gold unless the gold is one."""

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

WALL_S, START_S = 3.0, 60.0  # of one comparison, of the child's imports

MAX_ANSWER = 300  # characters

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
    equal = [any(verify(read(name), said, timeout_seconds=None) for name in names) for names in golds]
    print(json.dumps([i for i, same in enumerate(equal) if same]), flush=True)
"""


def require_math_verify() -> None:
    """UserError where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "data.verifier=math needs the package math-verify: pip install -e '.[eval]'"
        )


@lru_cache(maxsize=1)
def _child() -> subprocess.Popen[str]:
    """The one that waits for questions; it ends with this process, whose pipe it reads."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )
    if _line(child, START_S) != "ready\n":
        raise UserError("math-verify does not start: run python -c 'import math_verify'")
    return child


def _line(child: subprocess.Popen[str], wall_s: float) -> str:
    """Its next line, "" where there is none in time; then it is killed."""
    assert child.stdout
    line = child.stdout.readline() if select.select([child.stdout], [], [], wall_s)[0] else ""
    if not line:
        child.kill()
        child.wait()
    return line


def _bare(text: str) -> str:
    """A formula without the signs around it."""
    text = text.strip().strip("$").strip()
    return boxed[1] if (boxed := re.fullmatch(r"\\boxed\{([^{}]*)\}", text)) else text


@lru_cache(maxsize=1 << 16)
def _equal(answer: str, golds: tuple[tuple[str, ...], ...]) -> tuple[int, ...]:
    if _child().poll() is not None:  # it was killed
        _child.cache_clear()
    child = _child()
    assert child.stdin
    child.stdin.write(json.dumps([answer, golds]) + "\n")
    child.stdin.flush()
    return tuple(json.loads(_line(child, WALL_S) or "[]"))


def math_verifier(answer: str, golds: Sequence[Gold]) -> tuple[int, ...]:
    """The golds that the answer equals, in words or in value. What math-verify cannot decide in time is none."""
    named = tuple(tuple(map(_bare, (gold.name, *gold.aliases))) for gold in golds)
    said = re.sub(r"^[A-Za-z]\s*=(?!=)", "", _bare(answer)).strip()  # x = 3
    several = "$" in said or (
        "=" in said and not any("=" in name for names in named for name in names)
    )
    found = () if several or not 0 < len(said) <= MAX_ANSWER else _equal(said, named)
    return tuple(sorted({*found, *text_verifier(answer, golds)}))

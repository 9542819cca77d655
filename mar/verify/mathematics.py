"""Answers that are mathematics (`data.verifier=math`).

math-verify says whether two formulas are equal, in child processes that are killed where they do
not come back. The answers of a step are compared side by side and within one budget of time: first
all of them for a moment each, so that a few that never end cost the others nothing, then what is
left for as long as one answer may take. An answer names one value: lists, several formulas and
chains of equations are no gold unless the gold is one.
"""

import importlib.util
import json
import os
import queue
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mar.errors import UserError
from mar.records import Example, Gold
from mar.verify.matching import text_verifier

MOMENT_S = 0.5  # of one answer, at first
WALL_S = 3.0  # of one answer
STEP_S = 60.0  # of all answers of a step together
START_S = 60.0  # of the child's imports

MAX_ANSWER = 300  # characters

MAX_REMEMBERED = 1 << 16  # verdicts
NUM_CHILDREN = max(1, min(8, os.cpu_count() or 1))

# an answer, and the names of one gold
Case = tuple[str, tuple[str, ...]]

# reads [answer, names of each gold] a line, writes the indices of the golds that are equal
CHILD = """
import json, logging, resource, sys
from math_verify import LatexExtractionConfig, parse, verify

logging.disable()
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

def read(text):
    return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)

def primes(text):
    return text.count("'") + text.count("prime")

def is_equal(name, answer, said):
    # math-verify reads x' as x
    return primes(name) == primes(answer) and verify(read(name), said, timeout_seconds=None)

print("ready", flush=True)
for line in sys.stdin:
    answer, golds = json.loads(line)
    said = read(answer)
    equal = []
    for index, names in enumerate(golds):
        if any(is_equal(name, answer, said) for name in names):
            equal.append(index)
    print(json.dumps(equal), flush=True)
"""


def require_math_verify() -> None:
    """UserError where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "data.verifier=math needs the package math-verify: pip install -e '.[eval]'"
        )


# Those that wait for a question; they end with us, whose pipes they read
_idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()

# whether an answer equals a gold, of what was compared in time or is given up
_verdicts: dict[Case, bool] = {}


# of those, what no time was left for: the next step asks again
_postponed: list[Case] = []


def _start() -> subprocess.Popen[str]:
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


def _take_child() -> subprocess.Popen[str]:
    """A child that lives, started where none is idle."""
    while True:
        try:
            child = _idle.get_nowait()
        except queue.Empty:
            return _start()
        if child.poll() is None:
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


def _ask(said: str, golds: Sequence[tuple[str, ...]], wall_s: float) -> bool:
    """Compare an answer with golds, given by their names. False: it did not end in time."""
    child = _take_child()
    assert child.stdin
    child.stdin.write(json.dumps([said, golds]) + "\n")
    child.stdin.flush()
    line = _next_line(child, wall_s)
    if not line:
        return False
    _idle.put(child)
    equal = json.loads(line)
    for index, names in enumerate(golds):
        _verdicts[said, names] = index in equal
    return True


def _give_up(said: str, golds: Sequence[tuple[str, ...]]) -> list[Case]:
    cases = [(said, names) for names in golds]
    _verdicts.update(dict.fromkeys(cases, False))
    return cases


def _question(answer: str, golds: Sequence[Gold]) -> tuple[str, list[tuple[str, ...]]]:
    """What an answer says as one formula ("" where it says none), and the names of the golds."""
    names_of_golds = [tuple(_bare(name) for name in (gold.name, *gold.aliases)) for gold in golds]
    # `x = 3` says 3
    said = re.sub(r"^[A-Za-z]\s*=(?!=)", "", _bare(answer)).strip()
    golds_have_equations = any("=" in name for names in names_of_golds for name in names)
    several_values = "$" in said or ("=" in said and not golds_have_equations)
    if several_values or len(said) > MAX_ANSWER:
        said = ""
    return said, names_of_golds


def compare_ahead(answers: Iterable[tuple[Example, str]]) -> None:
    """Compare the answers of a step side by side, in STEP_S seconds; `math_verifier` then knows.

    What has not been compared by then equals no gold, as what never ends does.
    """
    while _postponed:
        _verdicts.pop(_postponed.pop(), None)
    if len(_verdicts) > MAX_REMEMBERED:
        _verdicts.clear()
    waiting: dict[tuple[str, tuple[tuple[str, ...], ...]], None] = {}
    for example, answer in answers:
        said, golds = _question(answer, example.golds)
        new = tuple(names for names in golds if (said, names) not in _verdicts)
        if said and new:
            waiting[said, new] = None

    until = time.monotonic() + STEP_S
    for wall_s in (MOMENT_S, WALL_S):

        def compare(question: tuple[str, tuple[tuple[str, ...], ...]], limit: float) -> bool:
            left = until - time.monotonic()
            return left > 0 and _ask(*question, min(limit, left))

        questions = list(waiting)
        with ThreadPoolExecutor(NUM_CHILDREN) as pool:
            in_time = list(pool.map(compare, questions, [wall_s] * len(questions)))
        for question, ended in zip(questions, in_time, strict=True):
            if ended:
                del waiting[question]
    no_time_left = time.monotonic() >= until
    for said, golds_left in waiting:
        given_up = _give_up(said, golds_left)
        if no_time_left:
            _postponed.extend(given_up)


# words and numbers, in which the normaliser drops nothing that a formula means: in -x, 2-x and
# \\frac it would
_PLAIN = re.compile(r"\s*(?:-(?=\.?[0-9]))?(?:[^\W_]|[\s.,:%])*")
_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")


def _is_plain(text: str) -> bool:
    return bool(_PLAIN.fullmatch(_HYPHEN.sub(" ", text)))


def _equal_in_words(answer: str, golds: Sequence[Gold]) -> set[int]:
    """The golds that are the answer to the letter, and those in words where it is in words too."""
    said = _bare(answer)
    compact = "".join(said.split())
    found: set[int] = set()
    for index, gold in enumerate(golds):
        names = [_bare(name) for name in (gold.name, *gold.aliases)]
        if compact and compact in ("".join(name.split()) for name in names):
            found.add(index)
        plain = [name for name in names if _is_plain(name)]
        if plain and _is_plain(said) and text_verifier(said, [Gold(plain[0], tuple(plain[1:]))]):
            found.add(index)
    return found


def math_verifier(answer: str, golds: Sequence[Gold]) -> tuple[int, ...]:
    """The golds that the answer equals, in words or in value.

    What math-verify cannot decide in time equals none.
    """
    said, golds_by_name = _question(answer, golds)
    new = [names for names in golds_by_name if said and (said, names) not in _verdicts]
    if new and not _ask(said, new, WALL_S):
        _give_up(said, new)
    equal = [
        index for index, names in enumerate(golds_by_name) if _verdicts.get((said, names), False)
    ]
    return tuple(sorted({*equal, *_equal_in_words(answer, golds)}))

"""Programs of the model: what they earn, what they reach, and that we survive all of it."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mar.errors import UserError
from mar.records import Example
from mar.verify import programs, sandbox
from mar.verify.program_form import canonical
from mar.verify.programs import ProgramRunner, Verdict, parse_tests, verify_program
from mar.verify.sandbox import require_sandbox, run_program
from mar.verify.syscall_filter import syscall_filter
from tests.helpers.hostile_programs import (
    DISTINCT,
    FORMULA,
    HOLD,
    HONEST,
    LOOP,
    MEMORY,
    OTHER_WAYS,
    PROBES,
    PROGRAMS,
    REFUSED_MEMORY,
    REORDERED,
    REWRITES,
    TESTS,
)

needs_bubblewrap = pytest.mark.skipif(
    not shutil.which("bwrap"), reason="no bubblewrap here (apt-get install bubblewrap)"
)


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_S", 3.0)
    monkeypatch.setitem(sandbox.LIMITS, "RLIMIT_CPU", 2)


@needs_bubblewrap
@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_programs_earn_nothing(name):
    began = time.monotonic()
    verdict = verify_program(PROGRAMS[name], TESTS)
    # never an infrastructure error: a program cannot choose not to be graded
    assert verdict.outcome in ("failed", "timeout"), verdict
    assert time.monotonic() - began < 30


@needs_bubblewrap
@pytest.mark.parametrize("name", PROBES)
def test_the_sandbox_shows_nothing_of_the_host(name):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        known = {
            "PORT": server.getsockname()[1],
            "PID": os.getpid(),
            "HERE": os.path.dirname(__file__),
            "PREFIX": sys.base_prefix,
        }
        setup = "".join(f"{key} = {value!r}\n" for key, value in known.items())
        reply = run_program(setup + PROBES[name], ["bool(found)"])
    assert reply.values == (False,), reply


@needs_bubblewrap
@pytest.mark.skipif(
    not os.path.exists("/usr/bin/python3"), reason="no Python of the distribution here"
)
def test_a_distributions_own_python_serves_too(monkeypatch):
    """Its prefix is /usr, of which the sandbox shows the libraries and the interpreter alone."""
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(sys, "_base_executable", "/usr/bin/python3", raising=False)
    sandbox._command.cache_clear()
    try:
        reply = run_program(
            "import os, json, sys\n"
            "x = [sys.base_prefix, os.listdir('/usr/bin'), os.path.exists('/usr/share')]",
            ["x"],
        )
    finally:
        sandbox._command.cache_clear()
    assert reply.values == (
        ["/usr", [os.path.basename(os.path.realpath("/usr/bin/python3"))], False],
    ), reply


def sandbox_users() -> set[int]:
    """Of processes that run now; every program has a user of its own."""
    found = set()
    for number in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError):  # it has ended
            found.add(os.stat(f"/proc/{number}").st_uid)
    return {uid for uid in found if 1_000_000 <= uid < 1_000_000 + (1 << 24)}


@needs_bubblewrap
def test_nothing_is_left_behind():
    """A program forks away from its session: no process of it lives on.

    Programs of other tests may be running at the same time; they end.
    """
    run_program(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\nx = 1", ["x"]
    )
    left, deadline = sandbox_users(), time.monotonic() + 30
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left &= sandbox_users()
    assert not left


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0 and not shutil.which("bwrap"), reason="needs bubblewrap")
def test_processes_are_limited():
    count = (
        "import os, time\n"
        "n = 0\n"
        "try:\n"
        "    for _ in range(40):\n"
        "        if os.fork() == 0: time.sleep(60)\n"
        "        n += 1\n"
        "except OSError: pass"
    )
    assert run_program(count, ["n"]).values[0] < sandbox.LIMITS["RLIMIT_NPROC"]


@needs_bubblewrap
@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_bounded_by_whatever_call_it_is_taken(name):
    """A program holds at most its address space, and what is in a few pipes."""
    reply = run_program(HOLD + MEMORY[name], ["held"])
    bound = sandbox.LIMITS["RLIMIT_AS"] + 16 * sandbox.MAX_BYTES
    if name in ("pipes", "sockets"):
        bound = 16 * sandbox.MAX_BYTES
    if name == "timers":
        bound = sandbox.MAX_BYTES
    assert reply.outcome != "infrastructure_error"
    assert reply.outcome != "returned" or reply.values[0] <= bound, reply
    if name in REFUSED_MEMORY:
        assert reply.values == (0,), reply


@needs_bubblewrap
def test_threads_and_event_loops_still_run():
    program = (
        "import asyncio, threading\n"
        "done = []\n"
        "thread = threading.Thread(target=lambda: done.append(1))\n"
        "thread.start(); thread.join()\n"
        "async def f(): return 2\n"
        "done.append(asyncio.run(f()))\n"
    )
    assert run_program(program, ["done"]).values == ([1, 2],)


@needs_bubblewrap
@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/usr/bin/python3"),
    reason="needs root, to become an ordinary user, and a Python that this one can read",
)
def test_an_ordinary_user_has_the_same_sandbox(tmp_path):
    """Nested user namespaces are off, and memory is bounded, without root too."""
    root = Path(sandbox.__file__).parents[2]
    code = (
        "from mar.verify.sandbox import _command, run_program\n"
        "assert '--disable-userns' in _command(False)\n"
        f"for program in {[HOLD + MEMORY['System V shared memory'], HOLD + MEMORY['forks']]!r}:\n"
        "    reply = run_program(program, ['held'])\n"
        "    assert reply.outcome == 'returned' and reply.values[0] <= 272 << 20, reply\n"
        f"found = run_program({PROBES['a user namespace']!r}, ['bool(found)'])\n"
        "assert found.values == (False,), found\n"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-B", "-c", code],
        cwd=root,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(root)},
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    if "Permission" in done.stderr or "No module named 'mar'" in done.stderr:
        pytest.skip("an ordinary user cannot read this folder")
    assert done.returncode == 0, done.stderr


def test_a_machine_whose_calls_are_not_known_is_refused():
    assert len(syscall_filter("x86_64")) % 8 == 0
    assert len(syscall_filter("aarch64")) % 8 == 0
    with pytest.raises(UserError, match="riscv64"):
        syscall_filter("riscv64")


@needs_bubblewrap
@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -3,
        1.5,
        float("inf"),
        "a\u00e9\U0001f600\"'\n",
        b"\x00\xff",
        2j,
        [1, [2, ()]],
        {1: {2}, (3, "x"): [None]},
        frozenset({1}),
        "",
        [],
        {},
        10**50,
    ],
)
def test_plain_values_come_out_as_they_were(value):
    reply = run_program(f"inf = float('inf')\nx = {value!r}", ["x"])
    assert reply.values == (value,)
    assert type(reply.values[0]) is type(value)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("expression", "outcome"),
    [
        (f"set(range({sandbox.MAX_HASHED - 1}))", "returned"),
        (f"set(range({sandbox.MAX_HASHED}))", "failed"),
        (f"{{0: list(range({sandbox.MAX_HASHED}))}}", "failed"),
        ("list(range(50_000))", "returned"),
    ],
)
def test_sets_and_dicts_have_room_for_thousands(expression, outcome):
    reply = run_program(f"x = {expression}", ["x"])
    assert reply.outcome == outcome
    assert reply.values == ((eval(expression),) if outcome == "returned" else ())


@needs_bubblewrap
def test_honest_programs_pass_side_by_side():
    variants = [
        HONEST,
        "def double(x):\n    return 2 * x",
        "def double(x):\n    y = [x, x]\n    return y[0] + y[1]",
        "def double(x): return x",
    ]
    runner, example = ProgramRunner(), Example("q", "test", "?", (), truth="rule", tests=TESTS)
    runner.submit([(example, program) for program in variants * 2])
    found = [runner.verdict(example, program) for program in variants]
    assert [verdict.outcome for verdict in found] == ["passed", "passed", "passed", "failed"]
    assert len({verdict.key for verdict in found}) == 4 == len(runner.running)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("def double(y):  # doubled\n    'Twice.'\n    pass\n    return y + y\n\n", True),
        ("def double(number: int) -> int:\n    return number + number", True),
        ("def double(x):\n    return x * 2", False),
        ("def double(x):\n    y = x\n    return y + x", True),
        ("def double(x):\n    return x + y", False),
    ],
)
def test_renaming_does_not_make_a_program_new(other, same):
    assert (run_program(HONEST, []).key == run_program(other, []).key) == same


@needs_bubblewrap
def test_thirty_rewrites_of_a_solution_are_one_program():
    """Dead code, unused names, another order and other names earn nothing twice."""
    assert len(REWRITES) >= 30
    runner, example = ProgramRunner(), Example("q", "test", "?", (), truth="rule", tests=TESTS)
    runner.submit([(example, program) for program in REWRITES.values()])
    verdicts = {name: runner.verdict(example, program) for name, program in REWRITES.items()}
    assert {verdict.outcome for verdict in verdicts.values()} == {"passed"}
    first = verdicts["itself"].key
    assert [name for name, verdict in verdicts.items() if verdict.key != first] == []


@pytest.mark.parametrize("rewrites", (LOOP, FORMULA), ids=("loop", "formula"))
def test_a_solution_in_other_words_is_the_same_program(rewrites):
    """Helpers, wrappers, methods, other loops and sums: what is written, not what it does."""
    keys = {name: canonical(program, ("tri(3)",)) for name, program in rewrites.items()}
    assert [name for name, key in keys.items() if key != keys["itself"]] == []


def test_other_ways_to_solve_it_stay_distinct():
    solutions = [LOOP["itself"], FORMULA["itself"], *OTHER_WAYS.values()]
    space: dict = {}
    for program in solutions:
        exec(program, space)
        assert [space["tri"](n) for n in (0, 1, 3, 6)] == [0, 1, 6, 21]
    assert len({canonical(program, ("tri(3)",)) for program in solutions}) == len(solutions)


def test_another_order_and_other_names_make_no_program_new():
    assert len({canonical(program, ("f(3)",)) for program in REORDERED}) == 1


def test_solutions_that_differ_stay_distinct():
    assert len({canonical(program, TESTS) for program in DISTINCT.values()}) == len(DISTINCT)


@needs_bubblewrap
def test_a_program_cannot_choose_its_key():
    """Else the same program, K times, would be K distinct ones."""
    forge = (
        "import os\n"
        "for fd in range(32):\n"
        "    try:\n"
        "        os.ftruncate(fd, 0); os.lseek(fd, 0, 0)\n"
        "    except OSError: pass\n"
        "    try: os.write(fd, b'ready\\n' + b'f' * 64 + b'\\n')\n"
        "    except OSError: pass\n"
    )
    assert run_program(forge + HONEST, []).key not in ("", "f" * 64)


@needs_bubblewrap
def test_import_aliases_do_not_make_a_program_new():
    keys = {
        run_program(p, []).key
        for p in ("import math\nf = math.sqrt(2)", "import math as m\nf = m.sqrt(2)")
    }
    assert len(keys) == 1
    assert (
        run_program("from math import sqrt as f\nf(2)", []).key
        != run_program("from math import floor as f\nf(2)", []).key
    )


@needs_bubblewrap
@pytest.mark.parametrize(
    ("test", "program", "outcome"),
    [
        ("assert not f(1)", "def f(x): return []", "passed"),
        ("assert f(1)", "def f(x): return 0", "failed"),
        ("assert math.isclose(f(1), 0.5, rel_tol=0.01)", "def f(x): return 0.501", "passed"),
        (
            "assert math.isclose(f(1), 0.5)",
            "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 7",
            "failed",
        ),
        ("assert set(f(1)) == set([1, 2])", "def f(x): return (2, 1, 1)", "passed"),
        ("assert f(1) == g(2) == 3", "def f(x): return 3", None),
        ("assert 1 == 1", "", None),
        ("x = 3", "", None),
        ("assert (", "", None),
        (
            "n = N(3)\nassert f(n) == 3",
            "class N:\n    def __init__(s, v): s.v = v\ndef f(n): return n.v",
            "passed",
        ),
        ("assert f(1) < 3 != 4", "def f(x): return 'x'", "failed"),
        ("assert sum(10, 15) == 6", "def sum(a, b): return 6", "passed"),
    ],
)
def test_tests_are_taken_apart(test, program, outcome):
    if outcome is None:
        with pytest.raises(UserError):
            parse_tests((test,))
    else:
        assert verify_program(program, (test,)).outcome == outcome


def test_expected_values_never_enter():
    suite = parse_tests(
        ("assert f(1) == 'secret1'", "assert math.isclose(f(2), 0.125)", "assert 'secret2' == f(3)")
    )
    assert suite.probes == ("f(1)", "f(2)", "f(3)")
    assert suite.setup == ""


def test_without_bubblewrap_programs_are_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="reward.sandbox=unsafe"):
        require_sandbox()
    require_sandbox(unsafe=True)
    assert verify_program(HONEST, TESTS, unsafe=True).outcome == "passed"


def test_a_sandbox_that_does_not_start_is_not_the_programs_fault(monkeypatch):
    monkeypatch.setattr(
        sandbox, "_command", lambda unsafe: ("/bin/sh", "-c", "echo no namespaces >&2; exit 1")
    )
    assert verify_program(HONEST, TESTS).outcome == "infrastructure_error"
    with pytest.raises(UserError, match="no namespaces"):
        require_sandbox(unsafe=True)


def test_a_breakdown_is_tried_once_more(monkeypatch):
    replies = [
        sandbox.Reply("infrastructure_error"),
        sandbox.Reply("returned", (4, "abab", -14), "k"),
    ]
    monkeypatch.setattr(programs, "run_program", lambda *_: replies.pop(0))
    assert verify_program(HONEST, TESTS) == Verdict("passed", "k")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 10**5,
        b'[["list", 3]]',
        b'[{"a": 1}]',
        b'[["eval", ["1"]]]',
        b"[1",
        b"",
        b"\xff",
        b'[["set", [["list", []]]]]',
        b'[["float", "x"]]',
        b'["' + b"9" * 10 + b'"',
        b"9" * 5000,
    ],
)
def test_what_is_no_reply_fails(monkeypatch, body, tmp_path):
    (tmp_path / "reply").write_bytes(body)
    monkeypatch.setattr(
        sandbox, "_command", lambda _: ("sh", "-c", f"echo ready >&2; cat {tmp_path / 'reply'}")
    )
    assert run_program(HONEST, ["double(2)"]).outcome == "failed"

"""Hostile programs earn nothing and change nothing outside; honest ones pass."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from mar import sandbox
from mar.records import UserError
from mar.sandbox import check_sandbox, program_key, run_program, run_programs, split_tests

TESTS = ("assert f(2) == [4, 'two']", "assert f(3) == [9, 'three']")
RIGHT = "def f(x):\n    return [x * x, {2: 'two', 3: 'three'}[x]]"
needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap (program bwrap) is not installed")
as_root = pytest.mark.xfail(os.geteuid() == 0, reason="as root bubblewrap cannot forbid nested user namespaces yet")
HERE = str(Path(__file__).resolve())


def reads(what: str) -> str:
    """A program that returns the right answers only if `what` succeeds inside."""
    return f"import os, sys\ntry:\n    {what}\n    ok = True\nexcept BaseException:\n    ok = False\n" + (
        "def f(x):\n    return [x * x, {2: 'two', 3: 'three'}[x]] if ok else None"
    )


REACHING = {  # each would pass if it could reach what it reaches for
    "passwd": reads("open('/etc/passwd')"),
    "test file": reads(f"open({HERE!r})"),
    "environment": reads("os.environ['MAR_SECRET']"),
    "write outside": reads(f"open({os.path.dirname(HERE) + '/stolen'!r}, 'w').write('x')"),
    "write beside python": reads("open('/py/lib/x', 'w').write('x')"),
    "write root": reads("open('/x', 'w').write('x')"),
    "socket": reads("import socket; socket.create_connection(('127.0.0.1', PORT), 1)"),
    "proc": reads("os.listdir('/proc/1/root')"),
    "symlink": reads("os.symlink('/etc/passwd', '/tmp/p'); open('/tmp/p')"),
    "import project": reads(f"sys.path.append({str(Path(HERE).parents[1])!r}); import mar"),
    "import torch": reads("import torch"),
    "shell": reads("assert os.system('ls /') == 0"),
    "become root": reads("os.setuid(0)"),
    "raise limits": reads("import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))"),
    "user namespace": reads("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0"),
    "huge file": reads("open('/tmp/x', 'wb').write(b'x' * (64 << 20))"),
}
FORGING = {
    "exit 0": "import os; os._exit(0)",
    "sys.exit": "import sys\ndef f(x): sys.exit(0)",
    "catch SystemExit": "def f(x):\n    try:\n        raise SystemExit(0)\n    except SystemExit:\n        return True",
    "always equal": "class A:\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\ndef f(x): return A()",
    "equal list": "class A(list):\n    __eq__ = lambda s, o: True\ndef f(x): return A()",
    "equal int": "class A(int):\n    __eq__ = lambda s, o: True\ndef f(x): return [A(1), A(1)]",
    "printed verdict": "print('passed')\nprint('OK', flush=True)\ndef f(x): return 0",
    "forged report": """
import os, sys
def f(x):
    frame = sys._getframe()
    while 'nonce' not in frame.f_locals: frame = frame.f_back
    for fd in range(3, 20):
        try: os.write(fd, frame.f_locals['nonce'] + b'[["v", true], ["v", true]]\\n')
        except OSError: pass
    os._exit(0)""",
    "patched builtins": "import builtins\nbuiltins.eval = lambda *a: True\nbuiltins.all = lambda *a: True\ndef f(x): return 1",
    "patched json": "import json\njson.dumps = lambda *a, **k: '[1, 1]'\ndef f(x): return 1",
    "overwritten grader": "import sys\nsys.modules['__main__'].plain = lambda x: ['v', True]\ndef f(x): return True",
    "del": "import os\nclass A:\n    def __del__(self): os._exit(0)\na = A()\ndef f(x):\n    global a\n    a = 0",
    "deep value": "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "recursion": "def f(x): return f(x)",
    "huge integer": "def f(x): return 10 ** 100000",
    "memory": "def f(x): return [0] * 10**10",
    "output": "import os, sys\ndef f(x):\n    for fd in range(1, 10):\n        try:\n            while 1: os.write(fd, b'x' * 65536)\n"
    "        except OSError: pass",
    "kill parent": "import os, signal\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\ndef f(x): return 0",
    "signals": "import os, signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "def f(x): return 0",
    "zombies": "import os\nfor _ in range(8):\n    if os.fork() == 0: os._exit(0)\ndef f(x): return 0",
    "null byte": "def f(x): return '\0'",
    "not python": "the answer is 4",
    "too long": RIGHT + "\n#" + "x" * 30_000,
    "empty": "",
    "unhashable": "def f(x): return {frozenset([1]): {1: []}}",
    "nan": "def f(x): return float('nan')",
    "crash": "import ctypes\nctypes.string_at(0)",
    "knows the lefts": "import gc\ndef f(x):\n    return [d for d in gc.get_objects() if isinstance(d, dict) and 'lefts' in d][0]",
}


@needs_bwrap
def test_honest_programs_pass():
    check_sandbox("bubblewrap")
    assert run_programs([(RIGHT, TESTS), ("def f(x): return x", TESTS)]) == ["passed", "failed"]
    shared = ("assert f((3, 4), (4, 5)) == {4}", "assert f([1.5], [1.5]) == {1.5}", "assert f([], []) == set(())")
    assert run_program("def f(a, b): return set(a) & set(b)", shared) == "passed"


@needs_bwrap
@pytest.mark.parametrize("name", [pytest.param(n, marks=as_root) if n == "user namespace" else n for n in REACHING])
def test_nothing_outside_is_reached(name, monkeypatch):
    monkeypatch.setenv("MAR_SECRET", "1")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        program = REACHING[name].replace("PORT", str(server.getsockname()[1]))
        assert run_program(program, TESTS) == "failed"
    assert not (Path(HERE).parent / "stolen").exists()


@needs_bwrap
def test_what_reaches_inside_is_no_artefact():
    assert run_program(reads("open('/tmp/x', 'w').write('x')"), TESTS) == "passed"


@needs_bwrap
@pytest.mark.parametrize("name", FORGING)
def test_no_forgery_passes(name, monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_S", 4.0)
    assert run_program(FORGING[name], TESTS) in ("failed", "timeout")


@needs_bwrap
def test_endless_programs_time_out(monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_S", 1.5)
    sleeping = "import time\ndef f(x): time.sleep(99)"
    assert run_programs([("while 1: pass", TESTS), (sleeping, TESTS)]) == ["timeout", "timeout"]


@needs_bwrap
def test_forks_meet_the_limit():
    bomb = "import os, time\nn = 0\ntry:\n    for _ in range(60):\n        if os.fork() == 0:\n            time.sleep(9); os._exit(0)\n"
    bomb += "        n += 1\nexcept OSError:\n    pass\ndef f(x): return n"
    outcome, values = sandbox._run("", bomb, ("f(1)",), "bubblewrap")
    assert outcome == "passed" and values[0] < sandbox.PROCESSES


def test_no_bubblewrap_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="data.sandbox=unsafe"):
        check_sandbox("bubblewrap")
    assert run_program(RIGHT, TESTS) == "infrastructure_error"
    check_sandbox("unsafe")
    assert run_program(RIGHT, TESTS, "unsafe") == "passed"


def test_tests_are_split_into_what_is_sent_and_what_is_not():
    setup, pairs = split_tests(("import math", "assert f(1) == 2", "assert not f(0)", "assert f(3)"))
    assert setup == "import math" and pairs == (("f(1)", "2"), ("f(0)", "False"), ("f(3)", "True"))
    assert split_tests(("assert f(1) < 2",)) is None and split_tests(("assert (",)) is None and split_tests(()) is None


def test_distinct_programs():
    base = "def f(x):\n    y = x + 1\n    return y"
    same = [
        "```python\n" + base + "\n```",
        "def f(n):\n    '''doc'''\n    out = n+1  # one more\n    return out",
        "def f(x: int) -> int:\n    y = x + 1\n    return y",
    ]
    other = [
        "def f(x):\n    return x + 1",
        "def f(x):\n    y = x + 2\n    return y",
        "def f(x):\n    y = 1 + x\n    return y",
    ]
    assert {program_key(p) for p in same} == {program_key(base)}
    assert len({program_key(p) for p in [base, *other]}) == 4
    assert program_key("not python (") == program_key("not  python (")
    assert json.dumps(program_key("(" * 5000))

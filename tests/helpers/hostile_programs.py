"""Programs that want to be paid without being right, or to do harm. The task: `def double(x)`, twice its argument.

One line each, so some are long. Each is text that only ever runs inside the sandbox (tests/verify/test_sandbox.py, experiments/tasks). None may pass.
"""
# ruff: noqa: E501

TESTS = ("assert double(2) == 4", "assert double('ab') == 'abab'", "assert double(-7) == -14")
HONEST = "def double(x):\n    return x + x"

WRONG = "def double(x):\n    return None\n"
FORGED = 'b"[4,\\"abab\\",4]\\n"'  # a reply with one guess wrong: what a program that cannot know the answers can send
YES = "class Yes({base}):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = None\n"

PROGRAMS = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "threads": "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(60,)).start()\n    except RuntimeError: pass",
    "memory bomb": "x = [0] * 10**10",
    "creeping memory": "x = []\nwhile True: x.append(bytearray(10**6))",
    "endless loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "sleep in the call": "import time\ndef double(x): time.sleep(1000)",
    "huge integer": "def double(x): return 9 ** 9 ** 9",
    "huge number of digits": "def double(x): return 10 ** 100_000",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef double(x): return double(x)",
    "deep value": "def double(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "cyclic value": "def double(x):\n    y = []\n    y.append(y)\n    return y",
    "1 GB of output": "while True: print('x' * 10**6)",
    "1 GB into the channel": "import os\nwhile True:\n    for fd in range(3, 32):\n        try: os.write(fd, b'x' * 10**6)\n        except OSError: pass",
    "1 GB value": "def double(x): return 'x' * 10**9",
    "fills the disk": "import itertools\nfor i in itertools.count(): open(f'/tmp/{i}', 'w').write('x' * 10**6)",
    "os._exit(0)": "import os\nos._exit(0)",
    "os._exit(0) in the call": "import os\ndef double(x): os._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit in the call": "import sys\ndef double(x): sys.exit(0)",
    "catches SystemExit": "import sys\ntry: sys.exit(0)\nexcept SystemExit: print('PASS')\n" + WRONG,
    "exit hook": "import atexit, os\natexit.register(lambda: os._exit(0))\n" + WRONG,
    "printed verdict": "print('PASS'); print('passed'); print('ready'); print('[4, \"abab\", -14]')\n" + WRONG,
    "forged reply": f"import os\nfor fd in range(3, 32):\n    try: os.write(fd, {FORGED})\n    except OSError: pass\nos._exit(0)",
    "forged breakdown": "import os\nfor fd in range(3, 32):\n    try:\n        os.ftruncate(fd, 0); os.lseek(fd, 0, 0)\n    except OSError: pass\nos._exit(1)",
    "equals everything": YES.format(base="object") + "def double(x): return Yes()",
    "list that equals everything": YES.format(base="list") + "def double(x): return Yes()",
    "integer that equals everything": YES.format(base="int") + "def double(x): return Yes()",
    "string that equals everything": YES.format(base="str") + "def double(x): return Yes()",
    "patched builtins": "import builtins\nbuiltins.eval = lambda *a: 4\nbuiltins.all = lambda *a: True\nbuiltins.isinstance = lambda *a: True\n" + WRONG,
    "patched operator": "import operator\noperator.eq = lambda a, b: True\n" + WRONG,
    "assertions off": "import sys\nsys.flags = None\n__debug__ = False\n" + WRONG,
    "patched harness": "import sys\nmain = sys._getframe(1)\nmain.f_globals['tagged'] = lambda v: '4'\n" + WRONG,
    "reads the harness": "import sys\nrequest = sys._getframe(1).f_locals['request']\ndef double(x): return str(request)",
    "empties the questions": "import sys\nsys._getframe(1).f_locals['request']['expressions'].clear()\n" + WRONG,
    "__del__": "class D:\n    def __del__(self): import os; os._exit(0)\ndef double(x): D()",
    "trace": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\n" + WRONG,
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(1, signal.SIGKILL)\n" + WRONG,
    "kills everyone": "import os, signal\nos.kill(-1, signal.SIGKILL)\n" + WRONG,
    "ignores signals": "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "outlives the run": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\nos._exit(0)",
    "zombies": "import os\nfor _ in range(100):\n    try:\n        if os.fork() == 0: os._exit(0)\n    except OSError: break\n" + WRONG,
    "null pointer": "import ctypes\nctypes.string_at(0)",
    "lifts its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "becomes root": "import os\nos.setuid(0)",
    "no text": "",
    "no program": "I would double it: x + x.",
    "null byte": "def double(x): return x\0",
    "surrogate": "'\ud800'\n" + WRONG,
    "nested brackets": "(" * 50_000,
    "nested signs": "x = " + "-" * 50_000 + "1",
    "nested calls": "x = " + "f(" * 90 + ")" * 90 + "\n" + WRONG,
    "too long": "#" * 10**6,
    "hard-coded": "def double(x): return {2: 4}.get(x, 'abab')",
}  # fmt: skip

# Memory by different calls: `held` is the number of bytes that were had, at most 1 GiB each.
HOLD = """
import ctypes, mmap, os, socket
c = ctypes.CDLL(None)
c.shmat.restype = ctypes.c_void_p
c.shmdt.argtypes = [ctypes.c_void_p]
c.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
c.mmap.restype = ctypes.c_void_p
c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
held = 0
"""
MEMORY = {
    "System V shared memory": "for _ in range(3):\n    s = c.shmget(0, 128 << 20, 0o1600)\n    if s < 0: break\n    p = c.shmat(s, None, 0)\n    if p in (None, 2**64 - 1): break\n    ctypes.memset(p, 1, 128 << 20); c.shmdt(p); held += 128 << 20",
    "System V queues": "for _ in range(2000):\n    q = c.msgget(0, 0o1600)\n    if q < 0: break\n    while held < 1 << 30 and c.msgsnd(q, b'1' + bytes(8000), 7000, 0o4000) == 0: held += 7000",
    "files without a name": "try:\n    for i in range(64):\n        f = os.memfd_create(str(i)); os.write(f, bytes(10**6)); p = c.mmap(None, 10**6, 3, 1, f, 0)\n        os.close(f); held += 10**6\nexcept OSError: pass",
    "forks": "r, w = os.pipe()\ntry:\n    for _ in range(8):\n        if os.fork() == 0:\n            x = bytearray(128 << 20); os.write(w, b'x'); import time; time.sleep(1); os._exit(0)\n        os.read(r, 1); held += 128 << 20\nexcept OSError: pass",
    "shared mappings": "kept = []\ntry:\n    for _ in range(16): kept.append(mmap.mmap(-1, 64 << 20)); kept[-1].write(b'x' * (64 << 20)); held += 64 << 20\nexcept (OSError, MemoryError, ValueError): pass",
    "private mappings": "for _ in range(16):\n    p = c.mmap(None, 64 << 20, 3, 34, -1, 0)\n    if p in (None, 2**64 - 1): break\n    ctypes.memset(p, 1, 64 << 20); held += 64 << 20",
    "files in tmp": "try:\n    for i in range(1000):\n        with open(f'/tmp/{i}', 'wb', 0) as f: held += f.write(bytes(10**6))\nexcept OSError: pass",
    "deleted files": "kept = []\ntry:\n    for i in range(1000):\n        kept.append(open('/tmp/x', 'wb', 0)); os.unlink('/tmp/x'); held += kept[-1].write(bytes(10**6))\nexcept OSError: pass",
    "pipes": "import fcntl\ntry:\n    for _ in range(1000):\n        r, w = os.pipe(); fcntl.fcntl(w, 1031, 1 << 20); os.set_blocking(w, False); held += os.write(w, bytes(1 << 20))\nexcept OSError: pass",
    "sockets": "kept = []\ntry:\n    for _ in range(1000):\n        pair = socket.socketpair(); kept.append(pair); pair[0].setblocking(False); held += pair[0].send(bytes(1 << 17))\nexcept OSError: pass",
    "empty files": "try:\n    for i in range(20000): os.mknod(f'/tmp/{i}'); held += 1024\nexcept OSError: pass",
    "empty folders": "try:\n    for i in range(20000): os.mkdir(f'/tmp/{i}'); held += 1024\nexcept OSError: pass",
    "symbolic links": "try:\n    for i in range(20000): os.symlink('x' * 120, f'/tmp/{i}'); held += 1024\nexcept OSError: pass",
    "attributes of a file": "try:\n    open('/tmp/x', 'w').close()\n    for i in range(2000): os.setxattr('/tmp/x', f'user.{i}', bytes(60000)); held += 60000\nexcept OSError: pass",
    "sockets of a network": "kept = []\ntry:\n    server = socket.socket(); server.bind(('127.0.0.1', 0)); server.listen(20)\n    for _ in range(12):\n        a = socket.create_connection(server.getsockname()); b, _ = server.accept(); kept += [a, b]; a.setblocking(False)\n        try:\n            while True: held += a.send(bytes(1 << 16))\n        except BlockingIOError: pass\nexcept OSError: pass",
    "datagrams": "kept = []\ntry:\n    for _ in range(12):\n        a = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); a.bind(('127.0.0.1', 0)); a.setblocking(False); kept.append(a)\n        for _ in range(9): held += a.sendto(bytes(60000), a.getsockname())\nexcept OSError: pass",
    "timers": "for _ in range(20000):\n    if c.timer_create(1, None, ctypes.byref(ctypes.c_void_p())): break\n    held += 400",
    "a namespace with a tmpfs": "if c.unshare(0x10020000) == 0 and c.mount(b'none', b'/tmp', b'tmpfs', 0, b'size=1g') == 0:\n    for i in range(1000): held += open(f'/tmp/{i}', 'wb', 0).write(bytes(10**6))",
}  # fmt: skip

# Those that are refused: they hold nothing.
REFUSED_MEMORY = (
    "System V shared memory",
    "System V queues",
    "files without a name",
    "forks",
    "files in tmp",
    "deleted files",
    "empty files",
    "empty folders",
    "symbolic links",
    "attributes of a file",
    "sockets of a network",
    "datagrams",
    "a namespace with a tmpfs",
)

# One solution, HONEST, thirty times: it earns one hit.
REWRITES = {
    "itself": "def double(x):\n    return x + x",
    "another name": "def double(number):\n    return number + number",
    "comments": "# doubles\ndef double(x):  # twice\n    return (x + x)",
    "docstring": "def double(x):\n    'Twice.'\n    return x + x",
    "annotations": "def double(x: object) -> object:\n    return x + x",
    "pass": "def double(x):\n    pass\n    return x + x",
    "unused variable": "def double(x):\n    unused = 0\n    return x + x",
    "unused chain": "def double(x):\n    a = 1\n    b = a + 1\n    c = b * a\n    return x + x",
    "unused copy": "def double(x):\n    kept = x\n    return x + x",
    "unused call": "def double(x):\n    size = str(x)\n    return x + x",
    "unused function": "def half(x):\n    return x / 2\n\ndef double(x):\n    return x + x",
    "unused inner function": "def double(x):\n    def f(): return 7\n    return x + x",
    "unused class": "class A:\n    pass\n\ndef double(x):\n    return x + x",
    "unused import": "import math\nfrom os import path\ndef double(x):\n    return x + x",
    "unused global": "LIMIT = 10\ndef double(x):\n    return x + x",
    "dead branch": "def double(x):\n    if False:\n        return 3\n    return x + x",
    "dead zero": "def double(x):\n    if 0:\n        x = 1\n    return x + x",
    "live branch": "def double(x):\n    if True:\n        return x + x\n    else:\n        return 1",
    "dead loop": "def double(x):\n    while False:\n        x = 1\n    return x + x",
    "empty loop": "def double(x):\n    for i in range(3):\n        j = i\n    return x + x",
    "one round": "def double(x):\n    while True:\n        return x + x",
    "behind the return": "def double(x):\n    return x + x\n    return 1",
    "result in a name": "def double(x):\n    result = x + x\n    return result",
    "parts in names": "def double(x):\n    a = x\n    b = x\n    return a + b",
    "reordered parts": "def double(x):\n    b = x\n    u = 1\n    a = x\n    return a + b",
    "pairs": "def double(x):\n    a, b = x, x\n    return a + b",
    "overwritten": "def double(x):\n    y = 1\n    y = x + x\n    return y",
    "in place": "def double(x):\n    return (lambda: x + x)()",
    "lambda": "double = lambda x: x + x",
    "second name": "def f(x):\n    return x + x\n\ndouble = f",
    "raised again": "def double(x):\n    try:\n        return x + x\n    except Exception:\n        raise",
    "printed": "def double(x):\n    print('doubling', 2)\n    return x + x",
    "both branches": "def double(x):\n    if x:\n        return x + x\n    else:\n        return x + x",
    "nothing done": "def double(x):\n    x = x\n    assert True\n    x\n    return x + x",
}  # fmt: skip

# A longer one: its statements in another order, with other names.
REORDERED = (
    "def f(n):\n    a = [1]\n    b = {}\n    for i in range(n):\n        a.append(i)\n        b[i] = 1\n    return a, b",
    "def f(k):\n    table = {}\n    rows = [1]\n    for j in range(k):\n        table[j] = 1\n        rows.append(j)\n    return rows, table",
    "def f(n):\n    z = 0\n    b = dict()\n    b = {}\n    a = [1]\n    for i in range(n):\n        z += 1\n        b[i] = 1\n        a.append(i)\n    return a, b",
)

# Solutions that differ: each earns a hit of its own.
DISTINCT = {
    "sum": "def double(x):\n    return x + x",
    "product": "def double(x):\n    return 2 * x",
    "loop": "def double(x):\n    y = x\n    for _ in range(1, 2):\n        y = y + x\n    return y",
    "operator": "import operator\ndef double(x):\n    return operator.add(x, x)",
    "pair": "def double(x):\n    y = [x, x]\n    return y[0] + y[1]",
    "cases": "def double(x):\n    if isinstance(x, str):\n        return x + x\n    return x * 2",
}

# What each finds must be nothing: the expression is 1 where the program got hold of something, else 0.
PROBES = {
    "password file": "import os\nfound = os.path.exists('/etc/passwd') or os.path.exists('/etc/shadow')",
    "environment": "import os\nfound = bool(set(os.environ) - {'PYTHONHASHSEED', 'PWD', 'LC_CTYPE'})",
    "the test file": "import os\nfound = any('test' in n or 'hostile' in n for d, _, ns in os.walk(HERE) for n in ns)",
    "the project": "import importlib.util\nfound = importlib.util.find_spec('mar') is not None",
    "installed packages": "import importlib.util\nfound = importlib.util.find_spec('torch') is not None",
    "processes": "import os\nfound = os.path.exists('/proc') or os.path.exists('/sys')",
    "home folder": "import os\nfound = os.path.exists(os.path.expanduser('~/.cache')) or os.path.exists('/work')",
    "other files in tmp": "import os\nfound = bool(os.listdir('/tmp'))",
    "writing outside": "found = False\nfor f in ('/x', '/usr/x', '/lib/x', PREFIX + '/x'):\n    try: open(f, 'w'); found = True\n    except OSError: pass",
    "network": "import socket\nfound = False\nfor f in (socket.AF_INET, socket.AF_INET6):\n    for a in (('1.1.1.1', 53), ('127.0.0.1', PORT)):\n        try: socket.socket(f).connect(a); found = True\n        except OSError: pass",
    "unix socket": "import socket\nfound = True\ntry: socket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')\nexcept OSError: found = False",
    "symbolic link": "import os\ntry: os.symlink('/proc/1/root/etc/passwd', '/tmp/l'); os.symlink('../../../../etc/passwd', '/tmp/m')\nexcept OSError: pass\nfound = os.path.exists('/tmp/l') or os.path.exists('/tmp/m')",
    "root": "import os\nfound = os.getuid() == 0 or os.geteuid() == 0",
    "mounting": "import ctypes\nfound = ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0",
    "signals to others": "import os\nfound = True\ntry: os.kill(PID, 0)\nexcept OSError: found = False",
    "open files": "import os\nfound = False\nfor fd in range(4, 32):\n    try: found |= bool(os.readlink(f'/proc/self/fd/{fd}'))\n    except OSError: pass",
    "a user namespace": "import ctypes\nc = ctypes.CDLL(None)\nfound = c.unshare(0x10000000) == 0 or c.syscall(56, 0x10000011, 0, 0, 0, 0) >= 0 or c.syscall(435, bytes(88), 88) >= 0",
    "other processes": "import os, subprocess, sys\nfound = True\ntry: os.fork()\nexcept OSError: found = False",
    "programs": "import shutil\nfound = bool(shutil.which('sh') or shutil.which('bash') or shutil.which('curl'))",
}  # fmt: skip

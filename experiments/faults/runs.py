"""Small real runs in forked children of this process (so that torch is imported once), faults put
into them, and what they leave behind compared.
"""

import json
import os
import re
import runpy
import select
import signal
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mar.answers.tokenizer import load_tokenizer
from mar.files import read_jsonl
from mar.policy.sources import EMBEDDED
from mar.run import checkpoint
from mar.run.compose import compose

STEPS, EVERY, PATIENCE = 5, 2, 120.0
WORDS = f"""+experiment=clinic train.steps={STEPS} checkpoint.every={EVERY} checkpoint.keep=2 algo.prompts_per_step=2 algo.group_size=2
eval.num_items=2 model.max_completion_tokens=64 model.lora_rank=0 model.trainable= model.lr=1e-3 logger.console=plain""".split()
Fault = Callable[[], object]


def run_dir(out: Path) -> Path:
    return out / "clinic" / "seed0"


@dataclass(frozen=True)
class Ended:
    """How a process ended (-9: killed) and what it said."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The error that it ended with, or the last line of stderr."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return next(
            (
                line
                for line in reversed(lines)
                if re.match(r"[\w.]*(Error|Exception|error)\b", line)
            ),
            lines[-1] if lines else "",
        )[:300]

    def said(self, pattern: str) -> str:
        """The first line that matches, errors first; "" if there is none."""
        return next(
            (line for line in f"{self.err}\n{self.out}".splitlines() if re.search(pattern, line)),
            "",
        )


@dataclass(frozen=True)
class Begun:
    """A run that is under way; its words go to two files."""

    pid: int
    files: tuple[Path, Path]

    def wait(self, patience: float = PATIENCE) -> Ended:
        handle = os.pidfd_open(self.pid)
        late = not select.select([handle], [], [], patience)[0]
        os.close(handle)
        if late:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        out, err = (file.read_text(errors="replace") for file in self.files)
        return Ended(
            os.waitstatus_to_exitcode(status), out, err + f"\nno end within {patience:.0f} s" * late
        )


def begin(
    out: Path, words: Sequence[str] = (), fault: Fault | None = None, common: Sequence[str] = WORDS
) -> Begun:
    """`python -m mar.train` in a forked child, after `fault` has prepared there what is to happen."""
    files = [Path(tempfile.mkstemp(prefix=f"faults-{name}-")[1]) for name in ("out", "err")]
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Begun(pid, (files[0], files[1]))
    try:
        os.setpgid(0, 0)
        for target, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY), target)
        sys.argv = ["mar.train", *common, f"out={out}", *words]
        warnings.filterwarnings("ignore", "'mar.train' found in sys.modules")
        if fault:
            fault()
        runpy.run_module("mar.train", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train(
    out: Path,
    words: Sequence[str] = (),
    fault: Fault | None = None,
    common: Sequence[str] = WORDS,
    patience: float = PATIENCE,
) -> Ended:
    began = begin(out, words, fault, common)
    ended = began.wait(patience)
    for file in began.files:
        file.unlink()
    return ended


def before_call(
    module: types.ModuleType, name: str, n: int, action: Callable[..., object]
) -> Fault:
    """A fault for `begin`: right before the n-th call (from 1) of a function, `action` is given its
    arguments.
    """

    getattr(module, name)  # before a run is begun that nothing would happen to

    def fault() -> None:
        original, calls = getattr(module, name), iter(range(1, 1 << 30))

        def counted(*args: Any, **options: Any) -> Any:
            if next(calls) == n:
                action(*args)
            return original(*args, **options)

        for other in [m for key, m in sys.modules.items() if key.partition(".")[0] == "mar"]:
            if getattr(other, name, None) is original:
                setattr(other, name, counted)

    return fault


def at_call(module: types.ModuleType, name: str, n: int, action: Fault) -> Fault:
    """`before_call` for what needs no arguments."""
    return before_call(module, name, n, lambda *_: action())


def signal_itself(*kinds: signal.Signals) -> Fault:
    def act() -> None:
        for kind in kinds:
            os.kill(os.getpid(), kind)
            time.sleep(1.1 * (len(kinds) > 1))  # within a second, two signals are one

    return act


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"no {what} within {PATIENCE:.0f} s")
        time.sleep(0.02)


def steps_written(out: Path) -> int:
    """The last step that metrics.jsonl has."""
    file = run_dir(out) / "metrics.jsonl"
    return max((row["step"] for row in read_jsonl(file)[0]), default=0) if file.exists() else 0


def steps_saved(out: Path) -> int:
    """The step of the newest valid checkpoint."""
    found = checkpoint.newest(run_dir(out) / "checkpoints", lambda _: None)
    return found.step if found else 0


def state(path: Path) -> Any:
    """All that a checkpoint holds."""
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(path, Path(folder) / "state.pt")
        return torch.load(Path(folder) / "state.pt", weights_only=False)


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        same_keys = isinstance(b, dict) and a.keys() == b.keys()
        return same_keys and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        same_length = isinstance(b, list | tuple) and len(a) == len(b)
        return same_length and all(map(same, a, b))
    return bool(a == b)


def metrics_without_times(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; perf/* are times."""
    found = []
    for row in read_jsonl(folder / "metrics.jsonl")[0]:
        found.append({key: row[key] for key in row if not key.startswith("perf/")})
    return found


def differences(whole: Path, other: Path) -> list[str]:
    """In what a run differs from an uninterrupted one."""
    a, b = run_dir(whole), run_dir(other)
    found = []
    metrics = metrics_without_times(a)
    if metrics != metrics_without_times(b) or len(metrics) != STEPS:
        found.append("metrics.jsonl")
    if (a / "completions.jsonl").read_bytes() != (b / "completions.jsonl").read_bytes():
        found.append("completions.jsonl")
    if not same(*(json.loads((folder / "eval.json").read_text()) for folder in (a, b))):
        found.append("eval.json")
    last = [checkpoint.newest(folder / "checkpoints", lambda _: None) for folder in (a, b)]
    finished = [state(end.path) for end in last if end and end.step == STEPS]
    if len(finished) < 2 or not same(*finished):
        found.append("parameters or moments")
    return found


class Lab:
    """A folder for every case, and the uninterrupted runs that they are compared with."""

    def __init__(self, base: Path) -> None:
        compose(WORDS)  # what these import, some seconds of it, is then there for all children
        load_tokenizer(EMBEDDED).apply_chat_template(
            [{"role": "user", "content": "?"}], tokenize=False
        )
        model = torch.nn.Linear(2, 2, bias=False)
        model.weight.grad = torch.zeros(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
        checkpoint.save(base / "imports", 1, model, optimizer, 1).result()
        self.base, self.folder = base, base
        self._whole: dict[tuple[str, ...], Path] = {}

    def whole(self, words: Sequence[str] = ()) -> Path:
        """The output folder of the run that nothing happened to."""
        key = tuple(words)
        if key not in self._whole:
            out = self.base / f"whole{len(self._whole)}"
            ended = train(out, words)
            if ended.code:
                raise RuntimeError(
                    f"a run without any fault ends with {ended.code}: {ended.err[-2000:]}"
                )
            self._whole[key] = out
        return self._whole[key]


@dataclass
class Row:
    """What is known of one fault.

    `equal`: whether the resumed run is the uninterrupted one, None where there is nothing to
    compare.
    """

    fault: str
    what: str
    exit: int | None = None
    said: str = ""
    steps_lost: int = 0
    equal: bool | None = None
    skipped: str = ""
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    def struck(self, ended: Ended, code: int, pattern: str) -> None:
        """The fault did what it should: exit code, one sentence, no traceback."""
        self.exit, self.said = ended.code, ended.said(pattern)
        self.check(ended.code == code, f"exit code {ended.code}, not {code}: {ended.last}")
        self.check(bool(self.said), f"it does not say {pattern!r}: {ended.last}")
        self.check("Traceback" not in ended.err, f"a traceback: {ended.last}")

    def compare(self, whole: Path, out: Path) -> None:
        found = differences(whole, out)
        self.equal = not found
        self.check(not found, f"differs from the uninterrupted run in {', '.join(found)}")

    def goes_on(self, whole: Path, out: Path, words: Sequence[str] = ()) -> Ended:
        """The same command again, which ends well and as if nothing had happened."""
        self.steps_lost = max(self.steps_lost, steps_written(out) - steps_saved(out))
        ended = train(out, words)
        self.check(ended.code == 0, f"the same command again ends with {ended.code}: {ended.last}")
        if ended.code == 0:
            self.compare(whole, out)
        return ended

"""Processes for tests, forked from one that has imported the project: that alone takes seconds."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
# the last two are imported by the first step of a run
FORKS.set_forkserver_preload(["mar.train", "mar.evaluate", "torch._dynamo", "transformers"])


def _run(
    function: Callable[..., Any], arguments: tuple[Any, ...], variables: dict, said: Path
) -> None:
    """In the new process: everything it says goes into a file, and what it returns is its status."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    try:
        status = function(*arguments)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.exit(status)


def start(function: Callable[..., Any], *arguments: Any, said: Path, **variables: str) -> Any:
    """A process that runs a function of a module, with environment variables of its own."""
    process = FORKS.Process(target=_run, args=(function, arguments, variables, said))
    process.start()
    return process


def end(process: Any, said: Path, seconds: float = 300) -> None:
    """Wait for a process. Raises AssertionError, with what it said, where it failed."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, said.read_text()[-3000:]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]

"""Errors that a person reads: one sentence instead of a traceback, and the command's exit code."""

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable

MAX_ERROR = 160  # characters of another package's message that we repeat

MAX_NAME = 60  # characters of a path that is too long

# packages that training does without, and what to install for each
OPTIONAL_PACKAGES = {
    "datasets": "datasets",
    "gguf": "gguf",
    "math_verify": "math-verify",
    "matplotlib": "matplotlib",
    "pyarrow": "datasets",
    "rouge_score": "rouge-score",
    "sklearn": "scikit-learn",
    "wandb": "wandb",
}


class UserError(Exception):
    """A mistake of the person at the keyboard, or a fault of their machine or data.

    The message is one sentence: which key or file, its value, and what to do about it.
    """


def exit_code(command: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Run a command and return what the process should exit with.

    An integer that the command returns is passed on, anything else counts as 0. A UserError and a
    missing optional package give 2, Ctrl-C gives 130 and a closed stdout 141; the error, or the
    sentence `interrupted`, goes to stderr.
    """
    heed_ctrl_c()
    _say_what_a_terminal_can_show()
    try:
        code = command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL_PACKAGES:
            raise
        install = OPTIONAL_PACKAGES[error.name]
        print(
            f"error: this needs the package {error.name}, which is not installed: "
            f"pip install {install}",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        start = str(error.filename)[:MAX_NAME]
        print(
            f"error: {start}… is longer than a path can be: give the name of a file or folder",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


def _say_what_a_terminal_can_show() -> None:
    """Where it is not in UTF-8, signs that it has not become question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _stdout_is_closed() -> bool:
    """Whether the reader of stdout has gone, as `| head` does. What was to be written is dropped:
    Python's own flush at the end would fail as well."""
    stdout = sys.stdout.fileno()
    poll = select.poll()
    poll.register(stdout, 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return is_closed


def heed_ctrl_c() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt: the system's default would kill us without
    cleaning up. Where it is ignored (background jobs of a shell) it stays ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def one_line(error: BaseException) -> str:
    """`Type: message` of an exception of any package, on one line and not too long."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:MAX_ERROR]}"

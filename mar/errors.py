"""What a person's mistake looks like: one sentence and an exit code.."""

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the person at the keyboard: shown as one sentence, without a traceback."""


def exit_code(command: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Run a command: its own code if it returns one, else 0; 2 for a user's mistake, 130 for Ctrl-C, each said in one sentence."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = command()
        return code if isinstance(code, int) else 0
    except (UserError, KeyboardInterrupt) as error:
        print(f"error: {error}" if isinstance(error, UserError) else interrupted, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 130


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

"""The commands, in the order of use."""

import sys

from mar.errors import UserError, exit_code
from mar.run.words import nearest

COMMANDS = {
    "fetch": "get a model once and keep it",
    "tasks": "look at a task, or at your own rows, before training",
    "plan": "memory and seconds of a run, before a GPU is rented",
    "sft": "warm a model up on the form of the answers",
    "train": "train a policy: the command that all others are about",
    "runs": "all runs in a table",
    "show": "read a run's completions",
    "ask": "ask a policy, and see its answers with their confidences",
    "evaluate": "every metric with its interval",
    "report": "one HTML file about runs",
    "export": "a run's policy as a checkpoint for others",
}


def run(words: list[str]) -> None:
    for word in words:
        if word in ("-h", "--help"):
            continue
        near = nearest(word.removeprefix("mar."), COMMANDS)
        meant = f"write python -m mar.{near[0]} ..." if near else "`python -m mar` lists them"
        raise UserError(f"commands are modules: {meant}")
    print("python -m mar.<command> -h says what a command takes. In the order of use:\n")
    for name, what in COMMANDS.items():
        print(f"  mar.{name:10} {what}")
    print("\nTo begin: python -m mar.train +experiment=medqa")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(sys.argv[1:])))

"""Read completions of a run in the terminal: right, wrong and repeated answers, and what each
completion earned.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mar.config import number, option
from mar.errors import UserError
from mar.files import rows_of_jsonl, skipped_lines
from mar.run.console import printable
from mar.run.folder import require_run
from mar.run.words import Command, Words, run_command

# What a row of completions.jsonl must have.
KEYS = {
    "step",
    "stage",
    "id",
    "sample",
    "question",
    "targets",
    "text",
    "answers",
    "confidences",
    "hits",
    "reason",
    "reward",
    "parts",
}

COLOURS = {"right": "bold green", "wrong": "red", "repeated": "magenta"}

FIRST_PROMPTS = 3
MOST_NAMED = 6  # steps, where none was found

Row = Mapping[str, Any]


@dataclass
class ShowOptions:
    """Words of this command alone."""

    step: int | None = number(
        None, low=0, help="the last one of training; 0: the evaluation before it"
    )
    prompt: str = option("", help="the id of a prompt, or a part of it; the first three")


def verdict(row: Row, slot: int) -> str:
    """right, repeated or wrong; a set that fails the format has no right answers."""
    if row["hits"][slot] and not row["reason"]:
        return "right"
    repeated = row.get("repeated", ())
    if slot < len(repeated) and repeated[slot]:
        return "repeated"
    return "wrong"


def render_completion(row: Row) -> Text:
    """What a completion earned, its thoughts, and its answers in colour.

    Of a completion that fails the format the whole text is shown.
    """
    out = Text(f"  [{row['sample']}] reward {row['reward']:.3f}", style="bold")
    for name, value in row["parts"].items():
        if value:
            out.append(f"  {name} {value:+.3f}", style="not bold")
    reason = row["reason"]
    out.append(f"  {reason}\n" if reason else "\n", style="bold yellow")
    text = row["text"] if reason else row["text"].rpartition("</think>")[0]
    if text:
        shown = printable(text, keep="\n")
        out.append(f"      {shown}\n", style="dim not bold")
    for slot, answer in enumerate(row["answers"]):
        if answer is None:
            continue
        confidence = row["confidences"][slot]
        said = "" if confidence is None else f"{confidence:.2f}"
        kind = verdict(row, slot)
        out.append(f"      {answer!r:40} {said:5} {kind}\n", style=f"not bold {COLOURS[kind]}")
    return out


def choose_groups(path: Path, step: int | None, prompt: str) -> list[list[Row]]:
    """The groups of completions to show. Raises UserError where there are none.

    The file is read twice, because all of its rows may be more than the memory holds.
    """
    stages = {(row["step"], row["stage"]) for row in rows_of_jsonl(path, [])}
    if not stages:
        raise UserError(f"{path} holds no completion: nothing was sampled in this run yet")
    steps = sorted({step for step, _ in stages})
    training_steps = {step for step, stage in stages if stage == "train"}
    if step is None:
        step = max(training_steps or steps, default=0)
    stage = "train" if step in training_steps else "eval"
    groups: dict[str, list[Row]] = {}
    for row in rows_of_jsonl(path, []):
        if row["step"] == step and row["stage"] == stage and prompt in str(row["id"]):
            groups.setdefault(str(row["id"]), []).append(row)
    if not groups and step not in steps:
        some = steps if len(steps) <= MOST_NAMED else [*steps[:MOST_NAMED], "...", steps[-1]]
        raise UserError(f"no completion is of step={step}; there are {', '.join(map(str, some))}")
    if not groups:
        raise UserError(
            f"no completion of step {step} has {prompt!r} in its id: without prompt= some are shown"
        )
    return list(groups.values())[: None if prompt else FIRST_PROMPTS]


def show(run: Path, step: int | None, prompt: str, console: Console) -> None:
    """Print the chosen completions of a run."""
    path = run / "completions.jsonl"
    if not path.is_file():
        raise UserError(f"{run} has no completions.jsonl: nothing was sampled in this run yet")
    broken: list[str] = []
    last_step = 0
    for written in rows_of_jsonl(path, broken):
        missing = sorted(KEYS - set(written))
        if missing:
            raise UserError(
                f"{path} is of another version of mar, or damaged: a row has no "
                f"{', '.join(missing)}: show it with that version, or remove the row"
            )
        last_step = written["step"]
    if broken:
        console.print(skipped_lines(broken), style="yellow")
    for group in choose_groups(path, step, prompt):
        first = group[0]
        title = f"\n{first['id']}  step {first['step']}, {first['stage']}"
        console.print(Text(title, style="bold underline"))
        asked = f"{first['question']}  -> {', '.join(first['targets'])}"
        console.print(Text(printable(asked, keep="\n")))
        for row in group:
            console.print(render_completion(row))
    others = f"others: python -m mar.show {run} step=... prompt=..., up to step {last_step}"
    console.print(Text(others, "dim"), soft_wrap=True)


COMMAND = Command(
    name="mar.show",
    about=__doc__,
    places="RUN",
    options=ShowOptions,
    examples=(
        "runs/medqa/seed0",
        "runs/medqa/seed0 step=0                # the evaluation before training",
        "runs/medqa/seed0 step=120 prompt=clinic-train-000017",
    ),
)


def main(words: Sequence[str]) -> int:
    console = Console(highlight=False)

    def run(words: Words[ShowOptions]) -> None:
        folder = require_run(Path(words.places[0]))
        show(folder, words.options.step, words.options.prompt, console)

    return run_command(COMMAND, words, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

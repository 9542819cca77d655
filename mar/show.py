"""Read completions in the terminal:  python -m mar.show RUN [STEP] [PROMPT]

Without a step it takes the last one of training, without a prompt its first three; PROMPT is an id or a part of it. Step 0 is the evaluation before.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mar.errors import UserError, exit_code
from mar.files import read_jsonl, skipped_lines

KEYS = set(
    "step stage id sample question targets text answers confidences hits reason reward parts".split()
)

COLOURS = {"right": "bold green", "wrong": "red", "repeated": "magenta"}

FIRST_PROMPTS = 3


def verdict(row: Mapping[str, Any], slot: int) -> str:
    """right, repeated or wrong; a set that fails the format has no right answers."""
    if row["hits"][slot] and not row["reason"]:
        return "right"
    return "repeated" if any(row.get("repeated", ())[slot : slot + 1]) else "wrong"


def visible(text: str) -> str:
    """Control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def shown(row: Mapping[str, Any]) -> Text:
    """One completion: what it earned, its thoughts (all of the text where the format failed), its answers in colour."""
    out = Text(f"  [{row['sample']}] reward {row['reward']:.3f}", style="bold")
    out.append(
        "".join(f"  {name} {value:+.3f}" for name, value in row["parts"].items() if value),
        style="not bold",
    )
    out.append(f"  {row['reason']}\n" if row["reason"] else "\n", style="bold yellow")
    text = row["text"] if row["reason"] else row["text"].rpartition("</think>")[0]
    out.append(f"      {visible(text)}\n" if text else "", style="dim not bold")
    for slot, (answer, confidence) in enumerate(
        zip(row["answers"], row["confidences"], strict=True)
    ):
        if answer is not None:
            kind, said = verdict(row, slot), "" if confidence is None else f"{confidence:.2f}"
            out.append(f"      {answer!r:40} {said:5} {kind}\n", style=f"not bold {COLOURS[kind]}")
    return out


def choose(rows: list[dict[str, Any]], step: int | None, prompt: str) -> list[list[dict[str, Any]]]:
    """The groups to show. UserError where there are none."""
    trained = [row["step"] for row in rows if row["stage"] == "train"]
    steps = sorted({row["step"] for row in rows})
    wanted = step if step is not None else max(trained or steps, default=0)
    stage = "train" if wanted in set(trained) else "eval"
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["step"] == wanted and row["stage"] == stage and prompt in str(row["id"]):
            groups.setdefault(str(row["id"]), []).append(row)
    if not groups:
        raise UserError(
            f"no completion of step {wanted} has {prompt!r} in its id; there are steps {steps[:1]} to {steps[-1:]}"
        )
    return list(groups.values())[: None if prompt else FIRST_PROMPTS]


def show(run: Path, step: int | None, prompt: str, console: Console) -> None:
    path = run / "completions.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a folder that mar.train wrote")
    rows, broken = read_jsonl(path)
    if missing := sorted(KEYS - set(rows[0] if rows else KEYS)):
        raise UserError(
            f"{path} is of another version of mar: its rows have no {', '.join(missing)}"
        )
    if broken:
        console.print(skipped_lines(broken), style="yellow")
    for group in choose(rows, step, prompt):
        first = group[0]
        console.print(
            Text(f"\n{first['id']}  step {first['step']}, {first['stage']}", style="bold underline")
        )
        console.print(Text(visible(f"{first['question']}  -> {', '.join(first['targets'])}")))
        for row in group:
            console.print(shown(row))
    console.print(
        Text(
            f"others: python -m mar.show {run} STEP [PROMPT], up to step {rows[-1]['step']}", "dim"
        ),
        soft_wrap=True,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mar.show", description="Read a run's completions in the terminal."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "step",
        type=int,
        nargs="?",
        help="default: the last one of training; 0: the evaluation before",
    )
    parser.add_argument("prompt", nargs="?", default="", help="a prompt's id, or a part of it")
    options = parser.parse_args(arguments)
    return exit_code(
        lambda: show(options.run, options.step, options.prompt, Console(highlight=False))
    )


if __name__ == "__main__":
    sys.exit(main())

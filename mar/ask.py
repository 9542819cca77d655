"""Ask a policy a question, and see its answers with their confidences:

    python -m mar.ask runs/medqa/seed0 "Female, 50 to 64. Reports cough. What is the condition?"
    python -m mar.ask runs/medqa/seed0                    asks one question after another
    python -m mar.ask FOLDER --json < questions.txt       one JSON document a line

The policy is a run's newest checkpoint, a folder with config.json (an export, any checkpoint), or
`embedded`. Words of the form key=value are settings, e.g. algo.temperature=0.3.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from mar.errors import UserError, exit_code
from mar.files import jsonable
from mar.run.asking import AnswerSet, AskedPolicy, open_policy, pool
from mar.tasks.loading import Source
from mar.tasks.registry import get_task

BAR_WIDTH = 24
SETTING = re.compile(r"[+~]?[a-z_]+([./][a-z_0-9]+)*=\S*")


def example_question(policy: AskedPolicy) -> str | None:
    """A question of the policy's task, where the task makes its own."""
    data = policy.config.data
    task = get_task(data.task)
    if not task.embedded:
        return None
    loaded = task.load(Source(kind="embedded", split=data.eval_split, num=1))
    return loaded.examples[0].question


def questions(policy: AskedPolicy, console: Console) -> Iterator[str]:
    """Lines from the keyboard, or from a pipe; empty ones are passed over."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
        return
    example = example_question(policy)
    if example:
        console.print(Text(f"Enter alone asks this example: {example}", "dim"))
    while True:
        try:
            line = input("question> ").strip()
        except EOFError:
            return
        if line or example:
            yield line or str(example)


def visible(text: str) -> str:
    """Control characters are shown, not obeyed: a model wrote this."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def bar_line(name: str, value: float | None, note: str = "") -> Text:
    """A name, a number from 0 to 1 and its bar."""
    line = Text(f"  {visible(name):32.32} ")
    if value is not None:
        filled = round(BAR_WIDTH * min(max(value, 0.0), 1.0))
        line.append(f"{value:.2f} ", "bold")
        line.append("█" * filled, "green")
        line.append("·" * (BAR_WIDTH - filled), "dim")
    line.append(note, "dim")
    return line


def show_set(answers: AnswerSet, console: Console) -> None:
    if answers.reason:
        console.print(Text(f"  the completion breaks the form ({answers.reason}):", "yellow"))
        console.print(Text(f"  {visible(answers.text)}", "dim"))
        return
    for answer, confidence in zip(answers.answers, answers.confidences, strict=True):
        console.print(bar_line(str(answer), confidence))


def show(question: str, sets: Sequence[AnswerSet], console: Console) -> None:
    console.print(Text(f"\n{visible(question)}", "bold"))
    if len(sets) == 1:
        show_set(sets[0], console)
        return
    num_broken = sum(one.reason is not None for one in sets)
    for answer in pool(sets):
        value = answer.share if answer.confidence is None else answer.confidence
        console.print(bar_line(answer.answer, value, f" {answer.share:4.0%} of sets"))
    if num_broken:
        console.print(Text(f"  {num_broken} of {len(sets)} sets break the form", "yellow"))


def document(question: str, sets: Sequence[AnswerSet]) -> str:
    """One line for programs."""
    found = {
        "question": question,
        "sets": [asdict(one) for one in sets],
        "pooled": [asdict(answer) for answer in pool(sets)],
    }
    return json.dumps(jsonable(found), ensure_ascii=False)


def run(target: str, words: Sequence[str], samples: int, seed: int, as_json: bool) -> None:
    settings = [word for word in words if SETTING.fullmatch(word)]
    asked = [word for word in words if word not in settings]
    if len(asked) > 1:
        raise UserError(f"one question at a time, in quotes, not {len(asked)} words")
    if samples < 1:
        raise UserError(f"--samples {samples}: ask for at least one set")
    console = Console(highlight=False)
    policy = open_policy(target, settings)
    for question in asked or questions(policy, console):
        sets = policy.ask(question, samples, seed)
        if as_json:
            print(document(question, sets), flush=True)
        else:
            show(question, sets, console)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mar.ask",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", help="a run, a folder with config.json, or embedded")
    parser.add_argument("words", nargs="*", help="the question, and settings key=value")
    parser.add_argument("--samples", type=int, default=1, help="sets that are pooled (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON document a question")
    args = parser.parse_args(arguments)
    return exit_code(lambda: run(args.policy, args.words, args.samples, args.seed, args.json))


if __name__ == "__main__":
    sys.exit(main())

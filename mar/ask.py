"""Ask a policy a question, and see its answers with their confidences.

The policy is a run's newest checkpoint, a folder with config.json (an export, any checkpoint), or
`embedded`. Without a question it asks for one after another, from the keyboard or a pipe.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.text import Text

from mar.config import number, option
from mar.errors import UserError
from mar.files import jsonable
from mar.run.asking import AnswerSet, AskedPolicy, open_policy, pool
from mar.run.console import printable
from mar.run.words import Command, Words, run_command
from mar.tasks.loading import Source
from mar.tasks.registry import get_task

BAR_WIDTH = 24
# Columns of an answer's name.
SHORTEST_NAME = 12
LONGEST_NAME = 32


@dataclass
class AskOptions:
    """Words of this command alone."""

    samples: int = number(1, low=1, high=9999, help="answer sets of a question, which are pooled")
    seed: int = number(0, low=0, help="of the draws")
    json: bool = option(False, help="true: one JSON document a question")


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
        is_empty = True
        for line in sys.stdin:
            if line.strip():
                is_empty = False
                yield line.strip()
        if is_empty:
            raise UserError("no question came: write it in quotes after the policy, or a line each")
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


def bar_line(name: str, value: float | None, note: str, width: int) -> Text:
    """A name, a number from 0 to 1 and its bar, in one line of a terminal of that width."""
    room = width - len("  ") - len(" 0.00 ") - BAR_WIDTH - len(note)
    room = max(SHORTEST_NAME, min(LONGEST_NAME, room))
    line = Text(f"  {printable(name):{room}.{room}} ")
    if value is not None:
        filled = round(BAR_WIDTH * min(max(value, 0.0), 1.0))
        line.append(f"{value:.2f} ", "bold")
        line.append("█" * filled, "green")
        line.append("·" * (BAR_WIDTH - filled), "dim")
    line.append(note, "dim")
    return line


def require_utf8(question: str) -> None:
    """Raises UserError for bytes that are none; Python reads them as halves of letters."""
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError(f"the question {question!r} is not in UTF-8: save it in UTF-8") from None


def show_set(answers: AnswerSet, console: Console) -> None:
    if answers.reason:
        console.print(Text(f"  the completion breaks the form ({answers.reason}):", "yellow"))
        console.print(Text(f"  {printable(answers.text)}", "dim"))
        return
    for answer, confidence in zip(answers.answers, answers.confidences, strict=True):
        console.print(bar_line(str(answer), confidence, "", console.width))


def show(question: str, sets: Sequence[AnswerSet], console: Console) -> None:
    console.print(Text(f"\n{printable(question)}", "bold"))
    if len(sets) == 1:
        show_set(sets[0], console)
        return
    num_broken = sum(one.reason is not None for one in sets)
    for answer in pool(sets):
        value = answer.share if answer.confidence is None else answer.confidence
        note = f" {answer.share:4.0%} of sets"
        console.print(bar_line(answer.answer, value, note, console.width))
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


def run(words: Words[AskOptions]) -> None:
    """Answer the question of the command line, or one after another."""
    target, *asked = words.places
    if asked and not asked[0].strip():
        raise UserError("the question is empty: write it in quotes, or leave it out to type it")
    options = words.options
    console = Console(highlight=False)
    policy = open_policy(target, words.settings)
    for question in asked or questions(policy, console):
        require_utf8(question)
        sets = policy.ask(question, options.samples, options.seed)
        if options.json:
            print(document(question, sets), flush=True)
        else:
            show(question, sets, console)


COMMAND = Command(
    name="mar.ask",
    about=__doc__,
    places="POLICY [QUESTION]",
    options=AskOptions,
    unread=("train.", "optim.", "checkpoint.", "eval."),
    settings=("algo.temperature", "model.max_completion_tokens", "device"),
    examples=(
        'runs/medqa/seed0 "Female, 50 to 64. Reports cough. What is the condition?"',
        "runs/medqa/seed0 samples=10                # one question after another, ten sets each",
        "embedded json=true < questions.txt         # one JSON document a line",
    ),
)


def main(words: Sequence[str]) -> int:
    return run_command(COMMAND, words, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""One file per task, and the dictionary of them. To add a task: write `load(source) -> Loaded`, for which `load_rows` needs no more than
`read(row, place) -> Candidate`, and one entry here."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mar.records import Example, UserError
from mar.tasks import ambigqa, clinic, ddxplus, hotpotqa, jsonl, mbpp, medqa, protoqa
from mar.tasks.common import Loaded, Source, load_rows
from mar.tasks.judge import Judge, make_judge
from mar.tasks.mathematics import math_verifier, require_math
from mar.tasks.programs import Runner
from mar.tasks.sandbox import require
from mar.verify import Verifier, text_verifier

How = (
    str | Judge | Runner
)  # a key of VERIFIERS, or what has to be asked for all answers before they are compared
VERIFIERS: dict[str, Verifier] = {"text": text_verifier, "math": math_verifier}


@dataclass(frozen=True)
class Task:
    """How a task is loaded and spoken of. `noun` is one answer in the prompt, `verifier` a key of VERIFIERS, or program,
    `targets` what data.target may be. All golds at once (`set`) is another objective: never for a distribution, of which one gold is right.
    `embedded`: `load` makes its examples itself, from no file (data.source=embedded)."""

    load: Callable[[Source], Loaded]
    noun: str
    verifier: str = "text"
    targets: tuple[str, ...] = ("auto",)
    embedded: bool = False


def _clinic(source: Source) -> Loaded:
    if source.kind != "embedded":
        raise UserError(
            f"data.source={source.kind}: the clinic's patients are drawn here, use data.source=embedded"
        )
    if source.num is None:
        raise UserError(
            "the clinic never runs out of patients: say how many, with data.num_train=<number>"
        )
    return Loaded(clinic.load(source.split, source.num, source.seed), Counter())


DISTRIBUTION = ("auto", "drawn", "probabilities")

TASKS: dict[str, Task] = {
    "clinic": Task(load=_clinic, noun=clinic.NOUN, targets=DISTRIBUTION, embedded=True),
    "medqa": Task(load=medqa.load, noun="answer"),
    "ddxplus": Task(load=ddxplus.load, noun="diagnosis", targets=("auto", "set", "drawn")),
    "ddxplus_bayes": Task(load=ddxplus.load_bayes, noun="diagnosis", targets=DISTRIBUTION),
    "hotpotqa": Task(load=hotpotqa.load, noun="answer"),
    "ambigqa": Task(load=partial(load_rows, read=ambigqa.read), noun="answer"),
    "protoqa": Task(
        load=partial(load_rows, read=protoqa.read), noun="answer", targets=DISTRIBUTION
    ),
    "mbpp": Task(load=partial(load_rows, read=mbpp.read), noun="program", verifier="program"),
    "jsonl": Task(load=partial(load_rows, read=jsonl.read), noun="answer", targets=DISTRIBUTION),
}


def get_task(name: str) -> Task:
    """The task of that name, or a sentence with the names there are."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: data.task is one of {', '.join(sorted(TASKS))}")
    return TASKS[name]


def matcher(verifier: How, example: Example) -> Verifier:
    """How answers to an example are compared with golds. Programs have been run: they are compared with nothing."""
    if isinstance(verifier, Judge):
        return partial(verifier.verify, example)
    return VERIFIERS[verifier] if isinstance(verifier, str) else lambda *_: ()


def find_verifier(
    task: str, asked: str, unsafe: bool, judge: tuple[str | None, str, float], judge_folder: Path
) -> How:
    """How the answers of a task are compared with golds; `asked` is auto or a key of VERIFIERS, `judge` its URL, model and seconds. Raises UserError
    where the sandbox, the judge or math-verify does not work here."""
    verifier, (url, model, timeout_s) = get_task(task).verifier, judge
    if verifier == "program":
        if url or asked != "auto":
            raise UserError(
                f"reward.judge and data.verifier are for answers in words, and those of {task} are programs: leave them out"
            )
        require(unsafe)
        return Runner(unsafe)
    verifier = verifier if asked == "auto" else asked
    if verifier not in VERIFIERS:
        raise UserError(f"data.verifier={verifier} is unknown: choose auto, {', '.join(VERIFIERS)}")
    if url and verifier != "text":
        raise UserError(
            f"reward.judge reads words and data.verifier={verifier} does not: leave one of them out"
        )
    if verifier == "math":
        require_math()
    return make_judge(url, model, timeout_s, judge_folder) if url else verifier

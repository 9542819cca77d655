"""One file per task, and the dictionary of them. To add a task: write `load(source) -> Loaded`, for which `load_rows` needs no more than
`read(row, place) -> Candidate`, and one entry here."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mar.errors import UserError
from mar.tasks import ambigqa, clinic, ddxplus, hotpotqa, jsonl, mbpp, medqa, protoqa
from mar.tasks.loading import Loaded, Source, load_rows


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

"""The dictionary of tasks.

To add a task, write `load(source) -> Loaded` in a file of its own and one entry here. For the rows
of a file or of the hub `read(row, where) -> Candidate` is enough: `load_rows` does the rest.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mar.errors import UserError
from mar.tasks import ambigqa, clinic, ddxplus, hotpotqa, jsonl, mbpp, medqa, protoqa
from mar.tasks.loading import Loaded, Source, load_rows


@dataclass(frozen=True)
class Task:
    """How a task is loaded and spoken of."""

    load: Callable[[Source], Loaded]
    # What one answer is called in the prompt.
    noun: str
    # A key of mar.verify.verifiers.VERIFIERS, or `program`.
    verifier: str = "text"
    # What data.target may be. `set`, all golds at once, is another objective: never for a
    # distribution, of which one gold is right.
    targets: tuple[str, ...] = ("auto",)
    # `load` makes its examples itself, from no file (data.source=embedded).
    embedded: bool = False
    # Examples are drawn: another seed gives others, and there is no end of them.
    endless: bool = False


def _load_clinic(source: Source) -> Loaded:
    if source.kind != "embedded":
        raise UserError(
            f"data.source={source.kind}: the clinic's patients are drawn here, use "
            "data.source=embedded"
        )
    if source.num is None:
        raise UserError(
            "the clinic never runs out of patients: say how many, with data.num_train=<number>"
        )
    return Loaded(clinic.load(source.split, source.num, source.seed), dropped=Counter())


# data.target of tasks whose golds form a distribution.
DISTRIBUTION = ("auto", "drawn", "probabilities")

TASKS: dict[str, Task] = {
    "clinic": Task(
        load=_load_clinic, noun=clinic.NOUN, targets=DISTRIBUTION, embedded=True, endless=True
    ),
    "medqa": Task(load=medqa.load, noun="answer"),
    "ddxplus": Task(load=ddxplus.load, noun="diagnosis", targets=("auto", "set", "drawn")),
    "ddxplus_bayes": Task(
        load=ddxplus.load_bayes, noun="diagnosis", targets=DISTRIBUTION, endless=True
    ),
    "hotpotqa": Task(load=hotpotqa.load, noun="answer"),
    "ambigqa": Task(load=partial(load_rows, read=ambigqa.read), noun="answer"),
    "protoqa": Task(
        load=partial(load_rows, read=protoqa.read), noun="answer", targets=DISTRIBUTION
    ),
    "mbpp": Task(load=partial(load_rows, read=mbpp.read), noun="program", verifier="program"),
    "jsonl": Task(load=jsonl.load, noun="answer", targets=DISTRIBUTION),
}


def get_task(name: str) -> Task:
    """The task of that name. Raises UserError with the names there are."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: data.task is one of {', '.join(sorted(TASKS))}")
    return TASKS[name]

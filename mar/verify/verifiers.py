"""The dictionary of verifiers, and which of them checks the answers of a task."""

from collections.abc import Callable, Iterable
from functools import partial

from mar.config import DataOptions, RewardOptions
from mar.errors import UserError
from mar.files import cache_folder
from mar.records import Example
from mar.verify.judge import Judge, make_judge
from mar.verify.matching import Verifier, text_verifier
from mar.verify.mathematics import compare_ahead, math_verifier, require_math_verify
from mar.verify.programs import ProgramRunner
from mar.verify.sandbox import require_sandbox

# To add one: a function (answer, golds) -> the indices of the golds that the answer may take, and
# an entry here. `data.verifier=<its name>` chooses it
VERIFIERS: dict[str, Verifier] = {"text": text_verifier, "math": math_verifier}

# name of a verifier -> a function that is given all answers of a step first, to work on them side
# by side; most need none
AHEAD: dict[str, Callable[[Iterable[tuple[Example, str]]], None]] = {"math": compare_ahead}

# How a run checks its answers: by a key of VERIFIERS, or by a checker that is given all answers of
# a step first (`submit`), so that it can work on them side by side, and may fail on some
# (`has_verdict`). Programs are run against tests and compared with no gold
WordChecker = str | Judge
AnswerChecker = WordChecker | ProgramRunner


def verifier_for(checker: WordChecker, example: Example) -> Verifier:
    """The function that compares answers to this example with golds."""
    if isinstance(checker, Judge):
        return partial(checker.verify, example)
    return VERIFIERS[checker]


def submit_answers(checker: AnswerChecker, answers: Iterable[tuple[Example, str]]) -> None:
    """Give a checker all answers of a step, so that it works on them side by side."""
    if not isinstance(checker, str):
        checker.submit(answers)
    elif checker in AHEAD:
        AHEAD[checker](answers)


def make_answer_checker(
    task_verifier: str, data: DataOptions, reward: RewardOptions
) -> AnswerChecker:
    """What the config asks for: `data.verifier`, `reward.judge` and `reward.sandbox`.

    `task_verifier` is the task's own: a key of VERIFIERS, or `program`. Raises UserError where the
    sandbox, the judge or math-verify does not work here.
    """
    if task_verifier == "program":
        if reward.judge or data.verifier != "auto":
            raise UserError(
                f"reward.judge and data.verifier are for answers in words, and those of "
                f"{data.task} are programs: leave them out"
            )
        unsafe = reward.sandbox == "unsafe"
        require_sandbox(unsafe)
        return ProgramRunner(unsafe)

    name = task_verifier if data.verifier == "auto" else data.verifier
    if name not in VERIFIERS:
        raise UserError(f"data.verifier={name} is unknown: choose auto, {', '.join(VERIFIERS)}")
    if reward.judge and name != "text":
        raise UserError(
            f"reward.judge reads words and data.verifier={name} does not: leave one of them out"
        )
    if name == "math":
        require_math_verify()
    if reward.judge:
        folder = cache_folder() / "judge"
        return make_judge(reward.judge, reward.judge_model, reward.judge_timeout_s, folder)
    return name

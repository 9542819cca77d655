"""verify.verifiers."""

from functools import partial
from pathlib import Path

from mar.errors import UserError
from mar.records import Example
from mar.verify.judge import Judge, make_judge
from mar.verify.matching import Verifier, text_verifier
from mar.verify.mathematics import math_verifier, require_math_verify
from mar.verify.programs import ProgramRunner
from mar.verify.sandbox import require_sandbox

AnswerChecker = (
    str | Judge | ProgramRunner
)  # a key of VERIFIERS, or what has to be asked for all answers before they are compared

VERIFIERS: dict[str, Verifier] = {"text": text_verifier, "math": math_verifier}


def verifier_for(verifier: AnswerChecker, example: Example) -> Verifier:
    """How answers to an example are compared with golds. Programs have been run: they are compared with nothing."""
    if isinstance(verifier, Judge):
        return partial(verifier.verify, example)
    return VERIFIERS[verifier] if isinstance(verifier, str) else lambda *_: ()


def find_verifier(
    task: str,
    of_task: str,
    asked: str,
    unsafe: bool,
    judge: tuple[str | None, str, float],
    judge_folder: Path,
) -> AnswerChecker:
    """How the answers of a task are compared with golds.

    `of_task` is what the task itself names, `asked` is auto or a key of VERIFIERS, `judge` its URL,
    model and seconds. Raises UserError where the sandbox, the judge or math-verify does not work.
    """
    url, model, timeout_s = judge
    if of_task == "program":
        if url or asked != "auto":
            raise UserError(
                f"reward.judge and data.verifier are for answers in words, and those of {task} are programs: leave them out"
            )
        require_sandbox(unsafe)
        return ProgramRunner(unsafe)
    verifier = of_task if asked == "auto" else asked
    if verifier not in VERIFIERS:
        raise UserError(f"data.verifier={verifier} is unknown: choose auto, {', '.join(VERIFIERS)}")
    if url and verifier != "text":
        raise UserError(
            f"reward.judge reads words and data.verifier={verifier} does not: leave one of them out"
        )
    if verifier == "math":
        require_math_verify()
    return make_judge(url, model, timeout_s, judge_folder) if url else verifier

"""How fast answers are judged, and what the hostile ones earn.

    python experiments/tasks/run.py [--quick | --bars] [--data FOLDER]

Completions of text are parsed and verified on one thread; MBPP's reference programs (100 of them,
all with --bars) and the hostile programs and answers of tests/ run as in training. The last line of
stdout is one JSON document.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mar.answers.grammar import Grammar, parse, render
from mar.answers.rewards import RewardSpec, reward
from mar.errors import UserError
from mar.records import Example
from mar.tasks import clinic
from mar.verify.matching import matching_increments, repeats
from mar.verify.programs import ProgramRunner, Tests, parse_tests
from mar.verify.sandbox import LIMITS, MAX_BYTES, require_sandbox, run_program
from tests.helpers import hostile_answers
from tests.helpers import hostile_programs as hostile

NUM_TEXTS = 1000
QUICK_PROGRAMS = 100


def texts_per_s() -> float:
    """Completions of three answers a second of CPU time, against each patient's 60 conditions."""
    rng = np.random.default_rng(0)
    grammar = Grammar("rlcr_multi", 3, thinking=False)
    patients = clinic.load("validation", NUM_TEXTS)
    names = [g.name for g in patients[0].golds]
    texts = [
        render(grammar, list(rng.choice(names, 3, replace=False)), [0.5, 0.3, 0.1])
        for _ in patients
    ]
    began = time.process_time()
    for patient, text in zip(patients, texts, strict=True):
        parsed = parse(text, grammar)
        hits, _ = matching_increments(parsed.answers, patient.targets())
        reward(parsed, hits, repeats(parsed.answers, patient.golds), 1, grammar, RewardSpec())
    return NUM_TEXTS / (time.process_time() - began)


def outcomes(jobs: Sequence[tuple[str, Tests]]) -> list[str]:
    """What became of programs that ran side by side."""
    runner, asked = (
        ProgramRunner(),
        [(Example("", "mbpp", "?", (), "rule", tests=tests), program) for program, tests in jobs],
    )
    runner.submit(asked)
    return [runner.verdict(*pair).outcome for pair in asked]


def references(file: Path, most: int | None) -> tuple[int, int, int, float]:
    """(tried, passed, left out, programs a second) of MBPP's own solutions."""
    jobs, left_out = [], 0
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()[:most]):
        setup = row.get("test_setup_code") or ""
        tests = (*([setup] if setup else []), *row["test_list"])
        try:
            parse_tests(tests)
            jobs.append((row["code"], tests))
        except UserError:
            left_out += 1
    began = time.perf_counter()
    passed = outcomes(jobs).count("passed")
    return len(jobs), passed, left_out, len(jobs) / (time.perf_counter() - began)


def attacks() -> dict[str, list[str]]:
    """The names of the hostile programs and answers, and of those that were paid."""
    ended = outcomes([(program, hostile.TESTS) for program in hostile.PROGRAMS.values()])
    won = [
        name for name, outcome in zip(hostile.PROGRAMS, ended, strict=True) if outcome == "passed"
    ]
    for name, (text, most) in hostile_answers.ANSWERS.items():
        parsed = parse(text, hostile_answers.GRAMMAR)
        hits, _ = matching_increments(parsed.answers, hostile_answers.GOLDS)
        again = repeats(parsed.answers, hostile_answers.GOLDS)
        earned = reward(
            parsed, hits, again, len(hostile_answers.GOLDS), hostile_answers.GRAMMAR, RewardSpec()
        )
        won += [name] if earned.parts["coverage"] > most else []
    for name, signs in hostile_answers.SIGNS.items():
        hits, _ = matching_increments(signs, hostile_answers.NUMBERS)
        won += [f"sign: {name}"] if any(hits) else []
    tried = [*hostile.PROGRAMS, *hostile_answers.ANSWERS, *hostile_answers.SIGNS]
    tried += [*hostile.REWRITES, *hostile.LOOP, *hostile.FORMULA, *hostile.MEMORY]
    return {"tried": tried, "succeeded": won + rewrites_paid_twice() + memory_held()}


# tests, and solutions of them that are one solution in other words
SOLUTIONS = (
    (hostile.TESTS, hostile.REWRITES),
    (hostile.TRIANGLE_TESTS, hostile.LOOP),
    (hostile.TRIANGLE_TESTS, hostile.FORMULA),
)


def rewrites_paid_twice() -> list[str]:
    """The rewrites of a solution that count as another one."""
    runner = ProgramRunner()
    twice = []
    for tests, rewrites in SOLUTIONS:
        example = Example("", "mbpp", "?", (), "rule", tests=tests)
        runner.submit((example, program) for program in rewrites.values())
        keys = {name: runner.verdict(example, program).key for name, program in rewrites.items()}
        twice += [f"rewrite: {name}" for name, key in keys.items() if key != keys["itself"]]
    return twice


def memory_held() -> list[str]:
    """The calls by which a program holds more than its limits."""
    bound = LIMITS["RLIMIT_AS"] + 16 * MAX_BYTES
    held = []
    for name, program in hostile.MEMORY.items():
        reply = run_program(hostile.HOLD + program, ["held"])
        if reply.outcome == "returned" and reply.values[0] > bound:
            held.append(f"memory: {name}")
    return held


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="100 reference programs (the default)")
    parser.add_argument("--bars", action="store_true", help="all reference programs")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data/mbpp/mbpp.jsonl"), help="MBPP's jsonl"
    )
    args = parser.parse_args(arguments)
    require_sandbox()
    found: dict[str, object] = {"text_verified_per_s": round(texts_per_s())}
    if args.data.is_file():
        tried, passed, left_out, speed = references(
            args.data, None if args.bars else QUICK_PROGRAMS
        )
        found |= {
            "references_tried": tried,
            "references_passed": passed,
            "references_left_out": left_out,
            "programs_per_s": round(speed, 1),
        }
    else:
        print(f"{args.data} is not here: no reference programs; give --data <mbpp.jsonl>")
    tried_and_won = attacks()
    found |= {f"attacks_{name}": len(names) for name, names in tried_and_won.items()}
    for name in tried_and_won["succeeded"]:
        print(f"paid: {name}")
    print(json.dumps(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")

"""Faults, done for real to small runs.

    python -m experiments.faults.run [--quick] [--only NAME ...]

Writes results.json and README.md beside this file; the last line of its output is the same JSON.
--quick leaves out what needs root and a mount, and the long run (soak).
"""

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from experiments.faults import in_process, on_disk, soak
from experiments.faults.runs import EVERY, STEPS, Lab, Row
from mar.policy.sources import environment

HERE = Path(__file__).parent
MOST_PROBLEMS = 8
Case = Callable[[Lab, Row], None]
INTRODUCTION = """# Faults survived

`make faults` writes this page and results.json. A row is a small real run of `+experiment=clinic` with the embedded model ({steps} steps, a
checkpoint every {every}, one thread), or the part of one that its name says, to which one fault was done. It is *survived* if

- the run ended as it should: one sentence, no traceback;
- a checkpoint was left from which the same command goes on;
- what it then wrote is bit for bit that of a run that nothing happened to: parameters, moments, metrics.jsonl without perf/*,
  completions.jsonl and eval.json.

*equal* is a dash where there is nothing to compare: the fault itself changes the run, or there is no run. *exit* is that of the process that is
quoted; where none is, of the one that was killed.

`save_killed` traces a save by ptrace. It sees every system call that changes files (open for writing, write, fsync, rename, unlink, mkdir, rmdir
and their kin, of all threads) and kills the save before each of them in turn; then again as after a power cut, where files that were not synced
are empty and renames in a folder that was not synced did not happen. The trace must show every fsync before the rename. Not covered: writes by
mmap (there are none), a disk that lies about fsync, and network file systems.
"""
COUNTS = (
    "{survived} of {faults_tried} faults survived, at most {steps_lost_max} steps lost, "
    "{num_mismatched} mismatched; {commit}, {machine}, {seconds} s."
)
HEADER = """| fault | what was done | exit | steps lost | equal | survived | what it said |
|:--|:--|--:|--:|:--|:--|:--|"""


def selected(quick: bool, only: Sequence[str]) -> list[Case]:
    cases = [*on_disk.CASES, *in_process.CASES]
    if not quick:
        cases = [*on_disk.MOUNTED, *cases, *soak.CASES]
    known = {case.__name__ for case in cases}
    unknown = [name for name in only if name not in known]
    if unknown:
        names = ", ".join(sorted(known))
        sys.exit(f"error: unknown fault {', '.join(unknown)}: choose from {names}")
    return [case for case in cases if not only or case.__name__ in only]


def attempt(case: Case, lab: Lab) -> Row:
    """One fault in a folder of its own; a check of ours that breaks down is a problem of that row."""
    began = time.monotonic()
    what = " ".join((case.__doc__ or "").split())
    row = Row(case.__name__, what)
    lab.folder = lab.base / case.__name__
    lab.folder.mkdir()
    if case in on_disk.MOUNTED and os.geteuid() != 0:
        row.skipped = "needs root to mount a tmpfs"
        return row
    try:
        case(lab, row)
    except Exception as error:
        row.problems.append(f"{type(error).__name__}: {error}"[:600])
    for pid in in_process.children():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    shutil.rmtree(lab.folder, ignore_errors=True)
    folder = str(lab.folder)
    row.said = row.said.replace(folder, "...")
    row.problems = [problem.replace(folder, "...") for problem in row.problems[:MOST_PROBLEMS]]
    row.seconds = round(time.monotonic() - began, 1)
    return row


def summary(rows: Sequence[Row], made_with: dict[str, Any]) -> dict[str, Any]:
    tried = [row for row in rows if not row.skipped]
    return {
        **made_with,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "faults_tried": len(tried),
        "survived": sum(not row.problems for row in tried),
        "steps_lost_max": max((row.steps_lost for row in tried), default=0),
        "mismatched": [row.fault for row in tried if row.equal is False],
        "seconds": round(sum(row.seconds for row in rows)),
        "faults": [asdict(row) for row in rows],
    }


def outcome(row: Mapping[str, Any]) -> str:
    """The cell that says whether a fault was survived."""
    if row["skipped"]:
        return f"skipped: {row['skipped']}"
    if row["problems"]:
        return f"**no**: {row['problems'][0]}"
    return "yes"


def line_of(row: Mapping[str, Any]) -> str:
    """A fault as a line of the table."""
    equal = {True: "yes", False: "**no**", None: "–"}[row["equal"]]
    exit_code = "–" if row["exit"] is None else row["exit"]
    cells = [
        row["fault"],
        row["what"],
        exit_code,
        row["steps_lost"],
        equal,
        outcome(row),
        row["said"],
    ]
    escaped = [" ".join(str(cell).replace("|", "\\|").split()) for cell in cells]
    return "| " + " | ".join(escaped) + " |"


def page(results: dict[str, Any]) -> str:
    """README.md from results.json."""
    lines = [
        INTRODUCTION.format(steps=STEPS, every=EVERY),
        COUNTS.format(num_mismatched=len(results["mismatched"]), **results),
        "",
        HEADER,
        *(line_of(row) for row in results["faults"]),
    ]
    return "\n".join(lines) + "\n"


def show(row: Row) -> None:
    survived = "NOT SURVIVED" if row.problems else "survived"
    print(f"{row.seconds:6.1f} s  {row.fault:28} {row.skipped or survived}", flush=True)
    for problem in row.problems:
        print(f"          {problem}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="without what needs root and a mount, and without the soak; writes nothing here",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="these faults; writes nothing here"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Read before anything is written, which would make the commit dirty.
    made_with = {key: environment()[key] for key in ("commit", "torch")}
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults-") as base:
        tempfile.tempdir = base
        lab = Lab(Path(base).resolve())
        for case in selected(options.quick, options.only):
            rows.append(attempt(case, lab))
            show(rows[-1])
            results = summary(rows, made_with)
            # After each fault, so that what was found is kept however this ends.
            if not options.quick and not options.only:
                (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
                (HERE / "README.md").write_text(page(results))
    print(json.dumps(results))
    all_survived = results["survived"] == results["faults_tried"]
    return int(not all_survived or results["steps_lost_max"] > EVERY)


if __name__ == "__main__":
    sys.exit(main())

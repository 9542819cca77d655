"""Faults, done for real to small runs:  python -m experiments.faults.run [--quick] [--only NAME ...]

Writes results.json and README.md beside this file; the last line of its output is the same JSON. --quick leaves out what needs root and a mount.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from experiments.faults import in_process, on_disk
from experiments.faults.runs import EVERY, STEPS, Lab, Row
from mar.policy.sources import environment

HERE = Path(__file__).parent
Case = Callable[[Lab, Row], None]
INTRODUCTION = """# Faults survived

Written by `make faults`, with results.json. A row is a small real run of `+experiment=clinic` with the embedded model ({steps} steps, a
checkpoint every {every}, one thread), or the part of one that its name says, to which one fault was done. It is *survived* if the run ended as it
should (one sentence, no traceback), a checkpoint was left from which the same command goes on, and what it then wrote is bit for bit that of a run
that nothing happened to: parameters, moments, metrics.jsonl without perf/*, completions.jsonl and eval.json. *equal* is a dash where there is no such
comparison: the fault itself changes the run, or there is no run. *exit* is of the process that is quoted; where none is, of the one that was killed.

`save_killed` traces a save by ptrace: every system call that changes files is seen (open for writing, write, fsync, rename, unlink, mkdir, rmdir and
their kin, of all threads), and the save is killed before each of them in turn; then again as after a power cut, where files that were not synced are
empty and renames in a folder that was not synced did not happen. The trace must show every fsync before the rename. Not covered: writes by mmap
(there are none), a disk that lies about fsync, and network file systems.
"""


def selected(quick: bool, only: Sequence[str]) -> list[Case]:
    cases = [*(() if quick else on_disk.MOUNTED), *on_disk.CASES, *in_process.CASES]
    known = {case.__name__ for case in cases}
    if unknown := [name for name in only if name not in known]:
        sys.exit(
            f"error: unknown fault {', '.join(unknown)}: choose from {', '.join(sorted(known))}"
        )
    return [case for case in cases if not only or case.__name__ in only]


def attempt(case: Case, lab: Lab) -> Row:
    """One fault in a folder of its own; a check of ours that breaks down is a problem of that row."""
    row, began = Row(case.__name__, " ".join((case.__doc__ or "").split())), time.monotonic()
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
    row.said = row.said.replace(str(lab.folder), "...")
    row.problems = [problem.replace(str(lab.folder), "...") for problem in row.problems[:8]]
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


def page(results: dict[str, Any]) -> str:
    """README.md from results.json."""
    head = "{survived} of {faults_tried} faults survived, at most {steps_lost_max} steps lost, {n} mismatched; {commit}, {machine}, {seconds} s."
    lines = [
        INTRODUCTION.format(steps=STEPS, every=EVERY),
        head.format(n=len(results["mismatched"]), **results),
        "",
    ]
    lines += [
        "| fault | what was done | exit | steps lost | equal | survived | what it said |",
        "|:--|:--|--:|--:|:--|:--|:--|",
    ]
    for row in results["faults"]:
        equal = {True: "yes", False: "**no**", None: "–"}[row["equal"]]
        end = (
            f"skipped: {row['skipped']}"
            if row["skipped"]
            else "yes"
            if not row["problems"]
            else f"**no**: {row['problems'][0]}"
        )
        cells = [
            row["fault"],
            row["what"],
            "–" if row["exit"] is None else row["exit"],
            row["steps_lost"],
            equal,
            end,
            row["said"],
        ]
        lines.append(
            "| "
            + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="without what needs root and a mount; writes nothing here",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="these faults; writes nothing here"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, made_with = (
        [],
        {key: environment()[key] for key in ("commit", "torch")},
    )  # before anything is written
    with tempfile.TemporaryDirectory(prefix="faults-") as base:
        tempfile.tempdir = base
        lab = Lab(Path(base).resolve())
        for case in selected(options.quick, options.only):
            rows.append(attempt(case, lab))
            row = rows[-1]
            print(
                f"{row.seconds:6.1f} s  {row.fault:28} {row.skipped or ('survived' if not row.problems else 'NOT SURVIVED')}",
                flush=True,
            )
            for problem in row.problems:
                print(f"          {problem}", flush=True)
            results = summary(rows, made_with)
            if (
                not options.quick and not options.only
            ):  # after each, so that what was found is kept however this ends
                (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
                (HERE / "README.md").write_text(page(results))
    print(json.dumps(results))
    return int(results["survived"] < results["faults_tried"] or results["steps_lost_max"] > EVERY)


if __name__ == "__main__":
    sys.exit(main())

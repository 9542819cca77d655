"""The first quarter of an hour on a GPU: what is wrong, what is slow, what the plan said.

    PYTHONPATH=.:kernels python experiments/gpu/first_minutes.py      # make gpu
    ... first_minutes.py --only kernels speed       # again, after something was mended
    ... first_minutes.py --device cpu --tiny        # the same code on a CPU: tries it out

Each part runs in a process of its own with a time limit, in the order of their worth. What it
measures is on the disk at once (OUT/first_minutes/PART.jsonl): a part that fails or hangs takes
neither its own earlier rows nor another part with it. OUT/TESTED_ON.md is written anew after each
part; a part that did not run this time keeps its rows. Nothing is installed and no network is used.
The exit code is 1 where a check failed, a part broke off, or ran into its limit.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import torch

from experiments.gpu.measuring import (
    ROOT,
    Place,
    Record,
    environment,
    one_line,
    shown,
    shown_value,
)

NO_DEVICE = (
    "error: torch sees no CUDA device here, so nothing was measured: "
    "add --device cpu --tiny to try the parts out\n"
)


@dataclass(frozen=True)
class Part:
    """A module of this folder with a function `measure`, and the most seconds that it may take."""

    module: str
    seconds: int
    what: str


PARTS = {
    "machine": Part("machine", 15, "versions, clocks, bandwidth, products"),
    "kernels": Part("kernel_values", 85, "Triton kernels, compiled, against float64"),
    "attention": Part("attention_values", 50, "group forward and backward against the CPU"),
    "sampler": Part("sampler_values", 50, "sampler: CPU, graphs, checkpoint, trainer"),
    "main_job": Part("main_job", 90, "the main job: interrupted, resumed, exported"),
    "speed": Part("speed", 150, "log-probabilities, sampler, one step beside the plan"),
    "profile": Part("profile_step", 40, "the dearest kernels, launches, gaps"),
}


# ---------------------------------------------------------------------- one part


def run_part(name: str, place: Place, file: Path) -> None:
    """Measure a part in this process. Its first row says on what, its last how long it took."""
    record = Record(file)
    record.write({"what": "environment", "value": environment(place.device), "unit": ""})
    began = time.perf_counter()
    try:
        importlib.import_module(f"experiments.gpu.{PARTS[name].module}").measure(place, record)
    except Exception as error:  # what fails on a new device is what this is for
        record.check(f"{name} broke off", False, one_line(error))
    record("the part took", time.perf_counter() - began, "s")


def run_in_process(
    name: str, words: list[str], file: Path, limit: float, variables: dict[str, str]
) -> None:
    """The part in a process of its own, killed with its children after `limit` seconds."""
    command = [sys.executable, __file__, "--part", name, *words]
    surroundings = os.environ | variables
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=surroundings)
    try:
        code = process.wait(limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        add_row(file, f"{name} was ended", f"it ran into its limit of {limit:g} s")
        return
    if code:
        add_row(file, f"{name} ended", f"exit code {code}")


def add_row(file: Path, what: str, why: str) -> None:
    """A failed check, behind what the part has written itself."""
    row = {"what": what, "value": why, "unit": "", "passed": False}
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
    print(f"  {shown(row)}", flush=True)


# ---------------------------------------------------------------------- the report


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a part. A process that is killed can leave half a line, which is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def render(folder: Path) -> str:
    """TESTED_ON.md: for each part on what it ran, its failed checks first, then all rows."""
    lines = [
        "# Tested on",
        "",
        "Written by `python experiments/gpu/first_minutes.py` (`make gpu`). A row with a limit is a",
        "check; **MISSED** says that it failed.",
    ]
    for name, part in PARTS.items():
        file = folder / f"{name}.jsonl"
        if not file.exists():
            lines += ["", f"## {name}: {part.what}", "", "Not run."]
            continue
        rows = rows_of(file)
        lines += ["", f"## {name}: {part.what}", ""]
        for row in rows:
            if row["what"] == "environment":
                facts = [f"{key} {value}" for key, value in row["value"].items()]
                lines += [", ".join(facts) + ".", "", "| what | measured |", "| --- | --- |"]
            else:
                lines.append(table_row(row))
    return "\n".join([*lines, ""])


def table_row(row: dict[str, Any]) -> str:
    cells = [row["what"], shown_value(row)]
    escaped = [str(cell).replace("|", "\\|").replace("MISSED", "**MISSED**") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def failures(folder: Path, names: list[str]) -> list[str]:
    failed = []
    for name in names:
        for row in rows_of(folder / f"{name}.jsonl"):
            if not row.get("passed", True):
                failed.append(f"{name}: {shown(row)}")
    return failed


# ---------------------------------------------------------------------- the command


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent, help="default: this folder")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts alone")
    add("--skip", nargs="+", choices=PARTS, default=[], help="all parts but these")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="cases that a CPU goes through")
    add("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    options = parse(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(NO_DEVICE)
        return 2
    folder = options.out / "first_minutes"
    if options.part:
        place = Place(torch.device(options.device), options.tiny)
        run_part(options.part, place, folder / f"{options.part}.jsonl")
        return 0
    names = [name for name in PARTS if name in options.only and name not in options.skip]
    passed_on = ["--out", str(options.out.resolve()), "--device", options.device]
    if options.tiny:
        passed_on.append("--tiny")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        part = PARTS[name]
        print(f"{name}: {part.what} (at most {part.seconds} s)", flush=True)
        # It counts before torch is imported.
        interpreted = name == "kernels" and options.device == "cpu"
        variables = {"TRITON_INTERPRET": "1"} if interpreted else {}
        run_in_process(name, passed_on, folder / f"{name}.jsonl", part.seconds, variables)
        (options.out / "TESTED_ON.md").write_text(render(folder), encoding="utf-8")
    failed = failures(folder, names)
    print(f"wrote {options.out / 'TESTED_ON.md'}")
    for line in failed:
        print(line)
    print(f"{len(failed)} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""One self-contained HTML file about runs; it needs no network.

A run: its headline with intervals, figures, rollouts with their advantages, config, environment.
Two runs: what differs, and their curves in the same figures. Several runs or a folder of runs: one
line for each setting with mean, interval and number of seeds.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mar.config import option
from mar.errors import UserError
from mar.run.evaluation_folder import make_folder
from mar.run.folder import no_run
from mar.run.words import Command, Words, run_command


@dataclass
class ReportOptions:
    """Words of this command alone."""

    out: Path | None = option(None, help="folder of report.html; that of the (first) run")


def run(words: Words[ReportOptions]) -> None:
    from mar.figures.page import write_report  # matplotlib is an extra

    paths = [Path(place) for place in words.places]
    for path in paths:
        if not path.is_dir():
            raise UserError(no_run(path, ", several runs or a folder of runs"))
    out = words.options.out
    if out and out.suffix == ".html":
        raise UserError(f"out={out}: name the folder in which report.html is written")
    for number, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise UserError(f"{path} is named twice: name it once, or another run beside it")
    make_folder(out or paths[0])
    names = {1: "report.html", 2: "report_of_two.html"}
    name = names.get(len(paths), "report_of_several.html")
    print(write_report(paths, (out or paths[0]) / name))


COMMAND = Command(
    name="mar.report",
    about=__doc__,
    places="RUN...",
    options=ReportOptions,
    examples=(
        "runs/medqa/seed0",
        "runs/medqa/seed0 runs/medqa/seed1       # two runs",
        "runs/credit out=pages                   # a folder of runs, into pages/report.html",
    ),
)


def main(words: Sequence[str]) -> int:
    return run_command(COMMAND, words, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

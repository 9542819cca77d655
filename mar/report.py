"""One self-contained HTML file about runs:  python -m mar.report RUN | FOLDER | RUN_A RUN_B

A run: its headline with intervals, figures, rollouts with their advantages, config, environment.
Two runs: what differs, and their curves in the same figures. A folder of runs: one line for each
setting with mean, interval and number of seeds. The file needs no network.
"""

import argparse
import sys
from pathlib import Path

from mar.errors import exit_code
from mar.figures.page import write_report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mar.report",
        description="One HTML file about a run, a folder of runs, or two runs.",
    )
    parser.add_argument(
        "run", type=Path, nargs="+", help="one run, one folder of runs, or two runs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the file to write (default: report.html in the folder, or here for two runs)",
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: print(write_report(options.run, options.out)))


if __name__ == "__main__":
    sys.exit(main())

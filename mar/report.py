"""One self-contained HTML file about runs:  python -m mar.report RUN | SWEEP | RUN_A RUN_B

A run: headline with intervals, figures, rollouts with their advantages, config, environment. A pair: what differs, curves overlaid. A folder of
runs: one line per setting with mean, interval and number of seeds. The file needs no network; what a model wrote reaches the page as text only.
"""

import argparse
import sys
from pathlib import Path

from mar.errors import exit_code
from mar.figures.page import report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mar.report", description="One HTML file about a run, a sweep or two runs."
    )
    parser.add_argument(
        "run", type=Path, nargs="+", help="one run, one folder of runs, or two runs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the file to write (default: report.html in the folder; of two runs, here)",
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: print(report(options.run, options.out)))


if __name__ == "__main__":
    sys.exit(main())

"""What a run will need, before a GPU is rented.

    python -m mar.plan +experiment=paper scale=h100x8

Memory by part, and the seconds of a step. Computed, not measured, for the worst case: every prompt
and completion as long as the config allows (mar/run/planning.py). The last line of stdout is one
JSON document.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from mar.errors import exit_code
from mar.run.compose import compose
from mar.run.planning import plan, print_plan


def main(words: Sequence[str]) -> int:
    return exit_code(lambda: print_plan(plan(compose(words)), Console(highlight=False)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

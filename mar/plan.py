"""What a run will need, before a GPU is rented:  python -m mar.plan +experiment=paper scale=h100x8

Computed, not measured, without a GPU and without weights, for the worst case: every prompt and completion as long as the config allows. The shape
comes from a folder's config.json, or SHAPES has it. `experiments/plan` holds the memory of a training step against FSDP2's own, under fake tensors.
The last line of stdout is one JSON document.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from mar.errors import exit_code
from mar.run.compose import compose
from mar.run.planning import plan, show


def main(words: Sequence[str]) -> int:
    return exit_code(lambda: show(plan(compose(words)), Console(highlight=False)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a run will need, before a GPU is rented: memory by part, and the seconds of a step.

Computed, not measured, for the worst case: every prompt and completion as long as the config allows
(mar/run/planning.py). The last line of stdout is one JSON document.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from mar.run.compose import compose, require_choice
from mar.run.planning import plan, print_plan
from mar.run.words import Command, NoOptions, Words, run_command


def run(words: Words[NoOptions]) -> None:
    require_choice(words.settings)
    print_plan(plan(compose(words.settings)), Console(highlight=False))


COMMAND = Command(
    name="mar.plan",
    about=__doc__,
    options=NoOptions,
    settings=(
        "algo.prompts_per_step",
        "algo.group_size",
        "model.path",
        "model.lora_rank",
        "model.max_completion_tokens",
    ),
    examples=(
        "+experiment=paper scale=h100x8",
        "+experiment=medqa scale=h100x1 algo.group_size=16",
        "+experiment=medqa scale=h100x1 model=hf model.path=<folder>",
    ),
)


def main(words: Sequence[str]) -> int:
    return run_command(COMMAND, words, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

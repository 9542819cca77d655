"""The table of the recipe's stages, from its log alone."""

from pathlib import Path
from typing import Any

from experiments.common.tables import markdown_table
from mar.files import read_jsonl

LOG = Path(__file__).parent / "recipe.jsonl"
MEASURED = ("posterior_kl", "format_rate", "coverage@3", "ece", "q_mse")
LISTS = ("slots", "correlations")


def cells(measured: dict[str, Any]) -> list[str]:
    """One stage's metrics; "–" where the stage was not asked for sets."""
    one = [f"{measured[name]:.3f}" if name in measured else "–" for name in MEASURED]
    several = []
    for name in LISTS:
        digits = 2 if name == "correlations" else 3
        values = [f"{value:.{digits}f}" for value in measured.get(name, [])]
        several.append(" / ".join(values) or "–")
    return one + several


def markdown(file: Path = LOG) -> str:
    """A line for each stage: its steps, minutes, and what was measured at its end."""
    # Stage -> what was last logged of it.
    steps: dict[str, dict[str, Any]] = {}
    measured: dict[str, dict[str, Any]] = {}
    for row in read_jsonl(file)[0]:
        if "seconds" in row:
            steps[row["stage"]] = row
        elif "posterior_kl" in row:
            measured[row["stage"]] = row

    lines = []
    before = 0
    for stage, last in steps.items():
        minutes = round((last["seconds"] - before) / 60)
        before = last["seconds"]
        lines.append([stage, str(last["step"]), str(minutes), *cells(measured[stage])])
    return markdown_table(["stage", "steps", "minutes", *MEASURED, *LISTS], lines)

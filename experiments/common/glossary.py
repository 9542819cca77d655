"""The tables of mar/measure/README.md, made from what stands beside the metrics.

A metric that is a function has the first paragraph of its docstring; what updates, rewards and the
timer log has a line in the dictionary `MEANINGS` (or `LOGGED`) of the file that logs it.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.common.tables import markdown_table
from mar.answers import rewards
from mar.learn import gradient_variance, losses, update
from mar.measure.bounds import gap_closed
from mar.measure.metrics import METRICS
from mar.measure.step_metrics import STEP_METRICS
from mar.run import timing

OF_TERMS = (
    "what the format, the coverage and the confidences earned, weights included; each of "
    "`reward.terms` is logged under its own name"
)


def meaning(name: str, function: Callable[..., Any]) -> str:
    """The first paragraph of a metric's docstring, in one line. Exits where there is none."""
    doc = inspect.getdoc(function)
    if not doc:
        sys.exit(f"the metric {name} has no docstring: say in {function.__module__} what it is")
    return " ".join(doc.split("\n\n")[0].split()).removesuffix(".")


def of_sets(several: bool) -> dict[str, str]:
    """name -> meaning of the metrics of one answer set of an item, or of `several`."""
    found = {}
    for name, metric in METRICS.items():
        needs_several = metric.applies.__name__ == "has_several_sets"
        if needs_several == several:
            found[name.format(K="K", all="k")] = meaning(name, metric.compute)
    if not several:
        found["gap_closed"] = meaning("gap_closed", gap_closed)
    return found


def of_steps() -> dict[str, str]:
    """name -> meaning of what is logged of a training step, but for the metrics of its sets.

    Exits where a name has two meanings.
    """
    parts = [
        {name: meaning(name, function) for name, function in STEP_METRICS.items()},
        {f"reward/{name}": OF_TERMS for name in rewards.PAPER_TERMS},
        {f"reward/{name}": text for name, text in rewards.LOGGED.items()},
        {f"policy/{name}": text for name, text in losses.MEANINGS.items()},
        gradient_variance.MEANINGS,
        update.MEANINGS,
        timing.MEANINGS,
    ]
    found: dict[str, str] = {}
    for part in parts:
        for name, text in part.items():
            if name in found:
                sys.exit(f"the metric {name} is defined twice: {found[name]!r} and {text!r}")
            found[name] = text
    return dict(sorted(found.items()))


def _table(meanings: Mapping[str, str]) -> str:
    """Names with the same meaning stand in one row."""
    rows: dict[str, list[str]] = {}
    for name, text in meanings.items():
        rows.setdefault(text[0].upper() + text[1:], []).append(f"`{name}`")
    cells = [[", ".join(names), text] for text, names in rows.items()]
    return markdown_table(["metric", "meaning"], cells)


def one_set() -> str:
    return _table(of_sets(several=False))


def several_sets() -> str:
    return _table(of_sets(several=True))


def steps() -> str:
    return _table(of_steps())

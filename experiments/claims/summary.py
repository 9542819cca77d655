"""Table, figures and results.json of the comparison on clinic, from its logs alone.

`make report` calls `write`, `make lint` calls `stale`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common.tables import (
    Log,
    arm_over_seeds,
    cell,
    interval,
    markdown_table,
    metric,
    on_curve,
    read_logs_by,
)
from mar.measure.bounds import gap_closed

HERE = Path(__file__).parent
ORDER = (
    "multi_rlcr",
    "multi_rlvr",
    "rlcr_single",
    "rlvr_single",
    "pass_at_k",
    "multi_rlcr_700",
    "multi_rlcr_700_exact",
    "base",
    "single",
    "base_cold",
    "single_cold",
    "prompted_k",
    "verbalized",
)
# Runs of another length and draws at another temperature are not in the figures.
ONLY_IN_TABLE = ("multi_rlcr_700", "multi_rlcr_700_exact", "base_cold", "single_cold")
KS = range(3, 31, 3)
SET_METRICS = (
    "top1",
    "top1_conf",
    "ece",
    "set_ece",
    "brier",
    "q_mse",
    "tokens_per_set",
    "tv_distance",
    "format_rate",
)
# Columns of the table.
SHOWN = (
    "gap_closed",
    "coverage@3",
    "coverage@30",
    "unique@30",
    "tokens_per_set",
    "top1",
    "ece",
    "q_mse",
    "tv_distance",
)

# Columns that the first page shows.
SHORT = ("coverage@3", "coverage@30", "unique@30", "tokens_per_set", "ece", "q_mse")


def read_logs() -> dict[str, list[Log]]:
    """Method -> its logs."""
    return read_logs_by(HERE / "logs", "method", ORDER)


def numbers(log: Log) -> dict[str, float | None]:
    """Every metric of one log.

    `tokens_per_set` of a method with single answers is that of one answer; what only sets have
    is None there.
    """
    found = {f"coverage@{k}": on_curve(log, "coverage", k) for k in KS}
    of_set = found["coverage@3"]
    floor = log["bars"]["floor"][2]
    ceiling = log["bars"]["ceiling"][2]
    found["gap_closed"] = None if of_set is None else gap_closed(of_set, floor, ceiling)
    found["unique@30"] = on_curve(log, "unique", 30)
    for name in SET_METRICS:
        found[name] = metric(name)(log)
    return found


def bounds(logs: Mapping[str, Sequence[Log]]) -> dict[str, dict[str, float | None]]:
    """The metrics of floor and ceiling, which are known exactly."""
    bars = next(iter(logs.values()))[0]["bars"]
    names = numbers(next(iter(logs.values()))[0])
    found = {}
    for bound in ("floor", "ceiling"):
        known: dict[str, float | None] = dict.fromkeys(names)
        for k in KS:
            known[f"coverage@{k}"] = bars[bound][k - 1]
        known["top1"] = bars[bound][0]
        known["unique@30"] = 30.0
        known["gap_closed"] = float(bound == "ceiling")
        if bound == "ceiling":
            known |= dict.fromkeys(("ece", "set_ece", "q_mse", "tv_distance"), 0.0)
        found[bound] = known
    return found


def results(logs: Mapping[str, Sequence[Log]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{method: {metric: {mean, lo, hi, n}}}, with floor and ceiling."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for method, of_seeds in logs.items():
        each = [numbers(log) for log in of_seeds]
        found[method] = {name: interval([row[name] for row in each]) for name in each[0]}
    for bound, known in bounds(logs).items():
        found[bound] = {
            name: {"mean": value, "lo": value, "hi": value, "n": 0} for name, value in known.items()
        }
    return found


def table(
    logs: Mapping[str, Sequence[Log]],
    chosen: Sequence[str] = (),
    columns: Sequence[str] = SHOWN,
) -> str:
    """The comparison's table: a line for each method, then floor and ceiling.

    `chosen` names the lines to show, in this order; without it all are shown.
    """
    lines = {}
    for method, of_seeds in logs.items():
        each = [numbers(log) for log in of_seeds]
        cells = [cell([row[name] for row in each]) for name in columns]
        lines[method] = [method, str(len(of_seeds)), *cells]
    for bound, known in bounds(logs).items():
        lines[bound] = [bound, "–", *(cell([known[name]]) for name in columns)]
    shown = [lines[method] for method in chosen or lines]
    return markdown_table(["method", "seeds", *columns], shown)


def figures(logs: Mapping[str, Sequence[Log]]) -> dict[str, Any]:
    """coverage, reliability (first seed), unique answers and tokens per answer."""
    from mar.figures import plots

    arms = {}
    for method, of_seeds in logs.items():
        if method not in ONLY_IN_TABLE:
            arms[method] = arm_over_seeds(of_seeds)
    whole = {}
    for method, arm in arms.items():
        if arm["num_answers"] * arm["num_sets"] == max(KS):
            whole[method] = arm
    confident = {}
    for method, arm in arms.items():
        if arm["reliability"] and method in ("multi_rlcr", "rlcr_single", "base"):
            confident[method] = arm
    # The other methods lie on these.
    few = {}
    for method in ("multi_rlcr", "rlvr_single", "base", "single"):
        if method in whole:
            few[method] = whole[method]
    bars = next(iter(logs.values()))[0]["bars"]
    return {
        "coverage": plots.coverage(whole, bars),
        "unique_answers": plots.unique_answers(few),
        "reliability": plots.reliability(confident),
        "tokens": plots.tokens_per_answer(arms),
    }


def fingerprint() -> str:
    """Of the logs that figures and results.json were made from."""
    files = sorted((HERE / "logs").glob("*.json"))
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()[:16]


def stale() -> bool:
    """Whether results.json and the figures are of other logs than those here."""
    file = HERE / "results.json"
    if not file.exists():
        return True
    return json.loads(file.read_text(encoding="utf-8"))["logs"] != fingerprint()


def write() -> None:
    """results.json and the figures; the README shows the PNG files, so no SVG is kept."""
    from mar.figures import plots

    logs = read_logs()
    document = {"logs": fingerprint(), **results(logs)}
    (HERE / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plots.save(figures(logs), HERE / "figures")
    for file in (HERE / "figures").glob("*.svg"):
        file.unlink()


def markdown(chosen: Sequence[str] = ()) -> str:
    return table(read_logs(), chosen)


def short_markdown(chosen: Sequence[str] = ()) -> str:
    return table(read_logs(), chosen, SHORT)

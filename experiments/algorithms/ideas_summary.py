"""The tables of the later ideas on clinic, from logs/ideas/ alone (`make report`)."""

from collections.abc import Mapping, Sequence

from experiments.algorithms.ideas import HERE, LOGS, SETTINGS
from experiments.common.tables import (
    Columns,
    Log,
    arm_over_seeds,
    curve_at,
    interval,
    markdown_table,
    metric,
    on_curve,
    read_logs_by,
    table_over_seeds,
)
from mar.figures import plots
from mar.measure.bounds import gap_closed

# Three answers: one set, or three single ones.
SHOWN_ANSWERS = 3
# Setting -> what it is compared with, seed by seed: `own`, and the setting that differs from it in
# the idea alone.
REFERENCES = {
    "to_go": ("own",),
    "simplex Brier": ("own", "to_go"),
    "decoupled": ("own", "to_go"),
    "decoupled, simplex Brier": ("own", "decoupled"),
    "decoupled, Brier and simplex": ("own", "decoupled"),
    "decoupled, spherical": ("own", "decoupled"),
    "DCPO": ("own",),
    "GDPO": ("own",),
    "lag": ("own",),
    "lag, masked": ("own", "lag"),
    "lag, DPPO": ("own", "lag"),
    "thinking": ("own",),
    "thinking, length": ("thinking",),
    "single": ("own",),
    "single, batch exploration": ("own", "single"),
    "single, MaxRL": ("own", "single"),
}
# The settings in the figure.
DRAWN = ("own", "single", "single, batch exploration", "single, MaxRL")


def read_logs() -> dict[str, list[Log]]:
    """Setting -> its logs."""
    return read_logs_by(LOGS, "setting", SETTINGS)


def gap(log: Log) -> float | None:
    """Between three different draws from the posterior (0) and its three most probable answers (1)."""
    covered = on_curve(log, "coverage", SHOWN_ANSWERS)
    if covered is None:
        return None
    floor = log["bars"]["floor"][SHOWN_ANSWERS - 1]
    ceiling = log["bars"]["ceiling"][SHOWN_ANSWERS - 1]
    return gap_closed(covered, floor, ceiling)


def q_mse_scaled(log: Log) -> float | None:
    """The q_mse that is left when a set's confidences and `<other>` are scaled to the sum 1.

    None where the form has no `<other>`: then nothing says what they should add up to.
    """
    if "reward.other=true" not in log["words"]:
        return None
    return log["scaled"]["q_mse_scaled"]


COMPARED: Columns = {
    "gap_closed": gap,
    "ece": metric("ece"),
    "q_mse": metric("q_mse"),
    "q_mse, scaled": q_mse_scaled,
    "unique@30": curve_at("unique", 30),
    "coverage@30": curve_at("coverage", 30),
}


def markdown() -> str:
    """One line a setting, after training."""
    columns: Columns = {
        **COMPARED,
        "sum said": lambda log: log["scaled"].get("said"),
        "top1": metric("top1"),
        "format_rate": metric("format_rate"),
        "tokens": metric("tokens_per_set"),
    }
    return table_over_seeds(read_logs(), columns, "setting")


def paired() -> str:
    """Differences seed by seed: the same patients and the same random numbers on both sides."""
    logs = read_logs()
    lines = []
    for setting, references in REFERENCES.items():
        for reference in references:
            if setting in logs and reference in logs:
                lines.append(difference_of(logs, setting, reference))
    return markdown_table(["difference", "seeds", *COMPARED], lines)


def difference_of(logs: Mapping[str, Sequence[Log]], a: str, b: str) -> list[str]:
    """A line of `paired`: a minus b."""
    of_a = {log["seed"]: log for log in logs[a]}
    of_b = {log["seed"]: log for log in logs[b]}
    seeds = sorted(of_a.keys() & of_b.keys())
    cells = []
    for column in COMPARED.values():
        cells.append(signed([minus(column(of_a[seed]), column(of_b[seed])) for seed in seeds]))
    return [f"{a} − {b}", str(len(seeds)), *cells]


def minus(a: float | None, b: float | None) -> float | None:
    """a - b; None where a log has no such number."""
    if a is None or b is None:
        return None
    return a - b


def signed(differences: Sequence[float | None]) -> str:
    """Their mean with Student's 95 % interval; without one for a single seed."""
    found = interval(differences)
    if found["mean"] is None:
        return "–"
    text = f"{found['mean']:+.3f}"
    if found["lo"] is None:
        return text
    return f"{text} ({found['lo']:+.3f} to {found['hi']:+.3f})"


def write() -> None:
    """ideas.png: what k answers cover, one after another, and what that costs in tokens."""
    logs = read_logs()
    arms = {}
    for setting in DRAWN:
        if setting in logs:
            # The token counts of single completions are not kept, and not drawn.
            arms[setting] = arm_over_seeds([{**log, "tokens": []} for log in logs[setting]])
    bars = next(iter(logs.values()))[0]["bars"]
    plots.save({"ideas": plots.coverage(arms, bars)}, HERE)
    (HERE / "ideas.svg").unlink()

"""The tables of the sweeps on clinic, from their logs alone; `make report` writes them."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.algorithms import summary as algorithms
from experiments.common.commands import WINDOW
from experiments.common.tables import (
    Columns,
    Log,
    cell,
    curve_at,
    markdown_table,
    metric,
    read_logs_by,
    table_over_seeds,
)
from experiments.sweeps.run import EXPERIMENTS, SIZES, SWEEPS
from mar.figures.plots import STYLE
from mar.measure.bounds import gap_closed

# Where the figure is.
HERE = EXPERIMENTS / "k_sweep"
# Columns of the table of credits at equal seconds.
SECONDS = (60, 120, 180)
# Columns of the table with thoughts.
TOKENS = (60, 120, 180)
MEASURES = {name: metric(name) for name in ("top1", "ece", "q_mse", "brier")}


def read_logs(sweep: str) -> dict[str, list[Log]]:
    """Setting -> its logs."""
    return read_logs_by(EXPERIMENTS / sweep / "logs", "setting", SWEEPS[sweep])


def of_set(log: Log) -> float:
    """Exact mass that one set covers."""
    return float(log["curve"]["coverage"][0][0])


def floor_of_set(log: Log) -> float:
    return log["bars"]["floor"][log["num_answers"] - 1]


def ceiling_of_set(log: Log) -> float:
    return log["bars"]["ceiling"][log["num_answers"] - 1]


def gap(log: Log) -> float | None:
    """Of one set, between K draws from the posterior (0) and its K most probable answers (1)."""
    return gap_closed(of_set(log), floor_of_set(log), ceiling_of_set(log))


def k_sweep() -> str:
    """Trained for K answers, measured with K."""
    columns: Columns = {
        "right per set": of_set,
        "floor": floor_of_set,
        "ceiling": ceiling_of_set,
        "gap_closed": gap,
        "12 answers cover": curve_at("coverage", 12),
        **MEASURES,
        "tokens per set": metric("tokens_per_set"),
    }
    return table_over_seeds(read_logs("k_sweep"), columns, "trained")


def asked() -> str:
    """Trained for three answers, asked for others: one set a patient."""
    three = read_logs("k_sweep")["K = 3"]
    rows: dict[str, Sequence[Log]] = {"K=3": three}
    for size in SIZES:
        rows[size] = [{**log["sizes"][size], "bars": log["bars"]} for log in three]
    columns: Columns = {
        "right per set": of_set,
        "gap_closed": gap,
        **MEASURES,
        "format_rate": metric("format_rate"),
        "repeats per set": metric("repeats_per_set"),
    }
    return table_over_seeds(dict(sorted(rows.items())), columns, "asked")


def brier_weight() -> str:
    """K times the paper's weight is the default of `algo=own`, and a row of the K sweep."""
    rows = read_logs("brier_weight")
    rows["weight 3"] = read_logs("k_sweep")["K = 3"]
    by_weight = dict(sorted(rows.items(), key=lambda row: int(row[0].split()[1])))
    columns: Columns = {
        "gap_closed": gap,
        **MEASURES,
        "auroc": metric("auroc"),
        "tv_distance": metric("tv_distance"),
    }
    return table_over_seeds(by_weight, columns, "setting")


def obedient(right: Sequence[float]) -> list[float]:
    """The confidences with the least Brier loss among those that add up to at most 1.

    They are the shares that are right, all lowered by the same amount, none below 0.
    """
    q = np.array(right, dtype=float)
    while q.sum() > 1 + 1e-9:
        q[q > 0] -= (q.sum() - 1) / (q > 0).sum()
        q = q.clip(0)
    return q.tolist()


def of_slot(log: Log, name: str, slot: int) -> float:
    return log["slots"][name][slot]


def obeying(log: Log, slot: int) -> float:
    """The best mean confidence of a slot that obeys the rule."""
    return obedient(log["slots"]["right"])[slot]


def sum_rule() -> str:
    """Several answers are right at once.

    Of each slot: how often it is right, its mean confidence, and the best one that obeys the rule.
    """
    columns: dict[str, Callable[[Log], float | None]] = {"right per set": of_set}
    for slot in range(3):
        columns[f"right {slot + 1}"] = partial(of_slot, name="right", slot=slot)
        columns[f"said {slot + 1}"] = partial(of_slot, name="confidence", slot=slot)
        columns[f"obeying {slot + 1}"] = partial(obeying, slot=slot)
    columns["sum above 1"] = lambda log: log["slots"]["above_1"]
    for name in ("ece", "brier", "format_rate"):
        columns[name] = metric(name)
    return table_over_seeds(read_logs("sum_rule"), columns, "setting")


def sum_rule_steps() -> str:
    """What a set's confidences add up to while it is trained, seed by seed.

    Only of the logs that have kept it.
    """
    lines = []
    for name, logs in read_logs("sum_rule").items():
        sums = [log["sums"] for log in logs if "sums" in log]
        cells = []
        for of_seeds in zip(*sums, strict=True):
            shown = ["–" if mean is None else f"{mean:.2f}" for mean in of_seeds]
            cells.append(", ".join(shown))
        lines.append([name, *cells])
    num_windows = len(lines[0]) - 1
    windows = [f"{WINDOW * n + 1} to {WINDOW * (n + 1)}" for n in range(num_windows)]
    return markdown_table(["setting, steps", *windows], lines)


def coverage_within(tokens: int) -> Callable[[Log], float | None]:
    """The column of what as many completions cover as fit into this many tokens."""

    def of_log(log: Log) -> float | None:
        spent = log["curve"]["tokens"]
        covered = [point[0] for point in log["curve"]["coverage"]]
        num_fitting = sum(t <= tokens for t in spent)
        # At the end of the curve one more completion might have fitted.
        curve_reaches = tokens < spent[-1] + spent[0]
        if not num_fitting or not curve_reaches:
            return None
        return covered[num_fitting - 1]

    return of_log


def thinking() -> str:
    """With thoughts: what as many answers, and as many tokens, cover.

    The answers are of several completions, whose thoughts all count.
    """
    columns: dict[str, Callable[[Log], float | None]] = {}
    for k in (3, 6, 12):
        columns[f"{k} answers"] = curve_at("coverage", k)
    for tokens in TOKENS:
        columns[f"{tokens} tokens"] = coverage_within(tokens)
    columns |= MEASURES
    columns["tokens per completion"] = metric("tokens_per_set")
    return table_over_seeds(read_logs("thinking"), columns, "trained")


def credit() -> str:
    """The logs of experiments/algorithms at equal seconds of their own clock.

    Held-out gap_closed, interpolated between their evaluations.
    """
    all_logs = algorithms.read_logs()
    lines = []
    for setting in ("rloo, to_go", "rloo, set", "own"):
        logs = all_logs[setting]
        rows = [at_equal_seconds(log) for log in logs]
        cells = [cell(column) for column in zip(*rows, strict=True)]
        lines.append([setting, str(len(logs)), *cells])
    times = [f"after {seconds} s" for seconds in SECONDS]
    return markdown_table(["credit", "seeds", "s a step", *times, "after 140 steps"], lines)


def at_equal_seconds(log: Log) -> list[float]:
    """Seconds a step, gap_closed after SECONDS, gap_closed at the end."""
    floor = log["floor"]["coverage@3"]
    ceiling = log["ceiling"]["coverage@3"]
    history = log["history"]
    closed = np.array(
        [gap_closed(row["coverage@3"], floor, ceiling) for row in history], dtype=np.float64
    )
    seconds_a_step = log["job_s"] / history[-1]["step"]
    seconds = [row["step"] * seconds_a_step for row in history]
    return [seconds_a_step, *np.interp(SECONDS, seconds, closed).tolist(), float(closed[-1])]


def write() -> None:
    """answers.png: what one set covers against the number of its answers.

    Of policies that were trained for that number, and of one that was trained for three.
    """
    trained = read_logs("k_sweep")
    three = trained["K = 3"]
    # K -> a value for each seed.
    for_k = {logs[0]["num_answers"]: [of_set(log) for log in logs] for logs in trained.values()}
    for_three = {int(size[2:]): [of_set(log["sizes"][size]) for log in three] for size in SIZES}
    for_three[3] = [of_set(log) for log in three]
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        _draw(axes, for_k, "trained for K, asked for K", "#0072b2", "o", shift=-0.05)
        _draw(axes, for_three, "trained for 3, asked for K", "#d55e00", "s", shift=0.05)
        bars = three[0]["bars"]
        for name, label, dash in (
            ("ceiling", "ceiling: the best K", "--"),
            ("floor", "floor: drawn K", ":"),
        ):
            axes.plot(range(1, 7), bars[name][:6], color="0.4", ls=dash, lw=1, label=label)
        axes.set(xlabel="answers K in one set", ylabel="right answers per set", xticks=range(1, 7))
        axes.legend(frameon=False)
        figure.savefig(HERE / "answers.png", dpi=150)


def _draw(
    axes: Axes,
    points: dict[int, list[float]],
    label: str,
    colour: str,
    marker: str,
    shift: float,
) -> None:
    """The seeds as points, their medians as a line; a shift keeps two lines apart."""
    sizes = sorted(points)
    medians = [float(np.median(points[k])) for k in sizes]
    axes.plot([k + shift for k in sizes], medians, color=colour, lw=1, label=label)
    for k in sizes:
        axes.plot(
            [k + shift] * len(points[k]),
            points[k],
            color=colour,
            marker=marker,
            ms=4,
            mfc="none",
            ls="",
        )

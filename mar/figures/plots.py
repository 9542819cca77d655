"""Every figure: a function from logged rows or an `evaluation.json` to a matplotlib Figure.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; every line also has a
marker or dash of its own, so that print needs no colour. A point is [value, low, high].
"""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mar.files import read_jsonl
from mar.measure.shown_metrics import CURVES

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dv<P"
DASHES = ("-", "--", "-.", ":")
GREY = "#6b7280"

# Inches of a figure of one panel: as wide as a telephone shows it at its own size.
ONE_PANEL = 4.0
LONGEST_TICK = 22  # characters of an arm's name beside a bar; longer ones are wrapped

# Methods that look the same in every figure, in the order of the looks.
METHODS = (
    "multi_rlcr",
    "rlvr_single",
    "base",
    "single",
    "rlcr_single",
    "multi_rlvr",
    "pass_at_k",
)

STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "svg.hashsalt": "mar",
}

# What is logged of the reward beside its sum and its weighted terms.
COUNTS = ("reward/sum_rule_breach", "reward/repeats")

# Metrics (beginning so) whose floor and ceiling are drawn.
BOUNDED = ("coverage", "top1", "brier", "ece", "q_mse")

Row = Mapping[str, Any]
Point = Sequence[float | None]  # [value, low, high]


# ---- Figures of a run ----


def of_run(folder: Path) -> dict[str, Figure]:
    """The figures of one run's folder: learning curves and reward components."""
    rows, _ = read_jsonl(folder / "metrics.jsonl")
    document = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    learning = learning_curves(
        runs={"run": [rows]},
        evaluations={"run": document.get("history", [])},
        metrics=learning_metrics(document, rows),
        bounds=document,
    )
    return {"learning": learning, "components": components(rows)}


def learning_metrics(document: Row, rows: Sequence[Row]) -> list[str]:
    """The keys of metrics.jsonl that the learning curves show. document: an `eval.json`."""
    stages = (document.get(name) for name in ("after", "before", "ceiling"))
    stage: Row = next((s for s in stages if s), {})
    coverages = [name for name in stage if name.startswith("coverage@")]
    keys = ["reward/total", *(f"train/{name}" for name in [*coverages, *CURVES])]
    return [key for key in keys if any(row.get(key) is not None for row in rows)]


def learning_curves(
    runs: Mapping[str, Sequence[Sequence[Row]]],
    evaluations: Mapping[str, Sequence[Row]],
    metrics: Sequence[str],
    bounds: Row,
) -> Figure:
    """One panel for each metric of metrics.jsonl, against the step.

    runs: setting -> the rows of each seed; drawn is the mean over seeds of the running mean, in a
    band from the lowest to the highest seed. evaluations: setting -> the history of an eval.json,
    drawn as points with intervals. bounds: an eval.json with floor and ceiling.
    """
    with _panels(len(metrics), 3.4, 2.5) as (figure, panels):
        figure.get_layout_engine().set(w_pad=0.12)  # type: ignore[union-attr, call-arg]
        for axes, metric in zip(panels, metrics, strict=True):
            axes.set(title=metric, xlabel="step")
            _whole_steps(axes)
            for index, (setting, seeds) in enumerate(runs.items()):
                label = setting
                if len(seeds) > 1:
                    label += f" ({len(seeds)} seeds)"
                faint = len(runs) == len(seeds) == 1
                _seeds(axes, metric, seeds, index, label, show_single_steps=faint)
                _evaluation_points(axes, metric, evaluations.get(setting, ()), index)
            _bound_lines(axes, metric, bounds)
        handles, labels = panels[0].get_legend_handles_labels() if len(runs) > 1 else ([], [])
        if any(evaluations.values()):
            handles.append(Line2D([], [], color=GREY, marker="o", mfc="white", linewidth=1))
            labels.append("held-out questions, with 95 % interval")
        _legend_below(figure, handles, labels)
    return figure


def _seeds(
    axes: Axes,
    metric: str,
    seeds: Sequence[Sequence[Row]],
    index: int,
    label: str,
    show_single_steps: bool,
) -> None:
    """The mean over seeds of the running mean, up to the last step that all seeds have made."""
    colour = COLOURS[index % 7]
    num_rows = min(len(rows) for rows in seeds)
    steps = [row["step"] for row in seeds[0][:num_rows]]
    values = np.array([series(rows[:num_rows], metric) for rows in seeds])
    curves = np.array([smoothed(row) for row in values])
    if show_single_steps:
        axes.plot(steps, values[0], color=colour, alpha=0.25, linewidth=0.7)
    axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.18, linewidth=0)
    mean = curves.mean(0)
    axes.plot(steps, mean, color=colour, linestyle=DASHES[index % 4], label=label)
    _mark_lone_points(axes, steps, mean, colour)


def _mark_lone_points(
    axes: Axes, steps: Sequence[int], values: np.ndarray, colour: str | None
) -> None:
    """A line needs two neighbours: a value without any would not be seen."""
    known = np.pad(~np.isnan(values), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    if alone.any():
        axes.plot(np.array(steps)[alone], values[alone], "o", color=colour)


def _whole_steps(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers, however few there are."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _evaluation_points(axes: Axes, metric: str, history: Sequence[Row], index: int) -> None:
    """The held-out values of a `train/` metric."""
    stage, _, name = metric.partition("/")
    measured = [row for row in history if stage == "train" and row.get(name) is not None]
    points = [[row[name], *row.get("interval", {}).get(name, (None, None))] for row in measured]
    steps = [row["step"] for row in measured]
    _points(axes, steps, points, mfc="white", linewidth=1, **_look(index))


def _bound_lines(axes: Axes, metric: str, bounds: Row) -> None:
    """Floor and ceiling of a `train/` metric, where they say something."""
    stage, _, name = metric.partition("/")
    if stage != "train" or not name.startswith(BOUNDED):
        return
    for bound in ("floor", "ceiling"):
        value = (bounds.get(bound) or {}).get(name)
        if value is None:
            continue
        axes.axhline(value, color=GREY, linestyle=":", linewidth=1)
        axes.annotate(
            bound,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            color=GREY,
            fontsize=7,
            va="center",
            annotation_clip=False,
        )


def components(rows: Sequence[Row]) -> Figure:
    """The weighted reward terms of one run over time; they add up to the total."""
    with _panels(1, ONE_PANEL, 2.8) as (figure, (axes,)):
        axes.set(title="reward terms", xlabel="step")
        _whole_steps(axes)
        steps = [row["step"] for row in rows]
        logged = dict.fromkeys(key for row in rows for key in row)  # in the order of the log
        names = [key for key in logged if key.startswith("reward/") and key not in COUNTS]
        for name, colour, dash in zip(names, cycle(COLOURS), cycle(DASHES), strict=False):
            values = series(rows, name)
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
            curve = smoothed(values)
            axes.plot(steps, curve, color=colour, linestyle=dash, label=name)
            _mark_lone_points(axes, steps, curve, colour)
        _legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def series(rows: Sequence[Row], key: str) -> np.ndarray:
    """[steps] a metric, nan where a row has none."""
    values = [row.get(key) for row in rows]
    return np.array([np.nan if value is None else value for value in values], float)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over the last tenth of the run; missing values do not count."""
    width = max(1, len(values) // 10)
    known = ~np.isnan(values)
    # Sums and numbers of the known values up to each step, then of the last `width` steps.
    totals = np.cumsum([np.where(known, values, 0.0), known], axis=1)
    totals[:, width:] -= totals[:, :-width].copy()
    mean = np.full(len(values), np.nan)
    return np.divide(totals[0], totals[1], out=mean, where=totals[1] > 0)


# ---- Figures of an evaluation ----


def of_evaluation(document: Row) -> dict[str, Figure]:
    """The figures of an `evaluation.json`, by name; each is one narrow panel, for a narrow page."""
    arms = document["arms"]
    bounds = document.get("bars")
    of_one_size = {name: arm for name, arm in arms.items() if not name.startswith("K=")}
    figures = of_arms(of_one_size, bounds)
    if len(of_one_size) < len(arms):
        figures["coverage of one set"] = size_sweep(arms, bounds, ("coverage",))
        figures["tokens of one set"] = size_sweep(arms, bounds, ("tokens",))
    figures["unique_answers"] = unique_answers(of_one_size)
    figures["tokens"] = tokens_per_answer(arms)
    return figures


def of_arms(arms: Mapping[str, Row], bounds: Row | None) -> dict[str, Figure]:
    """Coverage and reliability of several arms, one panel a figure."""
    figures = {
        "coverage at equal answers": coverage(arms, bounds, ("k",)),
        "coverage at equal tokens": coverage(arms, bounds, ("tokens",)),
    }
    for name, arm in arms.items():
        if arm["reliability"]:
            figures[f"reliability of {name}"] = reliability(arms, only=(name,))
    return figures


def coverage(
    arms: Mapping[str, Row], bounds: Row | None, against: Sequence[str] = ("k", "tokens")
) -> Figure:
    """Distinct correct answers against the number of answers k, and against tokens."""
    width = 4.6 if len(against) > 1 else ONE_PANEL
    with _panels(len(against), width, 3.2, sharey=True) as (figure, panels):
        for axes, key in zip(panels, against, strict=True):
            if bounds and key == "k":
                _bound_curves(axes, bounds["k"], bounds)
            for name, arm, look in _with_looks(arms):
                x = arm["curve"][key]
                value, low, high = np.array(arm["curve"]["coverage"], float).T
                axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
                axes.plot(x, value, label=name, markevery=max(1, len(x) // 10), **look)
            if key == "k":
                axes.set(title="coverage at equal answers", xlabel="answers k")
                _whole_steps(axes)
            else:
                axes.set(title="coverage at equal tokens", xlabel="completion tokens")
        panels[0].set(ylabel="coverage")
        _legend_below(figure, *panels[0].get_legend_handles_labels())
    return figure


def reliability(arms: Mapping[str, Row], only: Sequence[str] = ()) -> Figure:
    """Of each arm: how often answers of each confidence bin are right, over how many there are.

    `only`: some of the arms, which look as they do among all.
    """
    looks = {name: look for name, _, look in _with_looks(arms)}
    calibrated = {
        name: arm for name, arm in arms.items() if arm["reliability"] and (name in only or not only)
    }
    num = len(calibrated)
    width = 2.7 if num > 1 else ONE_PANEL
    with _panels(2 * num, width, 1.7, columns=num, sharex=True, height_ratios=(3, 1)) as (
        figure,
        panels,
    ):
        upper, lower = panels[:num], panels[num:]
        longest_title = 1
        for curve, histogram, (name, arm) in zip(upper, lower, calibrated.items(), strict=True):
            look = looks[name]
            bins = arm["reliability"]
            curve.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
            _points(curve, [b["said"] for b in bins], [b["right"] for b in bins], **look)
            ece = arm["metrics"]["ece"][0]
            ece_text = "–" if ece is None else f"{ece:.3f}"
            # Beside the panel stand the labels of its axis.
            # A no-break space keeps the number with its name.
            title = f"{name}   ECE\u00a0{ece_text}"
            title = textwrap.fill(title, _num_characters(width - 0.8, 10))
            longest_title = max(longest_title, 1 + title.count("\n"))
            curve.set(title=title, ylim=(-0.03, 1.03), xlim=(-0.03, 1.03))
            centres = [int(min(b["said"], 0.999) * 10) / 10 + 0.05 for b in bins]
            histogram.bar(centres, [b["count"] for b in bins], width=0.08, color=look["color"])
            histogram.set(xlabel="confidence")
        figure.set_figheight(figure.get_figheight() + 0.17 * (longest_title - 1))
        upper[0].set(ylabel="share right")
        lower[0].set(ylabel="answers")
    return figure


def unique_answers(arms: Mapping[str, Row]) -> Figure:
    """How many different answers each item got, as shares of the items.

    Only of the arms that give the most answers: fewer answers differ less.
    """
    most = max(arm["num_answers"] * arm["num_sets"] for arm in arms.values())
    comparable = {
        name: arm for name, arm in arms.items() if arm["num_answers"] * arm["num_sets"] == most
    }
    with _panels(1, ONE_PANEL, 2.8) as (figure, (axes,)):
        for name, arm, look in _with_looks(comparable):
            num_items = {int(unique): n for unique, n in arm["unique_histogram"].items()}
            total = sum(num_items.values())
            x = range(min(num_items) - 1, max(num_items) + 2)
            axes.plot(x, [num_items.get(unique, 0) / total for unique in x], label=name, **look)
        axes.set(
            title=f"different answers among {most}",
            xlabel="different answers",
            ylabel="share of items",
        )
        _whole_steps(axes)
        _legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def tokens_per_answer(arms: Mapping[str, Row]) -> Figure:
    """Completion tokens for one answer: mean (dot), middle half (bar) and range (line)."""
    names = [textwrap.fill(name, LONGEST_TICK) for name in arms]
    num_lines = sum(1 + name.count("\n") for name in names)
    with _panels(1, ONE_PANEL, 0.9 + 0.21 * num_lines) as (figure, (axes,)):
        for y, arm in enumerate(arms.values()):
            tokens = np.array(arm["tokens"]) / arm["num_answers"]
            low, first, third, high = np.quantile(tokens, [0, 0.25, 0.75, 1])
            axes.plot([low, high], [y, y], color=GREY, linewidth=1)
            axes.plot([first, third], [y, y], color=COLOURS[4], linewidth=6, solid_capstyle="butt")
            axes.plot(tokens.mean(), y, "o", color=COLOURS[0])
        axes.set_yticks(range(len(arms)), names)
        axes.set(
            title="tokens per answer",
            xlabel="completion tokens / K",
            xlim=(0, None),
            ylim=(len(arms) - 0.5, -0.5),
        )
    return figure


def size_sweep(
    arms: Mapping[str, Row],
    bounds: Row | None,
    shown: Sequence[str] = ("coverage", "tokens"),
) -> Figure:
    """Coverage of one set and its tokens against how many answers were asked for."""
    sizes = [arm for name, arm in arms.items() if name == "policy" or name.startswith("K=")]
    sizes.sort(key=lambda arm: arm["num_answers"])
    x = [arm["num_answers"] for arm in sizes]
    covered = [arm["metrics"][f"coverage@{arm['num_answers']}"] for arm in sizes]
    tokens = [arm["metrics"]["tokens_per_set"] for arm in sizes]
    width = 2.9 if len(shown) > 1 else ONE_PANEL
    with _panels(len(shown), width, 2.8) as (figure, panels):
        for axes, what in zip(panels, shown, strict=True):
            axes.set(title=f"{what} of one set", xlabel="answers asked for", xticks=x)
            if what == "tokens":
                _points(axes, x, tokens, "-", **_look(1))
                axes.set(ylim=(0, None))
                continue
            if bounds:
                _bound_curves(axes, x, bounds)
            _points(axes, x, covered, "-", label="policy", **_look(0))
            _legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def _bound_curves(axes: Axes, x: Sequence[int], bounds: Row) -> None:
    """Floor and ceiling of coverage at x answers; nan beyond what is known."""
    for name, dash in (("floor", ":"), ("ceiling", "--")):
        known = bounds[name] + [np.nan] * max(x)
        values = [known[k - 1] for k in x]
        axes.plot(x, values, color=GREY, linestyle=dash, linewidth=1, label=name)


# ---- What all figures share ----


@contextmanager
def _panels(
    num: int, width: float, height: float, columns: int | None = None, **options: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of `num` panels, at most three in a row, to be drawn inside in our style."""
    columns = columns or min(num, 3)
    rows = -(-num // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=150)
        axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
        for spare in axes[num:]:
            spare.set_visible(False)
        yield figure, axes[:num]


def _num_characters(inches: float, points: float) -> int:
    """About how many characters of a font of so many points fit into a width."""
    return int(inches * 72 / (0.62 * points))


def _legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend under the panels, in as many columns as its longest label leaves, long ones wrapped:
    nothing is cut, however a setting is called."""
    if not handles:
        return
    points = STYLE["legend.fontsize"]
    room = _num_characters(figure.get_figwidth(), points) - 1
    sign = 8  # characters that a line and its margins take
    longest = max(map(len, labels))
    columns = max(1, min(4, len(labels), room // (longest + sign)))
    wrapped = [textwrap.fill(label, room - sign) for label in labels]
    num_lines = sum(1 + label.count("\n") for label in wrapped)
    # The panels keep their height.
    figure.set_figheight(figure.get_figheight() + 0.17 * (1 + num_lines // columns))
    figure.legend(handles, wrapped, loc="outside lower left", ncols=columns)


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % 7], "marker": MARKERS[index % 7]}


def _with_looks(arms: Mapping[str, Row]) -> Iterator[tuple[str, Row, dict[str, Any]]]:
    """(name, arm, its look). A method has the same look in every figure, others those left over.

    Every other look is dashed, as curves may lie on each other.
    """
    taken = {METHODS.index(name) for name in arms if name in METHODS}
    free = (index for index in count() if index not in taken)
    for name, arm in arms.items():
        index = METHODS.index(name) if name in METHODS else next(free)
        line = {"linestyle": "--", "mfc": "none"} if index % 2 else {"linestyle": "-"}
        yield name, arm, _look(index) | line


def _points(
    axes: Axes, x: Sequence[float], points: Sequence[Point], linestyle: str = "", **look: Any
) -> None:
    """[value, low, high] rows as markers with their intervals."""
    table = np.array([[np.nan if v is None else v for v in point] for point in points], float)
    table = table.reshape(-1, 3)
    value, low, high = table.T
    error = np.nan_to_num(np.abs([low - value, high - value]))
    axes.errorbar(x, value, error, linestyle=linestyle, capsize=2, **look)


def save(figures: Mapping[str, Figure], folder: Path) -> dict[str, Path]:
    """Write each figure as `name.svg` and `name.png`; returns the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in figures}

"""Figures of runs and evaluations: pure functions of logged rows and `evaluation.json` to matplotlib Figures.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; every line also has its own marker or dash, so print needs no colour.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mar.files import read_jsonl

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

MARKERS, DASHES, GREY = "os^Dv<P", ("-", "--", "-.", ":"), "#6b7280"

METHODS = (
    "multi_rlcr",
    "rlvr_single",
    "base",
    "single",
    "rlcr_single",
    "multi_rlvr",
    "pass_at_k",
)  # in this order of looks

STYLE: Any = {
    "font.size": 9, "font.family": "sans-serif", "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e7eb", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.6, "lines.markersize": 4, "svg.fonttype": "none", "svg.hashsalt": "mar",
}  # fmt: skip

PARTS = ("reward/total", "reward/format", "reward/coverage", "reward/brier")

BEST_IS_KNOWN = (
    "coverage",
    "top1",
    "brier",
    "ece",
    "q_mse",
)  # only for these do floor and ceiling say something

Row = Mapping[str, Any]


@contextmanager
def _panels(
    num: int, width: float, height: float, **options: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of `num` panels, at most three in a row, to be drawn inside in our style."""
    columns = options.pop("columns", min(num, 3))
    rows = -(-num // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=150)
        axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
        for spare in axes[num:]:
            spare.set_visible(False)
        yield figure, axes[:num]


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % 7], "marker": MARKERS[index % 7]}


def _arms(arms: Mapping[str, Row]) -> Iterator[tuple[dict[str, Any], str, Row]]:
    """(look, name, arm): a method has the same look in every figure, others those that are left; every other one is dashed, as curves may meet."""
    taken = {METHODS.index(name) for name in arms if name in METHODS}
    free = (i for i in count() if i not in taken)
    for name, arm in arms.items():
        index = METHODS.index(name) if name in METHODS else next(free)
        yield (
            _look(index)
            | ({"linestyle": "--", "mfc": "none"} if index % 2 else {"linestyle": "-"}),
            name,
            arm,
        )


def _points(
    axes: Axes, x: Any, points: Sequence[Sequence[float | None]], linestyle: str = "", **look: Any
) -> None:
    """[value, low, high] rows as markers with their intervals."""
    table = np.array([[np.nan if v is None else v for v in p] for p in points], float).reshape(
        -1, 3
    )
    error = np.nan_to_num(np.abs(table[:, 1:] - table[:, :1])).T
    axes.errorbar(x, table[:, 0], error, linestyle=linestyle, capsize=2, **look)


def _bars(axes: Axes, x: Any, bars: Row | None) -> None:
    """Floor and ceiling against the number of answers x."""
    for name, dash in (("floor", ":"), ("ceiling", "--")) if bars else ():
        axes.plot(
            x,
            [((bars or {})[name] + [np.nan] * max(x))[n - 1] for n in x],
            color=GREY,
            linestyle=dash,
            linewidth=1,
            label=name,
        )


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a tenth of the run; missing values do not count."""
    seen, width = ~np.isnan(values), max(1, len(values) // 10)
    sums = np.cumsum([np.where(seen, values, 0.0), seen], axis=1)
    sums[:, width:] -= sums[:, :-width].copy()
    return np.divide(sums[0], sums[1], out=np.full(len(values), np.nan), where=sums[1] > 0)


def series(rows: Sequence[Row], key: str) -> np.ndarray:
    return np.array([np.nan if r.get(key) is None else r[key] for r in rows], float)


def learning_curves(
    runs: Mapping[str, Sequence[Sequence[Row]]],
    evals: Mapping[str, Sequence[Row]],
    keys: Sequence[str],
    bars: Row,
) -> Figure:
    """One panel a metric. runs: setting -> the rows of metrics.jsonl, one list per seed; the mean over seeds of the running mean, in a band from the
    lowest to the highest seed. evals: setting -> history of eval.json, as points with intervals. bars: an eval.json with floor and ceiling."""
    with _panels(len(keys), 3.4, 2.5) as (figure, panels):
        figure.get_layout_engine().set(w_pad=0.12)  # type: ignore[union-attr, call-arg]
        for axes, key in zip(panels, keys, strict=True):
            axes.set(title=key, xlabel="step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            name = key.partition("/")[2]
            for index, (setting, seeds) in enumerate(runs.items()):
                last, colour = min(len(rows) for rows in seeds), COLOURS[index % 7]
                raw, steps = (
                    np.array([series(rows[:last], key) for rows in seeds]),
                    [r["step"] for r in seeds[0][:last]],
                )
                curves = np.array([smoothed(row) for row in raw])
                if len(runs) == len(seeds) == 1:
                    axes.plot(steps, raw[0], color=colour, alpha=0.25, linewidth=0.7)
                axes.fill_between(
                    steps, curves.min(0), curves.max(0), color=colour, alpha=0.18, linewidth=0
                )
                label = setting + f" ({len(seeds)} seeds)" * (len(seeds) > 1)
                axes.plot(
                    steps, curves.mean(0), color=colour, linestyle=DASHES[index % 4], label=label
                )
                told = [
                    h
                    for h in evals.get(setting, ())
                    if key.startswith("train/") and h.get(name) is not None
                ]
                points = [[h[name], *h.get("interval", {}).get(name, (None, None))] for h in told]
                _points(
                    axes,
                    [h["step"] for h in told],
                    points,
                    mfc="white",
                    linewidth=1,
                    **_look(index),
                )
            for bar in (
                ("floor", "ceiling")
                if key.startswith("train/") and name.startswith(BEST_IS_KNOWN)
                else ()
            ):
                value = (bars.get(bar) or {}).get(name)
                if value is not None:
                    axes.axhline(value, color=GREY, linestyle=":", linewidth=1)
                    place: Any = {
                        "xycoords": ("axes fraction", "data"),
                        "xytext": (3, 0),
                        "textcoords": "offset points",
                    }
                    axes.annotate(
                        bar,
                        (1, value),
                        color=GREY,
                        fontsize=7,
                        va="center",
                        annotation_clip=False,
                        **place,
                    )
        if len(runs) > 1:
            figure.legend(
                *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2
            )
    return figure


def components(rows: Sequence[Row]) -> Figure:
    """The weighted reward terms of one run over time; they add up to the total."""
    with _panels(1, 5.2, 2.8) as (figure, (axes,)):
        axes.set(title="reward components", xlabel="step")
        steps = [r["step"] for r in rows]
        for name, colour, dash in zip(PARTS, COLOURS, DASHES, strict=False):
            values = series(rows, name)
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
            axes.plot(steps, smoothed(values), color=colour, linestyle=dash, label=name)
        figure.legend(loc="outside right center")
    return figure


def reliability(arms: Mapping[str, Row]) -> Figure:
    """Per arm: how often answers of each confidence bin are right, with 95 % intervals, over how many answers there are."""
    shown = {name: arm for name, arm in arms.items() if arm["reliability"]}
    with _panels(
        2 * len(shown), 2.7, 1.7, columns=len(shown), sharex=True, height_ratios=(3, 1)
    ) as (figure, axes):
        for top, below, (look, name, arm) in zip(
            axes, axes[len(shown) :], _arms(shown), strict=False
        ):
            bins = arm["reliability"]
            top.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
            _points(top, [b["said"] for b in bins], [b["right"] for b in bins], **look)
            ece = arm["metrics"]["ece"][0]
            top.set(
                title=f"{name}   ECE {'–' if ece is None else f'{ece:.3f}'}",
                ylim=(-0.03, 1.03),
                xlim=(-0.03, 1.03),
            )
            centres = [int(min(b["said"], 0.999) * 10) / 10 + 0.05 for b in bins]
            below.bar(centres, [b["count"] for b in bins], width=0.08, color=look["color"])
            below.set(xlabel="confidence")
        axes[0].set(ylabel="share right")
        axes[len(shown)].set(ylabel="answers")
    return figure


def coverage(arms: Mapping[str, Row], bars: Row | None) -> Figure:
    """Distinct correct answers against the number of answers k, and against tokens, each with 95 % intervals."""
    with _panels(2, 4.6, 3.2, sharey=True) as (figure, (by_answers, by_tokens)):
        _bars(by_answers, (bars or {}).get("k"), bars)
        for look, name, arm in _arms(arms):
            curve = arm["curve"]
            middle, low, high = np.array(curve["coverage"], float).T
            for axes, x in ((by_answers, curve["k"]), (by_tokens, curve["tokens"])):
                axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
                axes.plot(x, middle, label=name, markevery=max(1, len(x) // 10), **look)
        by_answers.set(title="coverage at equal answers", xlabel="answers k", ylabel="coverage")
        by_tokens.set(title="coverage at equal tokens", xlabel="completion tokens")
        figure.legend(*by_answers.get_legend_handles_labels(), loc="outside right center")
    return figure


def unique_answers(arms: Mapping[str, Row]) -> Figure:
    """How many different answers each item got, as shares of the items; only arms with the most answers, as others cannot be compared."""
    most = max(a["num_answers"] * a["num_sets"] for a in arms.values())
    with _panels(1, 5.2, 2.8) as (figure, (axes,)):
        shown = {n: a for n, a in arms.items() if a["num_answers"] * a["num_sets"] == most}
        for look, name, arm in _arms(shown):
            counts = {int(value): count for value, count in arm["unique_histogram"].items()}
            x = range(min(counts) - 1, max(counts) + 2)
            share = [counts.get(value, 0) / sum(counts.values()) for value in x]
            axes.plot(x, share, label=name, **look)
        axes.set(
            title=f"different answers among {most}",
            xlabel="different answers",
            ylabel="share of items",
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside right center")
    return figure


def tokens_per_answer(arms: Mapping[str, Row]) -> Figure:
    """Completion tokens that each arm spends on one answer: mean (dot), middle half (bar) and range (line) over completions."""
    with _panels(1, 5.2, 0.9 + 0.21 * len(arms)) as (figure, (axes,)):
        for index, arm in enumerate(arms.values()):
            each = np.array(arm["tokens"]) / arm["num_answers"]
            low, first, third, high = np.quantile(each, [0, 0.25, 0.75, 1])
            axes.plot([low, high], [index, index], color=GREY, linewidth=1)
            axes.plot(
                [first, third], [index, index], color=COLOURS[4], linewidth=6, solid_capstyle="butt"
            )
            axes.plot(each.mean(), index, "o", color=COLOURS[0])
        axes.set_yticks(range(len(arms)), list(arms))
        axes.set(
            title="tokens per answer",
            xlabel="completion tokens / K",
            xlim=(0, None),
            ylim=(len(arms) - 0.5, -0.5),
        )
    return figure


def size_sweep(arms: Mapping[str, Row], bars: Row | None) -> Figure:
    """Coverage of one set and its tokens against how many answers were asked for."""
    sizes = sorted(
        (a for n, a in arms.items() if n == "policy" or n.startswith("K=")),
        key=lambda a: a["num_answers"],
    )
    with _panels(2, 2.9, 2.8) as (figure, (left, right)):
        x = [a["num_answers"] for a in sizes]
        _bars(left, x, bars)
        _points(
            left,
            x,
            [a["metrics"][f"coverage@{a['num_answers']}"] for a in sizes],
            "-",
            label="policy",
            **_look(0),
        )
        _points(right, x, [a["metrics"]["tokens_per_set"] for a in sizes], "-", **_look(1))
        left.set(title="coverage of one set", xlabel="answers asked for", xticks=x)
        right.set(title="tokens of one set", xlabel="answers asked for", xticks=x, ylim=(0, None))
        left.legend()
    return figure


def headline_keys(document: Row, rows: Sequence[Row]) -> list[str]:
    """The logged metrics that the learning curves show, in order; `document` is an `eval.json`."""
    stage: Row = next((document[s] for s in ("after", "before", "ceiling") if document.get(s)), {})
    names = [
        *(n for n in stage if n.startswith("coverage@")),
        "top1",
        "brier",
        "ece",
        "format_rate",
    ]
    return [
        k
        for k in ["reward/total", *(f"train/{n}" for n in names)]
        if any(r.get(k) is not None for r in rows)
    ]


def of_run(folder: Path) -> dict[str, Figure]:
    """The figures of one run's folder: learning curves and reward components."""
    rows, _ = read_jsonl(folder / "metrics.jsonl")
    document = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    learning = learning_curves(
        {"run": [rows]},
        {"run": document.get("history", [])},
        headline_keys(document, rows),
        document,
    )
    return {"learning": learning, "components": components(rows)}


def of_evaluation(document: Row) -> dict[str, Figure]:
    """The figures of an `evaluation.json`, by name."""
    arms, bars = document["arms"], document.get("bars")
    same = {n: a for n, a in arms.items() if not n.startswith("K=")}
    out = {"coverage": coverage(same, bars)}
    if any(a["reliability"] for a in same.values()):
        out["reliability"] = reliability(same)
    if len(same) < len(arms):
        out["sizes"] = size_sweep(arms, bars)
    return out | {"unique_answers": unique_answers(same), "tokens": tokens_per_answer(arms)}


def save(figures: Mapping[str, Figure], folder: Path) -> dict[str, Path]:
    """Write each figure as `name.svg` and `name.png`; returns the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in figures}

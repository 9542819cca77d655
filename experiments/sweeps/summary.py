"""The tables of the sweeps on clinic, from their logs alone; `make report` writes them."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from experiments.algorithms import summary as algorithms
from experiments.claims import summary as claims
from experiments.claims.summary import Columns, Log, grid, lines_of, metric, told
from experiments.sweeps.run import EXPERIMENTS, SIZES, SWEEPS, WINDOW
from mar.figures.plots import STYLE
from mar.measure.bounds import gap_closed

HERE = EXPERIMENTS / "k_sweep"  # where the figure is
SECONDS = (60, 120, 180)


def read_logs(sweep: str) -> dict[str, list[Log]]:
    """Setting -> its logs."""
    return claims.grouped(EXPERIMENTS / sweep / "logs", "setting", SWEEPS[sweep])


def of_set(log: Log) -> float:
    """Exact mass that one set covers."""
    return float(log["curve"]["coverage"][0][0])


def gap(log: Log) -> float:
    """Of one set, between as many draws from the posterior (0) and its most probable answers (1)."""
    k = log["num_answers"]
    return gap_closed(of_set(log), log["bars"]["floor"][k - 1], log["bars"]["ceiling"][k - 1])


MEASURES = {name: metric(name) for name in ("top1", "ece", "q_mse", "brier")}


def k_sweep() -> str:
    """Trained for K answers, measured with K."""
    columns: Columns = {
        "right per set": of_set,
        "floor": lambda log: log["bars"]["floor"][log["num_answers"] - 1],
        "ceiling": lambda log: log["bars"]["ceiling"][log["num_answers"] - 1],
        "gap_closed": gap,
        "12 answers cover": lambda log: claims.on_curve(log, "coverage", 12),
        **MEASURES,
        "tokens per set": metric("tokens_per_set"),
    }
    return lines_of(read_logs("k_sweep"), columns, "trained")


def asked() -> str:
    """Trained for three answers, asked for others: one set a patient."""
    trained = read_logs("k_sweep")["K = 3"]
    rows = {
        name: [{**log["sizes"][name], "bars": log["bars"]} for log in trained] for name in SIZES
    }
    rows = dict(sorted({**rows, "K=3": trained}.items()))
    columns: Columns = {
        "right per set": of_set,
        "gap_closed": gap,
        **MEASURES,
        "format_rate": metric("format_rate"),
    }
    return lines_of(rows, columns | {"repeats per set": metric("repeats_per_set")}, "asked")


def brier_weight() -> str:
    """K times the paper's weight is the default of `algo=own`, and a row of the K sweep."""
    rows = read_logs("brier_weight") | {"weight 3": read_logs("k_sweep")["K = 3"]}
    ordered = dict(sorted(rows.items(), key=lambda row: int(row[0].split()[1])))
    columns: Columns = {
        "gap_closed": gap,
        **MEASURES,
        "auroc": metric("auroc"),
        "tv_distance": metric("tv_distance"),
    }
    return lines_of(ordered, columns, "setting")


def obedient(right: Sequence[float]) -> list[float]:
    """The confidences with the least Brier loss among those that add up to at most 1: all lowered by as much, none below 0."""
    q = np.array(right, dtype=float)
    while q.sum() > 1 + 1e-9:
        q[q > 0] -= (q.sum() - 1) / (q > 0).sum()
        q = q.clip(0)
    return q.tolist()


def sum_rule() -> str:
    """Several answers are right at once. Of each slot: how often it is right, the mean confidence, and the best one that obeys the rule."""
    columns: dict[str, Callable[[Log], float | None]] = {"right per set": of_set}
    for k in range(3):
        columns[f"right {k + 1}"] = lambda log, k=k: log["slots"]["right"][k]  # type: ignore[misc]
        columns[f"said {k + 1}"] = lambda log, k=k: log["slots"]["confidence"][k]  # type: ignore[misc]
        columns[f"obeying {k + 1}"] = lambda log, k=k: obedient(log["slots"]["right"])[k]  # type: ignore[misc]
    columns |= {
        "sum above 1": lambda log: log["slots"]["above_1"],
        "ece": metric("ece"),
        "brier": metric("brier"),
    }
    return lines_of(
        read_logs("sum_rule"), columns | {"format_rate": metric("format_rate")}, "setting"
    )


def sum_rule_steps() -> str:
    """What the confidences of a set add up to while it is trained, seed by seed, where the log has kept that."""
    logs = {
        name: [log["sums"] for log in logs if "sums" in log]
        for name, logs in read_logs("sum_rule").items()
    }

    def shown(means: Sequence[float | None]) -> str:
        return ", ".join("–" if mean is None else f"{mean:.2f}" for mean in means)

    lines = [[name, *map(shown, zip(*sums, strict=True))] for name, sums in logs.items()]
    return grid(
        [
            "setting, steps",
            *(f"{WINDOW * n + 1} to {WINDOW * (n + 1)}" for n in range(len(lines[0]) - 1)),
        ],
        lines,
    )


def thinking() -> str:
    """With thoughts: what as many answers, and as many tokens, cover. Answers are of several completions, whose thoughts all count."""

    def at_tokens(tokens: int) -> Callable[[Log], float | None]:
        def covered(log: Log) -> float | None:
            spent = log["curve"]["tokens"]
            within = [
                c[0] for t, c in zip(spent, log["curve"]["coverage"], strict=True) if t <= tokens
            ]
            return (
                within[-1] if within and tokens < spent[-1] + spent[0] else None
            )  # else one more would have fitted

        return covered

    columns: Columns = {
        f"{k} answers": lambda log, k=k: claims.on_curve(log, "coverage", k) for k in (3, 6, 12)
    }  # type: ignore[misc]
    columns = columns | {f"{n} tokens": at_tokens(n) for n in (60, 120, 180)} | MEASURES
    return lines_of(
        read_logs("thinking"),
        columns | {"tokens per completion": metric("tokens_per_set")},
        "trained",
    )


def credit() -> str:
    """The logs of experiments/algorithms at equal seconds of their own clock: held-out gap_closed between their evaluations, interpolated."""
    lines = []
    for setting in ("rloo, to_go", "rloo, set", "own"):
        logs = algorithms.read_logs()[setting]
        rows = []
        for log in logs:
            floor, ceiling = (log[name]["coverage@3"] for name in ("floor", "ceiling"))
            closed = [gap_closed(h["coverage@3"], floor, ceiling) for h in log["history"]]
            per_step = log["job_s"] / log["history"][-1]["step"]
            rows.append(
                [
                    per_step,
                    *np.interp(
                        SECONDS, [h["step"] * per_step for h in log["history"]], closed
                    ).tolist(),
                    closed[-1],
                ]
            )
        lines.append(
            [setting, str(len(logs)), *(told(column) for column in zip(*rows, strict=True))]
        )
    return grid(
        ["credit", "seeds", "s a step", *(f"after {s} s" for s in SECONDS), "after 140 steps"],
        lines,
    )


def write() -> None:
    """answers.png: what one set covers against the number of its answers, for policies trained for that number and for one trained for three."""
    trained = read_logs("k_sweep")
    three = trained["K = 3"]
    bars = three[0]["bars"]
    lines = {
        "trained for K, asked for K": {
            logs[0]["num_answers"]: [of_set(log) for log in logs] for logs in trained.values()
        },
        "trained for 3, asked for K": {
            int(size[2:]): [of_set(log["sizes"][size]) for log in three] for size in SIZES
        }
        | {3: [of_set(log) for log in three]},
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for (label, points), (colour, marker, shift) in zip(
            lines.items(), (("#0072b2", "o", -0.05), ("#d55e00", "s", 0.05)), strict=True
        ):
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
        for name, dash in (("ceiling", "--"), ("floor", ":")):
            axes.plot(
                range(1, 7),
                bars[name][:6],
                color="0.4",
                ls=dash,
                lw=1,
                label=f"{name}: {'the best' if name == 'ceiling' else 'drawn'} K",
            )
        axes.set(xlabel="answers K in one set", ylabel="right answers per set", xticks=range(1, 7))
        axes.legend(frameon=False)
        figure.savefig(HERE / "answers.png", dpi=150)

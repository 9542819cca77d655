"""Tables and figures of the comparison on a real language model, from its logs alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.tables import Log, markdown_table, read_logs_by
from experiments.real_model.row import METHODS, OF_SETS, WARM_UPS, cold_of, warm_up_of
from mar.measure.bootstrap import mean_of, resample_weights, with_interval

HERE = Path(__file__).parent
LOGS = HERE / "logs"
KS = (3, 9, 15)
SET_SIZE = 3
# What one set is compared with.
SINGLES = ("rlvr_single", "warm_up_rlvr_single")
# What the figures show: all rows would hide each other.
DRAWN = (
    "rlvr_single",
    "multi_rlcr_own",
    "multi_rlcr_own_taught",
    "warm_up_rlvr_single",
    "warm_up_multi_rlcr",
)
COVERAGE = ("top1", "format_rate", "repeats_per_set", "tokens_per_set")
CHANGED = ("top1", "coverage@3", "coverage@15", "unique@15", "ece", "auroc", "q_mse")
CALIBRATION = ("ece", "auroc", "brier", "q_mse", "tv_distance")


def read_rows() -> dict[str, list[Log]]:
    """Method -> the logs of its seeds; the warm-up first."""
    return read_logs_by(LOGS / "rows", "method", (*WARM_UPS, *METHODS))


def shown(value: Sequence[float | None] | None) -> str:
    """Of [value, low, high]: the value, and its interval in brackets."""
    if value is None or value[0] is None:
        return "–"
    middle, low, high = value
    if low is None or high is None:
        return f"{middle:.3f}"
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def over_questions(values: np.ndarray) -> list[float | None]:
    """Mean and 95 % interval of one value per question, by resampling the questions."""
    return with_interval(mean_of(values), resample_weights(len(values)))


# ---------------------------------------------------------------------- one row a method and seed


def of_answers(log: Log, name: str, k: int) -> list[float | None] | None:
    """[value, low, high] of a curve at k answers; None where the sets do not add up to k."""
    points = dict(zip(log["curve"]["k"], log["curve"][name], strict=True))
    return points.get(k)


def coverage_table() -> str:
    """Coverage and different answers of each method and seed, between the known bounds."""
    rows = []
    logs = read_rows()
    for method, of_seeds in logs.items():
        for log in of_seeds:
            cells = [shown(of_answers(log, "coverage", k)) for k in KS]
            different = of_answers(log, "unique", 9)
            cells.append("–" if different is None else f"{different[0]:.2f}")
            for name in COVERAGE:
                value = log["metrics"].get(name)
                cells.append("–" if value is None else f"{value[0]:.3g}")
            rows.append([method, str(log["seed"]), *cells])
    rows += bound_rows(next(iter(logs.values()))[0])
    columns = [*(f"coverage@{k}" for k in KS), "different of 9", *COVERAGE]
    return markdown_table(["method", "seed", *columns], rows)


def short_table(chosen: Sequence[str]) -> str:
    """What the first page shows of these methods, each seed by itself, without intervals."""
    logs = read_rows()
    rows = []
    for method in chosen:
        for log in logs[method]:
            cells = [
                value_of(of_answers(log, "coverage", 3), decimals=3),
                value_of(of_answers(log, "coverage", 15), decimals=3),
                value_of(of_answers(log, "unique", 9), decimals=1),
                value_of(log["metrics"].get("ece"), decimals=3),
                value_of(log["metrics"].get("auroc"), decimals=3),
            ]
            rows.append([method, str(log["seed"]), *cells])
    columns = ["coverage@3", "coverage@15", "different of 9", "ece", "auroc"]
    return markdown_table(["method", "seed", *columns], rows)


def value_of(value: Sequence[float | None] | None, decimals: int) -> str:
    """Of [value, low, high]: the value alone."""
    if value is None or value[0] is None:
        return "–"
    return f"{value[0]:.{decimals}f}"


def bound_rows(log: Log) -> list[list[str]]:
    """The most frequent answers, different draws from the posterior, its most probable answers."""
    document = json.loads((LOGS / "constant.json").read_text(encoding="utf-8"))
    constant = np.array(document["coverage_of_questions"])
    empty = ["–"] * len(COVERAGE)
    rows = [["constant answers", "–", *(shown(over_questions(constant[:, k - 1])) for k in KS)]]
    for bound in ("floor", "ceiling"):
        rows.append([bound, "–", *(f"{log['bars'][bound][k - 1]:.3f}" for k in KS)])
    return [[*row, "9.00", *empty] for row in rows]


def calibration_table() -> str:
    """Confidences of each method and seed that writes them."""
    rows = []
    for method, of_seeds in read_rows().items():
        for log in of_seeds:
            if log["reliability"]:
                cells = [shown(log["metrics"].get(name)) for name in CALIBRATION]
                rows.append([method, str(log["seed"]), *cells])
    return markdown_table(["method", "seed", *CALIBRATION], rows)


# ---------------------------------------------------------------------- on the same questions


def covered(log: Log, k: int) -> np.ndarray | None:
    """[B] coverage of each question with k answers; None where the sets do not add up to k."""
    if k not in log["curve"]["k"]:
        return None
    place = log["curve"]["k"].index(k)
    return np.array(log["coverage_of_questions"])[:, place]


def at_tokens(log: Log, tokens: float) -> np.ndarray | None:
    """[B] coverage with so many tokens a question; between two numbers of sets it is interpolated.

    None where more sets than were sampled would be needed.
    """
    spent = [0.0, *log["curve"]["tokens"]]
    if tokens > spent[-1]:
        return None
    of_sets = np.array(log["coverage_of_questions"])
    from_none = np.concatenate([np.zeros((len(of_sets), 1)), of_sets], axis=1)
    return np.array([np.interp(tokens, spent, of_question) for of_question in from_none])


def difference(ours: np.ndarray | None, theirs: np.ndarray | None) -> str:
    """Ours minus theirs, on the same questions."""
    if ours is None or theirs is None:
        return "–"
    return shown(over_questions(ours - theirs))


def paired_table() -> str:
    """One set of three minus single answers, on the same questions: every seed with every other."""
    logs = read_rows()
    singles = [log for method in SINGLES for log in logs.get(method, [])]
    rows = []
    for method in OF_SETS:
        for log in logs.get(method, []):
            one_set = covered(log, SET_SIZE)
            tokens = log["curve"]["tokens"][0]
            for other in singles:
                rows.append(
                    [
                        method,
                        str(log["seed"]),
                        other["method"],
                        str(other["seed"]),
                        difference(one_set, covered(other, SET_SIZE)),
                        difference(one_set, at_tokens(other, tokens)),
                        f"{tokens / other['curve']['tokens'][0]:.1f}",
                    ]
                )
    columns = ["at 3 answers", "at equal tokens", "its answers then"]
    return markdown_table(["one set of", "seed", "minus", "its seed", *columns], rows)


def change_table() -> str:
    """Each method and seed minus the warm-up asked in the same form, on the same questions."""
    logs = read_rows()
    rows = []
    for method in METHODS:
        for log in logs.get(method, []):
            before = logs[warm_up_of(method)][0]
            cells = [change(log, before, name) for name in CHANGED]
            rows.append([method, str(log["seed"]), *cells])
    return markdown_table(["method", "seed", *CHANGED], rows)


def cold_table() -> str:
    """Coverage of each method and seed minus that of cold draws of the warm-up."""
    logs = read_rows()
    rows = []
    for method in METHODS:
        for log in logs.get(method, []):
            for cold in logs.get(cold_of(method), []):
                cells = [difference(covered(log, k), covered(cold, k)) for k in KS]
                rows.append([method, str(log["seed"]), cold["method"], *cells])
    return markdown_table(["method", "seed", "minus", *(f"coverage@{k}" for k in KS)], rows)


def change(log: Log, before: Log, name: str) -> str:
    if name.startswith("coverage@"):
        k = int(name.removeprefix("coverage@"))
        return difference(covered(log, k), covered(before, k))
    return shown(log["paired"].get(name))


# ---------------------------------------------------------------------- figures


def figures() -> Mapping[str, Any]:
    """Coverage against answers and tokens, and reliability; of the first seed."""
    from mar.figures import plots

    logs = read_rows()
    arms: dict[str, Any] = {method: logs[method][0] for method in DRAWN if method in logs}
    bars = next(iter(arms.values()))["bars"]
    found = {"coverage": plots.coverage(arms, bars)}
    confident = {name: arm for name, arm in arms.items() if arm["reliability"]}
    if confident:
        found["reliability"] = plots.reliability(confident)
    return found


def write() -> None:
    """The figures; the README shows the PNG files, so no SVG is kept."""
    from mar.figures import plots

    plots.save(figures(), HERE / "figures")
    for file in (HERE / "figures").glob("*.svg"):
        file.unlink()

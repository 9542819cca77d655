"""Tables and figure of the comparison on a real language model, from its logs alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.tables import Log, markdown_table, read_logs_by
from experiments.real_model.row import METHODS, WARM_UPS
from mar.measure.bootstrap import resample_weights

HERE = Path(__file__).parent
LOGS = HERE / "logs"
KS = (3, 9, 15)
SET_SIZE = 3
# The methods that are compared with RLVR-Single.
SETS = ("multi_rlvr", "multi_rlcr", "multi_rlcr_own", "multi_rlcr_own_exact")
COVERAGE = ("top1", "format_rate", "repeats_per_set", "tokens_per_set")
CHANGED = ("top1", "coverage@3", "coverage@15", "unique@15", "ece", "auroc", "q_mse")
CALIBRATION = ("ece", "auroc", "brier", "q_mse", "tv_distance")
Curves = dict[str, np.ndarray]


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


def over_questions(values: np.ndarray) -> list[float]:
    """Mean and 95 % interval of one value per question, by resampling the questions."""
    weights = resample_weights(len(values))
    means = weights @ values / weights.sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return [float(values.mean()), float(low), float(high)]


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


def curves_of(log: Log) -> Curves:
    """Per question: coverage [B, sets] and different answers [B, sets]."""
    return {
        "coverage": np.array(log["coverage_of_questions"]),
        "unique": np.array(log["unique_of_questions"]),
    }


def at_tokens(log: Log, tokens: float) -> np.ndarray:
    """[B] coverage with so many tokens a question; between two numbers of sets it is interpolated.

    Beyond the last set that was sampled, its coverage.
    """
    covered = curves_of(log)["coverage"]
    spent = [0.0, *log["curve"]["tokens"]]
    from_none = np.concatenate([np.zeros((len(covered), 1)), covered], axis=1)
    return np.array([np.interp(tokens, spent, of_question) for of_question in from_none])


def paired_table() -> str:
    """One set of three minus RLVR-Single of the same seed, on the same questions."""
    logs = read_rows()
    single = {log["seed"]: log for log in logs.get("rlvr_single", [])}
    rows = []
    for method in SETS:
        for log in logs.get(method, []):
            other = single.get(log["seed"])
            if other is None:
                continue
            one_set = curves_of(log)["coverage"][:, 0]
            three = curves_of(other)["coverage"][:, SET_SIZE - 1]
            tokens = log["curve"]["tokens"][0]
            answers = tokens / other["curve"]["tokens"][0]
            rows.append(
                [
                    method,
                    str(log["seed"]),
                    shown(over_questions(one_set - three)),
                    shown(over_questions(one_set - at_tokens(other, tokens))),
                    f"{answers:.1f}",
                ]
            )
    columns = ["at 3 answers", "at equal tokens", "answers of RLVR-Single then"]
    return markdown_table(["method", "seed", *columns], rows)


def change_table() -> str:
    """Each method and seed minus the warm-up asked in the same form, on the same questions."""
    rows = []
    for method, of_seeds in read_rows().items():
        if method not in METHODS:
            continue
        for log in of_seeds:
            paired = log["paired"][0]
            cells = [shown(paired.get(name)) for name in CHANGED]
            rows.append([method, str(log["seed"]), *cells])
    return markdown_table(["method", "seed", *CHANGED], rows)


# ---------------------------------------------------------------------- figures


def drawn_arms(methods: Sequence[str]) -> dict[str, Any]:
    """The first seed of each method, as `mar.figures.plots` draws arms."""
    logs = read_rows()
    return {method: logs[method][0] for method in methods if method in logs}


def figures() -> Mapping[str, Any]:
    """Coverage against answers and tokens, and reliability; of the first seed."""
    from mar.figures import plots

    methods = ("multi_rlcr_own", "multi_rlvr", "rlvr_single", "warm_up_multi_rlcr")
    arms = drawn_arms((*methods, "warm_up_rlvr_single"))
    bars = next(iter(arms.values()))["bars"]
    found = {"coverage": plots.coverage(arms, bars)}
    confident = drawn_arms(("multi_rlcr_own", "rlcr_single", "warm_up_multi_rlcr"))
    if confident:
        found["reliability"] = plots.reliability(confident)
    return found


def main() -> None:
    from mar.figures import plots

    plots.save(figures(), HERE / "figures")
    for file in (HERE / "figures").glob("*.svg"):
        file.unlink()


if __name__ == "__main__":
    main()

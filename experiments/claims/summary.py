"""Tables, figures and results.json of the comparison on clinic, from its logs alone; `make report` calls `write`, `make lint` calls `stale`."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mar.measure.bootstrap import student_t_95
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
    "multi_rlcr_1400_exact",
    "multi_rlcr_700_exact_entropy",
    "multi_rlcr_700_all",
    "multi_rlcr_700_exact_all",
    "base",
    "single",
    "prompted_k",
    "verbalized",
)
KS = range(3, 31, 3)
OF_SETS = (
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
Log = Mapping[str, Any]
Columns = Mapping[str, Callable[[Log], float | None]]


def grouped(folder: Path, key: str, order: Iterable[str]) -> dict[str, list[Log]]:
    """The logs of a folder by what they say under `key`, in the order of the tables, and by seed."""
    found: dict[str, list[Log]] = defaultdict(list)
    for file in folder.glob("*.json"):
        log = json.loads(file.read_text(encoding="utf-8"))
        found[log[key]].append(log)
    return {
        name: sorted(found[name], key=lambda log: log["seed"]) for name in order if name in found
    }


def read_logs() -> dict[str, list[Log]]:
    """Method -> its logs."""
    return grouped(HERE / "logs", "method", ORDER)


def interval(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and Student's 95 % interval over n seeds; nulls where a seed has no value, an interval of null for one seed."""
    known = [v for v in values if v is not None]
    if len(known) < len(values) or not known:
        return {"mean": None, "lo": None, "hi": None, "n": len(values)}
    mean, n = float(np.mean(known)), len(known)
    half = student_t_95(n - 1) * float(np.std(known, ddof=1)) / math.sqrt(n) if n > 1 else None
    return {
        "mean": mean,
        "lo": None if half is None else mean - half,
        "hi": None if half is None else mean + half,
        "n": n,
    }


def on_curve(log: Log, name: str, k: int) -> float | None:
    """`coverage` or `unique` of k answers; None where the method's sets do not add up to k."""
    return dict(zip(log["curve"]["k"], log["curve"][name], strict=True)).get(k, [None])[0]


def numbers(log: Log) -> dict[str, float | None]:
    """Every metric of one log. Of single answers, `tokens_per_set` is of one, and what a set has is null."""
    out = {f"coverage@{k}": on_curve(log, "coverage", k) for k in KS}
    floor, ceiling = (log["bars"][name][2] for name in ("floor", "ceiling"))
    out["gap_closed"] = (
        None if out["coverage@3"] is None else gap_closed(out["coverage@3"], floor, ceiling)
    )
    out["unique@30"] = on_curve(log, "unique", 30)
    return out | {name: metric(name)(log) for name in OF_SETS}


def results(logs: Mapping[str, Sequence[Log]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{method: {metric: {mean, lo, hi, n}}}, with floor and ceiling, which are known exactly."""
    found = {}
    for method, own in logs.items():
        each = [numbers(log) for log in own]
        found[method] = {metric: interval([row[metric] for row in each]) for metric in each[0]}
    bars = next(iter(logs.values()))[0]["bars"]
    for name in ("floor", "ceiling"):
        exact = {f"coverage@{k}": bars[name][k - 1] for k in KS} | {
            "top1": bars[name][0],
            "unique@30": 30.0,
        }
        exact |= {"gap_closed": float(name == "ceiling")}
        known: dict[str, float | None] = dict.fromkeys(next(iter(found.values()))) | exact
        if name == "ceiling":
            known |= dict.fromkeys(("ece", "set_ece", "q_mse", "tv_distance"), 0.0)
        found[name] = {
            metric: {"mean": value, "lo": value, "hi": value, "n": 0}
            for metric, value in known.items()
        }
    return found


def cell(found: Mapping[str, Any]) -> str:
    """Mean ± half of the interval; without one where there is none, or where all seeds agree."""
    if found["mean"] is None:
        return "–"
    digits = 1 if abs(found["mean"]) >= 2 else 3
    half = 0.0 if found["lo"] is None else found["mean"] - found["lo"]
    return f"{found['mean']:.{digits}f}" + (f" ± {half:.{digits}f}" if half > 1e-9 else "")


def told(values: Sequence[float | None]) -> str:
    """Mean ± half of Student's 95 % interval over seeds."""
    return cell(interval(values))


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)
    )


def lines_of(rows: Mapping[str, Sequence[Log]], columns: Columns, first: str) -> str:
    """A table with a line for each setting: what the columns read off its logs, over seeds."""
    lines = [
        [
            name,
            str(len(logs)),
            *(told([column(log) for log in logs]) for column in columns.values()),
        ]
        for name, logs in rows.items()
    ]
    return grid([first, "seeds", *columns], lines)


def metric(name: str) -> Callable[[Log], float | None]:
    """The column of a metric of `mar.evaluate`."""
    return lambda log: (log["metrics"].get(name) or [None])[0]


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The comparison's table."""
    metrics = (
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
    rows = (
        [method, str(row["top1"]["n"] or "–"), *(cell(row[metric]) for metric in metrics)]
        for method, row in found.items()
    )
    return grid(["method", "seeds", *metrics], rows)


def predicted(first: int = 3) -> str:
    """How many metrics of the later seeds lie in the 95 % prediction interval m ± t s sqrt(1 + 1/n) of the first ones, and which do not."""
    inside, outside = 0, []
    for method, logs in read_logs().items():
        for name in (
            "coverage@3",
            "coverage@30",
            "unique@30",
            "top1",
            "ece",
            "q_mse",
            "tokens_per_set",
        ):
            values = [numbers(log)[name] for log in logs]
            if len(values) <= first or None in values:
                continue
            mean, half = (
                np.mean(values[:first]),
                student_t_95(first - 1) * np.std(values[:first], ddof=1) * math.sqrt(1 + 1 / first),
            )
            missed = [
                logs[i]["seed"] for i in range(first, len(values)) if abs(values[i] - mean) > half
            ]
            inside += len(values) - first - len(missed)
            outside += [f"{name} of {method}, seed {seed}" for seed in missed]
    return (
        f"{inside} of {inside + len(outside)} lie inside; outside: {', '.join(outside) or 'none'}."
    )


def averaged(
    logs: Sequence[Log], spread: Callable[[Sequence[float]], Mapping[str, Any]] = interval
) -> dict[str, Any]:
    """One arm as `mar.figures.plots` draws it: curves as means with the seeds' spread, answers of all seeds together, confidences of the first."""
    first, curve = (
        logs[0],
        {
            "k": logs[0]["curve"]["k"],
            "tokens": np.mean([log["curve"]["tokens"] for log in logs], 0).tolist(),
        },
    )
    for name in ("coverage", "unique"):
        each = np.array([[point[0] for point in log["curve"][name]] for log in logs])
        told = [spread(column.tolist()) for column in each.T]
        curve[name] = [
            [
                t["mean"],
                t["mean"] if t["lo"] is None else t["lo"],
                t["mean"] if t["hi"] is None else t["hi"],
            ]
            for t in told
        ]
    histogram: dict[str, int] = defaultdict(int)
    for log in logs:
        for value, count in log["unique_histogram"].items():
            histogram[value] += count
    tokens = [n for log in logs for n in log["tokens"]]
    said = {
        "metrics": {"ece": first["metrics"].get("ece") or [None]},
        "reliability": first["reliability"],
        "tokens": tokens,
    }
    return {
        "num_answers": first["num_answers"],
        "num_sets": first["num_sets"],
        "curve": curve,
        "unique_histogram": histogram,
        **said,
    }


def figures(logs: Mapping[str, Sequence[Log]]) -> dict[str, Any]:
    """coverage, reliability (first seed), unique answers and tokens per answer."""
    from mar.figures import plots

    arms = {
        method: averaged(own) for method, own in logs.items() if not any(map(str.isdigit, method))
    }  # of another length
    whole = {
        method: arm
        for method, arm in arms.items()
        if arm["num_answers"] * arm["num_sets"] == max(KS)
    }
    confident = {
        method: arm
        for method, arm in arms.items()
        if arm["reliability"] and method in ("multi_rlcr", "rlcr_single", "base")
    }
    bars = next(iter(logs.values()))[0]["bars"]
    few = {
        method: whole[method]
        for method in ("multi_rlcr", "rlvr_single", "base", "single")
        if method in whole
    }  # the others lie on these
    made = {"coverage": plots.coverage(whole, bars), "unique_answers": plots.unique_answers(few)}
    return made | {
        "reliability": plots.reliability(confident),
        "tokens": plots.tokens_per_answer(arms),
    }


def fingerprint() -> str:
    """Of the logs that figures and results.json were made from."""
    return hashlib.sha256(
        b"".join(file.read_bytes() for file in sorted((HERE / "logs").glob("*.json")))
    ).hexdigest()[:16]


def stale() -> bool:
    """Whether results.json and the figures are of other logs than those here."""
    file = HERE / "results.json"
    return (
        not file.exists() or json.loads(file.read_text(encoding="utf-8"))["logs"] != fingerprint()
    )


def write() -> None:
    from mar.figures import plots

    logs = read_logs()
    document = {"logs": fingerprint(), **results(logs)}
    (HERE / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plots.save(figures(logs), HERE / "figures")
    for file in (HERE / "figures").glob("*.svg"):
        file.unlink()  # the README shows the PNG files


def markdown() -> str:
    return table(results(read_logs()))

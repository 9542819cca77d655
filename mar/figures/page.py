"""One self-contained HTML file about runs:  python -m mar.report RUN | SWEEP | RUN_A RUN_B

A run: headline with intervals, figures, rollouts with their advantages, config, environment. A pair: what differs, curves overlaid. A folder of
runs: one line per setting with mean, interval and number of seeds. The file needs no network; what a model wrote reaches the page as text only.
"""

import base64
import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure

from mar.answers.grammar import grammar_of
from mar.answers.rewards import RewardSpec, component_layout
from mar.errors import UserError
from mar.figures import plots
from mar.files import jsonable, read_jsonl, skipped_lines
from mar.measure.baselines import at_tokens
from mar.measure.bootstrap import student
from mar.measure.metrics import SHOWN_METRICS
from mar.run.compose import load_config
from mar.run.folder import differing_keys, flatten

NUM_PROMPTS = 200  # in the rollout browser

Table = dict[str, Any]  # {"title", "note", "columns": [...], "rows": [[...]]}


@dataclass(frozen=True)
class Run:
    """What a run's folder holds. `evaluation`: what `mar.evaluate` found, {} where it was not run. `faults`: lines that had to be skipped."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    document: dict[str, Any]
    evaluation: dict[str, Any]
    faults: list[str]

    @property
    def num_answers(self) -> int:
        return int(self.config["reward"]["num_answers"])

    @property
    def finished(self) -> bool:
        return bool(self.document.get("after"))


def read_document(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: remove it, or the run") from None


def read_run(path: Path) -> Run:
    """UserError for what is no run, or is one that has not made a step."""
    try:
        config = dict(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
        config["reward"]["num_answers"]
    except FileNotFoundError:
        raise UserError(
            f"{path} holds no config.yaml: name a folder that mar.train wrote, or one above such folders"
        ) from None
    except (yaml.YAMLError, TypeError, KeyError, ValueError):
        raise UserError(
            f"{path}/config.yaml is damaged or of another version of mar: make the report with that version"
        ) from None
    metrics, faults = (
        read_jsonl(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else ([], [])
    )
    if not metrics:
        raise UserError(f"{path} has not finished a step yet: there is nothing to report")
    return Run(
        path,
        config,
        metrics,
        read_document(path / "eval.json"),
        read_document(path / "evaluation.json"),
        faults,
    )


def settings_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ by their seed alone under one name, which says how they differ from the others."""
    flat = [flatten(run.config) for run in runs]
    keys = sorted(
        {k for run in runs for k in differing_keys(runs[0].config, run.config)} - {"seed", "name"}
    )
    keys = [k for k in keys if k != "optim.lr" or "model.lr" not in keys]  # it follows the other
    groups: dict[str, dict[int, Run]] = defaultdict(dict)
    for run, one in zip(
        runs, flat, strict=True
    ):  # seed0 comes before seed0~1, an older run of the same: one seed counts once
        name = ", ".join(f"{k.rpartition('.')[2]}={one.get(k)}" for k in keys) or str(
            run.config["name"]
        )
        if one["seed"] not in groups[name] or (
            run.finished and not groups[name][one["seed"]].finished
        ):
            groups[name][one["seed"]] = run
    return {name: list(seeds.values()) for name, seeds in groups.items()}


def over_seeds(runs: Sequence[Run], metric: str) -> list[float | None]:
    """[mean, low, high] over finished runs: Student's 95 % interval of the seeds' means; with one seed, that of its items."""
    columns = [
        run.document["after"]
        for run in runs
        if run.finished and run.document["after"].get(metric) is not None
    ]
    values = [column[metric] for column in columns]
    if len(values) < 2:
        return with_interval(columns[0], metric) if columns else [None, None, None]
    mean = float(np.mean(values))
    half = student(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def with_interval(column: Mapping[str, Any], metric: str) -> list[float | None]:
    return [column.get(metric), *column.get("interval", {}).get(metric, (None, None))]


def svg(figure: Figure) -> str:
    """A figure as a data URL: an image, so that no name in it meets another figure's."""
    out = io.BytesIO()
    with rc_context(plots.STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def by_metric(title: str, note: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row for each metric that any column has."""
    metrics = dict.fromkeys(name for column in columns.values() for name in column)
    return {
        "title": title,
        "note": note,
        "columns": ["", *columns],
        "rows": [[m, *(c.get(m) for c in columns.values())] for m in metrics],
    }


def headline(run: Run) -> Table:
    """Floor, before, after and ceiling of each metric."""
    history = run.document.get("history", [])
    last = "after" if run.finished or len(history) < 2 else "latest"
    stages = run.document if last == "after" else run.document | {last: history[-1]}
    metrics = (f"coverage@{run.num_answers}", *SHOWN_METRICS)
    columns = {
        name: {m: with_interval(stages.get(name) or {}, m) for m in metrics}
        for name in ("floor", "before", last, "ceiling")
    }
    closed = run.document.get("gap_closed")
    note = f"{run.document.get('num_items', '?')} held-out items of {run.document.get('task', '?')}; intervals: 95 % bootstrap over items."
    note += (
        ""
        if closed is None
        else f" Gap closed: {closed:.3f} (0: K draws from the posterior, 1: its K most probable answers)."
    )
    return by_metric("Headline", note, columns)


def arms_table(evaluation: Mapping[str, Any]) -> list[Table]:
    """Every metric of every arm, coverage at equal tokens, and paired differences."""
    arms = {n: a for n, a in evaluation["arms"].items() if not n.startswith("K=")}
    says = " · ".join(f"{name}: {a['says']}" for name, a in arms.items())
    budgets = [budget["tokens"] for budget in evaluation["equal_tokens"]]
    equal = {
        name: {f"{budget:.0f} tokens": at_tokens(a["curve"], budget) for budget in budgets}
        for name, a in arms.items()
    }
    pairs = {
        pair: {m: v for m, v in values.items() if m != "num_items"}
        for pair, values in evaluation["paired"].items()
    }
    out = [
        by_metric(
            "Evaluation",
            f"{evaluation['num_items']} items. {says}.",
            {name: a["metrics"] for name, a in arms.items()},
        ),
        by_metric("Coverage at equal tokens", "– : outside of what was sampled.", equal),
        by_metric("Paired differences", "On the same items, resampled alike.", pairs),
    ]
    return out if pairs else out[:-1]


def browser(run: Run) -> tuple[Table, list[str]]:
    """The completions of up to NUM_PROMPTS prompts, from steps spread over the run, groups together; and broken lines."""
    path = run.path / "completions.jsonl"
    rows, faults = read_jsonl(path) if path.exists() else ([], [])
    groups: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row.get("stage") == "train" and isinstance(row.get("text"), str):
            groups[row["step"], str(row["id"])].append(row)
    steps = sorted({step for step, _ in groups})
    per_step = max(1, len(groups) // max(len(steps), 1))
    wanted = (
        {
            steps[round(i)]
            for i in np.linspace(
                0, len(steps) - 1, min(len(steps), max(2, NUM_PROMPTS // per_step))
            )
        }
        if steps
        else set()
    )
    kept = (
        "text",
        "answers",
        "confidences",
        "hits",
        "repeated",
        "reason",
        "reward",
        "components",
        "advantages",
        "num_tokens",
    )
    shown = [
        {"step": step, "id": id, "question": group[0].get("question", ""), "targets": group[0].get("targets", []),
         "rows": [{k: row[k] for k in kept if k in row} for row in group]}
        for (step, id), group in sorted(groups.items()) if step in wanted
    ]  # fmt: skip
    config = load_config(run.path / "config.yaml")
    brier = config.reward.brier if config.reward.confident else "none"
    names = [name for name, _ in component_layout(grammar_of(config), RewardSpec(brier=brier))]
    return {"groups": shown[:NUM_PROMPTS], "components": names}, faults


def settings_table(groups: Mapping[str, Sequence[Run]]) -> Table:
    """One line a setting."""
    metrics = list(
        dict.fromkeys([f"coverage@{runs[0].num_answers}" for runs in groups.values()])
    ) + list(SHOWN_METRICS[:-1])
    rows: list[list[Any]] = []
    for name, runs in groups.items():
        closed = [
            r.document["gap_closed"] for r in runs if r.document.get("gap_closed") is not None
        ]
        rows.append(
            [name, sum(r.finished for r in runs), float(np.mean(closed)) if closed else None]
        )
        rows[-1] += [over_seeds(runs, m) for m in metrics]
    note = "Mean over finished seeds (n) with Student's 95 % interval; with one seed, the bootstrap interval over its items."
    return {
        "title": "Settings",
        "note": note,
        "columns": ["setting", "n", "gap_closed", *metrics],
        "rows": rows,
    }


def differences(a: Run, b: Run) -> Table:
    """The keys in which two runs' configs differ."""
    one, two = flatten(a.config), flatten(b.config)
    rows = [
        [key, str(one.get(key, "–")), str(two.get(key, "–"))]
        for key in differing_keys(a.config, b.config)
    ]
    columns = ["", str(a.path), str(b.path)] if rows else []
    return {
        "title": "What differs",
        "note": "Everything else is the same." if rows else "No setting.",
        "columns": columns,
        "rows": rows,
    }


def figures_of(groups: Mapping[str, Sequence[Run]]) -> dict[str, Figure]:
    """Curves of all settings, and of a single run everything else that it has."""
    first, *others = (run for group in groups.values() for run in group)
    keys = list(
        dict.fromkeys(
            k for r in (first, *others) for k in plots.headline_keys(r.document, r.metrics)
        )
    )
    evals = {
        name: runs[0].document.get("history", []) if len(runs) == 1 else []
        for name, runs in groups.items()
    }
    rows = {name: [run.metrics for run in runs] for name, runs in groups.items()}
    out = {"learning curves": plots.learning_curves(rows, evals, keys, first.document)}
    arms = {n: runs[0].evaluation for n, runs in groups.items() if runs[0].evaluation}
    if arms and not others:
        out |= plots.of_evaluation(first.evaluation)
    elif arms:
        policies = {n: e["arms"]["policy"] for n, e in arms.items()}
        out |= {
            "coverage": plots.coverage(policies, first.evaluation.get("bars")),
            "tokens": plots.tokens_per_answer(policies),
        }
        if any(p["reliability"] for p in policies.values()):
            out["reliability"] = plots.reliability(policies)
    return out if others else out | {"reward components": plots.components(first.metrics)}


def page(runs: Sequence[Run], title: str) -> dict[str, Any]:
    """Everything that the template shows."""
    groups, faults = settings_of(runs), [f for run in runs for f in run.faults]
    notes = [
        f"{r.path} is unfinished: step {r.metrics[-1]['step']} of {r.config['train']['steps']}"
        for r in runs
        if not r.finished
    ]
    tables = [headline(runs[0])] if len(runs) == 1 else [settings_table(groups)]
    if len(runs) == 2:
        tables += [
            differences(*runs),
            *(headline(r) | {"title": f"Headline of {r.path}"} for r in runs),
        ]
    data: dict[str, Any] = {"title": title, "rollouts": None}
    if len(runs) == 1:
        if runs[0].evaluation:
            tables += arms_table(runs[0].evaluation)
        else:
            notes.append(
                f"No baselines, coverage curves or reliability yet: run python -m mar.evaluate {runs[0].path}"
            )
        data["rollouts"], broken = browser(runs[0])
        faults += broken
    if faults:
        notes.append(skipped_lines(faults))
    data |= {
        "notes": notes,
        "tables": tables,
        "figures": {name: svg(f) for name, f in figures_of(groups).items()},
    }
    data["configs"] = {str(r.path): yaml.safe_dump(r.config, sort_keys=False) for r in runs}
    data["provenance"] = runs[0].config.get("provenance", {})
    return jsonable(data)


def write(data: Mapping[str, Any], path: Path) -> None:
    """Fill the template. The data stand in a script element: escaping `<` keeps them from ever ending it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    template = files("mar.figures").joinpath("report.html").read_text(encoding="utf-8")
    path.write_text(
        template.replace("__DATA__", text.encode("utf-8", "replace").decode()), encoding="utf-8"
    )


def report(paths: Sequence[Path], out: Path | None) -> Path:
    """Write the report of a run, a folder of runs, or two runs; returns the file."""
    if len(paths) > 2:
        raise UserError("name one run, one folder of runs, or two runs")
    of_many = len(paths) == 1 and not (paths[0] / "config.yaml").exists()
    found = sorted(p.parent for p in paths[0].rglob("config.yaml")) if of_many else paths
    if of_many:
        found = [
            p for p in found if (p / "metrics.jsonl").exists()
        ] or found  # runs that have made a step; wandb keeps a config.yaml too
    if not found:
        raise UserError(f"{paths[0]} holds no run (no config.yaml in it or below it)")
    target = out or (paths[0] if len(paths) == 1 else Path()) / "report.html"
    write(page([read_run(p) for p in found], " against ".join(map(str, paths))), target)
    return target

"""One self-contained HTML file about runs:  python -m mar.report RUN | SWEEP | RUN_A RUN_B

A run: headline with intervals, figures, rollouts with their advantages, config, environment. A pair: what differs, curves overlaid. A folder of
runs: one line per setting with mean, interval and number of seeds. The file needs no network; what a model wrote reaches the page as text only.
"""

import argparse
import base64
import io
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure

from mar import plots
from mar.arms import at_tokens
from mar.compose import load_config
from mar.grammar import Grammar
from mar.log import plain, read_jsonl
from mar.metrics import SHOWN_METRICS
from mar.records import UserError, exit_code
from mar.rewards import RewardSpec, component_layout
from mar.rundir import differing_keys, flatten
from mar.runs import Run, over_seeds, read_run, settings_of, with_interval

NUM_PROMPTS = 200  # in the rollout browser
Table = dict[str, Any]  # {"title", "note", "columns": [...], "rows": [[...]]}


def svg(figure: Figure) -> str:
    """A figure as a data URL: an image, so that no name in it meets another figure's."""
    out = io.BytesIO()
    with rc_context(plots.STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def headline(run: Run) -> Table:
    """Floor, before, after and ceiling of each metric."""
    history = run.document.get("history", [])
    last = "after" if run.finished or len(history) < 2 else "latest"
    stages = run.document if last == "after" else run.document | {last: history[-1]}
    columns = {name: stages.get(name) or {} for name in ("floor", "before", last, "ceiling")}
    metrics = (f"coverage@{run.num_answers}", *SHOWN_METRICS)
    rows = [[metric, *(with_interval(c, metric) for c in columns.values())] for metric in metrics]
    closed = run.document.get("gap_closed")
    note = f"{run.document.get('num_items', '?')} held-out items of {run.document.get('task', '?')}; intervals: 95 % bootstrap over items."
    note += "" if closed is None else f" Gap closed: {closed:.3f} (0: K draws from the posterior, 1: its K most probable answers)."
    return {"title": "Headline", "note": note, "columns": ["", *columns], "rows": rows}


def arms_table(evaluation: Mapping[str, Any]) -> list[Table]:
    """Every metric of every arm, coverage at equal tokens, and paired differences."""
    arms = {n: a for n, a in evaluation["arms"].items() if not n.startswith("K=")}
    names = list(dict.fromkeys(name for a in arms.values() for name in a["metrics"]))
    rows: list[list[Any]] = [[name, *(a["metrics"].get(name) for a in arms.values())] for name in names]
    says = " · ".join(f"{name}: {a['says']}" for name, a in arms.items())
    out = [{"title": "Evaluation", "note": f"{evaluation['num_items']} items. {says}.", "columns": ["", *arms], "rows": rows}]
    equal = [
        [f"{b['tokens']:.0f} tokens", *(at_tokens(a["curve"], b["tokens"]) for a in arms.values())] for b in evaluation["equal_tokens"]
    ]
    out.append({"title": "Coverage at equal tokens", "note": "– : outside of what was sampled.", "columns": ["", *arms], "rows": equal})
    if pairs := evaluation["paired"]:
        metrics = list(dict.fromkeys(n for values in pairs.values() for n in values if n != "num_items"))
        table = [[m, *(values.get(m) for values in pairs.values())] for m in metrics]
        out.append({"title": "Paired differences", "note": "On the same items, resampled alike.", "columns": ["", *pairs], "rows": table})
    return out


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
    wanted = {steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(len(steps), max(2, NUM_PROMPTS // per_step)))} if steps else set()
    kept = ("text", "answers", "confidences", "hits", "repeated", "reason", "reward", "components", "advantages", "num_tokens")
    shown = [
        {"step": step, "id": id, "question": group[0].get("question", ""), "targets": group[0].get("targets", []),
         "rows": [{k: row[k] for k in kept if k in row} for row in group]}
        for (step, id), group in sorted(groups.items()) if step in wanted
    ]  # fmt: skip
    r = run.config["reward"]
    config = load_config(run.path / "config.yaml").reward
    grammar = Grammar(config.form, r["num_answers"], r["layout"], False, config.analysis, config.other)
    names = [name for name, _ in component_layout(grammar, RewardSpec(brier=config.brier if config.confident else "none"))]
    return {"groups": shown[:NUM_PROMPTS], "components": names}, faults


def settings_table(groups: Mapping[str, Sequence[Run]]) -> Table:
    """One line a setting."""
    metrics = list(dict.fromkeys([f"coverage@{runs[0].num_answers}" for runs in groups.values()])) + list(SHOWN_METRICS[:-1])
    rows: list[list[Any]] = []
    for name, runs in groups.items():
        closed = [r.document["gap_closed"] for r in runs if r.document.get("gap_closed") is not None]
        rows.append([name, sum(r.finished for r in runs), float(np.mean(closed)) if closed else None])
        rows[-1] += [over_seeds(runs, m) for m in metrics]
    note = "Mean over finished seeds (n) with Student's 95 % interval; with one seed, the bootstrap interval over its items."
    return {"title": "Settings", "note": note, "columns": ["setting", "n", "gap_closed", *metrics], "rows": rows}


def differences(a: Run, b: Run) -> Table:
    """The keys in which two runs' configs differ."""
    one, two = flatten(a.config), flatten(b.config)
    rows = [[key, str(one.get(key, "–")), str(two.get(key, "–"))] for key in differing_keys(a.config, b.config)]
    note = "Everything else is the same." if rows else "No setting differs."
    return {"title": "What differs", "note": note, "columns": ["", str(a.path), str(b.path)], "rows": rows}


def figures_of(groups: Mapping[str, Sequence[Run]]) -> dict[str, Figure]:
    """Curves of all settings, and of a single run everything else that it has."""
    first, *others = (run for group in groups.values() for run in group)
    keys = list(dict.fromkeys(k for r in (first, *others) for k in plots.headline_keys(r.document, r.metrics)))
    evals = {name: runs[0].document.get("history", []) if len(runs) == 1 else [] for name, runs in groups.items()}
    rows = {name: [run.metrics for run in runs] for name, runs in groups.items()}
    out = {"learning curves": plots.learning_curves(rows, evals, keys, first.document)}
    arms = {n: runs[0].evaluation for n, runs in groups.items() if runs[0].evaluation}
    if arms and not others:
        out |= plots.of_evaluation(first.evaluation)
    elif arms:
        policies = {n: e["arms"]["policy"] for n, e in arms.items()}
        out |= {"coverage": plots.coverage(policies, first.evaluation.get("bars")), "tokens": plots.tokens_per_answer(policies)}
        if any(p["reliability"] for p in policies.values()):
            out["reliability"] = plots.reliability(policies)
    return out if others else out | {"reward components": plots.components(first.metrics)}


def page(runs: Sequence[Run], title: str) -> dict[str, Any]:
    """Everything that the template shows."""
    groups, faults = settings_of(runs), [f for run in runs for f in run.faults]
    notes = [f"{r.path} is unfinished: step {r.metrics[-1]['step']} of {r.config['train']['steps']}" for r in runs if not r.finished]
    tables = [headline(runs[0])] if len(runs) == 1 else [settings_table(groups)]
    if len(runs) == 2:
        tables += [differences(*runs), *(headline(r) | {"title": f"Headline of {r.path}"} for r in runs)]
    data: dict[str, Any] = {"title": title, "rollouts": None}
    if len(runs) == 1:
        if runs[0].evaluation:
            tables += arms_table(runs[0].evaluation)
        else:
            notes.append(f"No baselines, coverage curves or reliability yet: run python -m mar.evaluate {runs[0].path}")
        data["rollouts"], broken = browser(runs[0])
        faults += broken
    if faults:
        notes.append(f"Skipped {len(faults)} broken line(s): {', '.join(faults[:5])}")
    data |= {"notes": notes, "tables": tables, "figures": {name: svg(f) for name, f in figures_of(groups).items()}}
    data["configs"] = {str(r.path): yaml.safe_dump(r.config, sort_keys=False) for r in runs[:2]}
    data["provenance"] = runs[0].config.get("provenance", {})
    return plain(data)


def write(data: Mapping[str, Any], path: Path) -> None:
    """Fill the template. The data stand in a script element: escaping `<` keeps them from ever ending it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    template = files("mar").joinpath("report.html").read_text(encoding="utf-8")
    path.write_text(template.replace("__DATA__", text.encode("utf-8", "replace").decode()), encoding="utf-8")


def report(paths: Sequence[Path], out: Path | None) -> Path:
    """Write the report of a run, a folder of runs, or two runs; returns the file."""
    if len(paths) > 2:
        raise UserError("name one run, one folder of runs, or two runs")
    of_many = len(paths) == 1 and not (paths[0] / "config.yaml").exists()
    found = sorted(p.parent for p in paths[0].rglob("config.yaml")) if of_many else paths
    if not found:
        raise UserError(f"{paths[0]} holds no run (no config.yaml in it or below it)")
    target = out or (paths[0] if len(paths) == 1 else Path()) / "report.html"
    write(page([read_run(p) for p in found], " against ".join(map(str, paths))), target)
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mar.report", description="One HTML file about a run, a sweep or two runs.")
    parser.add_argument("run", type=Path, nargs="+", help="one run, one folder of runs, or two runs")
    parser.add_argument("--out", type=Path, help="the file to write (default: report.html in the folder; of two runs, here)")
    options = parser.parse_args(arguments)
    return exit_code(lambda: print(report(options.run, options.out)))


if __name__ == "__main__":
    sys.exit(main())

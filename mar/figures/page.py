"""The report: one self-contained HTML file about a run, two runs, or a folder of runs.

`page_data` collects what the template report.html shows; `write_report` reads the runs and fills
it. The file needs no network. What a model wrote reaches the page as text only.
"""

import base64
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure

from mar.answers.grammar import grammar_of
from mar.answers.rewards import component_layout, reward_of
from mar.errors import UserError
from mar.figures import plots
from mar.figures.runs import Run, group_by_setting, read_run
from mar.figures.tables import differences_table, evaluation_tables, headline, settings_table
from mar.files import jsonable, rows_of_jsonl, skipped_lines
from mar.run.compose import load_config

MAX_PROMPTS = 200  # in the rollout browser

# What the rollout browser needs of a row of completions.jsonl.
BROWSER_KEYS = (
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


def write_report(paths: Sequence[Path], out: Path | None) -> Path:
    """Write the report of a run, a folder of runs, or two runs; returns the file."""
    if len(paths) > 2:
        raise UserError("name one run, one folder of runs, or two runs")
    folders = list(paths)
    if len(paths) == 1 and not (paths[0] / "config.yaml").exists():
        folders = _runs_below(paths[0])
    runs = [read_run(folder) for folder in folders]
    title = " against ".join(map(str, paths))
    default_folder = paths[0] if len(paths) == 1 else Path()
    target = out or default_folder / "report.html"
    fill_template(page_data(runs, title), target)
    return target


def _runs_below(folder: Path) -> list[Path]:
    """The folders of runs that have made a step, else of those that have not."""
    found = sorted(path.parent for path in folder.rglob("config.yaml"))
    if not found:
        raise UserError(f"{folder} holds no run (no config.yaml in it or below it)")
    # wandb keeps a config.yaml below a run, too.
    with_steps = [path for path in found if (path / "metrics.jsonl").exists()]
    return with_steps or found


def page_data(runs: Sequence[Run], title: str) -> dict[str, Any]:
    """Everything that the template shows."""
    groups = group_by_setting(runs)
    faults = [fault for run in runs for fault in run.faults]
    notes = [_unfinished_note(run) for run in runs if not run.finished]
    rollouts = None
    if len(runs) == 1:
        tables = [headline(runs[0])]
        if runs[0].evaluation:
            tables += evaluation_tables(runs[0].evaluation)
        else:
            notes.append(
                "There are no baselines, coverage curves or reliability yet: "
                f"run python -m mar.evaluate {runs[0].path}"
            )
        rollouts, broken = browser_data(runs[0])
        faults += broken
    else:
        tables = [settings_table(groups)]
        if len(runs) == 2:
            tables.append(differences_table(*runs))
            tables += [headline(run, title=f"Headline of {run.path}") for run in runs]
    if faults:
        notes.append(skipped_lines(faults))
    figures = figures_of_runs(groups)
    data = {
        "title": title,
        "rollouts": rollouts,
        "notes": notes,
        "tables": tables,
        "figures": {name: data_url(figure) for name, figure in figures.items()},
        "configs": {str(run.path): yaml.safe_dump(run.config, sort_keys=False) for run in runs},
        "provenance": runs[0].config.get("provenance", {}),
    }
    filled: dict[str, Any] = jsonable(data)
    return filled


def _unfinished_note(run: Run) -> str:
    step, num_steps = run.metrics[-1]["step"], run.config["train"]["steps"]
    return f"{run.path} is unfinished: step {step} of {num_steps}"


def browser_data(run: Run) -> tuple[dict[str, Any], list[str]]:
    """(up to MAX_PROMPTS groups of completions, from steps spread over the run; broken lines)."""
    path = run.path / "completions.jsonl"
    broken: list[str] = []
    # Twice: all rows of a long run may be more than the memory holds.
    places = {(row["step"], str(row["id"])) for row in _training_rows(path, broken)}
    steps = _spread_steps([step for step, _ in places])
    groups: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in _training_rows(path, []):
        if row["step"] in steps:
            groups[row["step"], str(row["id"])].append(row)
    chosen = []
    for (step, prompt_id), group in sorted(groups.items()):
        chosen.append(
            {
                "step": step,
                "id": prompt_id,
                "question": group[0].get("question", ""),
                "targets": group[0].get("targets", []),
                "rows": [{k: row[k] for k in BROWSER_KEYS if k in row} for row in group],
            }
        )
    return {"groups": chosen[:MAX_PROMPTS], "components": _component_names(run)}, broken


def _training_rows(path: Path, broken: list[str]) -> Iterator[dict[str, Any]]:
    """The completions of training; `file:line` of broken lines is added to `broken`."""
    if not path.exists():
        return
    for row in rows_of_jsonl(path, broken):
        if row.get("stage") == "train" and isinstance(row.get("text"), str):
            yield row


def _spread_steps(step_of_group: Sequence[int]) -> set[int]:
    """The steps to show: at least two, evenly spread, with about MAX_PROMPTS groups together."""
    steps = sorted(set(step_of_group))
    if not steps:
        return set()
    groups_per_step = max(1, len(step_of_group) // len(steps))
    wanted = min(len(steps), max(2, MAX_PROMPTS // groups_per_step))
    return {steps[round(i)] for i in np.linspace(0, len(steps) - 1, wanted)}


def _component_names(run: Run) -> list[str]:
    """What the reward's components are called, in their order."""
    config = load_config(run.path / "config.yaml")
    layout = component_layout(grammar_of(config), reward_of(config.reward))
    return [name for name, _ in layout]


def figures_of_runs(groups: Mapping[str, Sequence[Run]]) -> dict[str, Figure]:
    """Curves of all settings; of a single run everything else that it has."""
    runs = [run for group in groups.values() for run in group]
    figures = {"learning curves": _learning_curves(groups)}
    if len(runs) == 1:
        if runs[0].evaluation:
            figures |= plots.of_evaluation(runs[0].evaluation)
        return figures | {"reward components": plots.components(runs[0].metrics)}

    evaluated = {name: group[0].evaluation for name, group in groups.items() if group[0].evaluation}
    if evaluated:
        policies = {name: e["arms"]["policy"] for name, e in evaluated.items()}
        figures["coverage"] = plots.coverage(policies, runs[0].evaluation.get("bars"))
        figures["tokens"] = plots.tokens_per_answer(policies)
        if any(policy["reliability"] for policy in policies.values()):
            figures["reliability"] = plots.reliability(policies)
    return figures


def _learning_curves(groups: Mapping[str, Sequence[Run]]) -> Figure:
    """Metrics of all settings against the step; evaluations where a setting has a single seed."""
    runs = [run for group in groups.values() for run in group]
    metrics: dict[str, None] = {}
    for run in runs:
        metrics |= dict.fromkeys(plots.learning_metrics(run.document, run.metrics))
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for name, group in groups.items():
        evaluations[name] = group[0].document.get("history", []) if len(group) == 1 else []
    return plots.learning_curves(
        runs={name: [run.metrics for run in group] for name, group in groups.items()},
        evaluations=evaluations,
        metrics=list(metrics),
        bounds=runs[0].document,
    )


def data_url(figure: Figure) -> str:
    """A figure as an SVG image: inline, the names in one figure could meet those in another."""
    out = io.BytesIO()
    with rc_context(plots.STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def fill_template(data: Mapping[str, Any], path: Path) -> None:
    """Put the data into a script element of the template; escaping `<` keeps it from ending."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair becomes "?"
    template = files("mar.figures").joinpath("report.html").read_text(encoding="utf-8")
    path.write_text(template.replace("__DATA__", text), encoding="utf-8")

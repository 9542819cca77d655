"""The report: one self-contained HTML file about a run, two runs, or a folder of runs.

`page_data` collects what the template report.html shows; `write_report` reads the runs and fills
it. The file needs no network. What a model wrote reaches the page as text only.
"""

import base64
import io
import json
import sys
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
from mar.figures.curves import curves_of_task
from mar.figures.runs import (
    Run,
    group_by_setting,
    group_by_task,
    read_run,
    seeds_of,
    short_names,
)
from mar.figures.tables import (
    differences_table,
    evaluation_tables,
    headline,
    settings_table,
    settings_that_differ,
)
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
    """Write the report of a run, two runs, several, or a folder of runs; returns the file."""
    by_folder: dict[Path, Run] = {}
    for path in paths:
        if (path / "config.yaml").exists():
            by_folder[path] = read_run(path)
        else:
            by_folder |= {run.path: run for run in _runs_below(path)}
    runs = list(by_folder.values())
    title = " against ".join(map(str, paths))
    if len(paths) > 2:
        title = f"{len(runs)} runs, {paths[0]} to {paths[-1]}"
    default_folder = paths[0] if len(paths) == 1 else Path()
    target = out or default_folder / "report.html"
    fill_template(page_data(runs, title), target)
    return target


def _runs_below(folder: Path) -> list[Run]:
    """The runs below a folder. One that cannot be read is left out, and stderr says so.

    Raises UserError where none can be read.
    """
    runs = []
    faults = []
    for path in _run_folders(folder):
        try:
            runs.append(read_run(path))
        except UserError as fault:
            faults.append(str(fault))
    if not runs:
        raise UserError(faults[0])
    for said in faults:
        print(f"left out: {said}", file=sys.stderr)
    return runs


def _run_folders(folder: Path) -> list[Path]:
    """The folders of runs that have made a step, else of those that have not."""
    found = sorted(path.parent for path in folder.rglob("config.yaml"))
    if not found:
        raise UserError(f"{folder} holds no run (no config.yaml in it or below it)")
    # wandb keeps a config.yaml below a run, too.
    with_steps = [path for path in found if (path / "metrics.jsonl").exists()]
    return with_steps or found


def page_data(runs: Sequence[Run], title: str) -> dict[str, Any]:
    """Everything that the template shows."""
    faults = [fault for run in runs for fault in run.faults]
    notes = [_unfinished_note(run) for run in runs if not run.finished]
    by_task = {task: group_by_setting(of_task) for task, of_task in group_by_task(runs).items()}
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
        rollouts, broken = browser_of_run(runs[0])
        faults += broken
    else:
        tables = [settings_table(task, groups) for task, groups in by_task.items()]
        if len(by_task) > 1:
            notes.append(
                f"The runs are of {len(by_task)} tasks ({', '.join(by_task)}), which share no axis "
                "and no table."
            )
        if len(runs) == 2:
            tables.append(differences_table(*runs))
            names = short_names(*runs)
            for run, name in zip(runs, names, strict=True):
                tables.append(headline(run, title=f"Headline of {name}"))
            rollouts, broken = browser_of_pair(*runs)
            faults += broken
        else:
            tables += [
                settings_that_differ(task, groups)
                for task, groups in by_task.items()
                if len(groups) > 1
            ]
    if faults:
        notes.append(skipped_lines(faults))
    sections = []
    for task, groups in by_task.items():
        figures = figures_of_settings(groups)
        sections.append(
            {
                "curves": curves_of_task(task, groups),
                "figures": {name: data_url(figure) for name, figure in figures.items()},
            }
        )
    data = {
        "title": title,
        "rollouts": rollouts,
        "notes": notes,
        "tables": tables,
        "tasks": sections,
        "configs": {str(run.path): yaml.safe_dump(run.config, sort_keys=False) for run in runs},
        "provenance": runs[0].config.get("provenance", {}),
    }
    filled: dict[str, Any] = jsonable(data)
    return filled


def _unfinished_note(run: Run) -> str:
    step, num_steps = run.metrics[-1]["step"], run.config["train"]["steps"]
    return f"{run.path} is unfinished: step {step} of {num_steps}"


def figures_of_settings(groups: Mapping[str, Sequence[Run]]) -> dict[str, Figure]:
    """What was measured beside the curves: of a single run everything, of settings what compares
    their policies, by the first evaluated seed of each."""
    runs = [run for group in groups.values() for run in group]
    if len(runs) == 1:
        figures = {}
        if runs[0].evaluation:
            figures = plots.of_evaluation(runs[0].evaluation)
        return figures | {"reward terms": plots.components(runs[0].metrics)}

    evaluations: dict[str, dict[str, Any]] = {}
    for name, group in groups.items():
        evaluated = [run.evaluation for run in seeds_of(group) if run.evaluation]
        if evaluated:
            evaluations[name] = evaluated[0]
    if not evaluations:
        return {}
    policies = {name: evaluation["arms"]["policy"] for name, evaluation in evaluations.items()}
    bounds = next(iter(evaluations.values())).get("bars")
    figures = plots.of_arms(policies, bounds)
    figures["tokens"] = plots.tokens_per_answer(policies)
    return figures


# --- the rollout browser ---------------------------------------------------------------------

# (stage, step, prompt id): what a group of completions is known by
Key = tuple[str, int, str]
Row = dict[str, Any]


def browser_of_run(run: Run) -> tuple[dict[str, Any], list[str]]:
    """(up to MAX_PROMPTS groups of completions, from steps spread over the run; broken lines)."""
    keys, broken = _keys(run)
    trained = sorted(key for key in keys if key[0] == "train")
    steps = _spread_steps([step for _, step, _ in trained])
    chosen = [key for key in trained if key[1] in steps][:MAX_PROMPTS]
    rows = _rows_of_groups(run, chosen)
    groups = [_browser_group(key, [rows[key]]) for key in chosen]
    return {"groups": groups, "sides": [_side(run, str(run.path))]}, broken


def browser_of_pair(a: Run, b: Run) -> tuple[dict[str, Any] | None, list[str]]:
    """Likewise of two runs, side by side: what both wrote to the same question at the same step,
    the last held-out questions first. None where there is no such question."""
    keys, broken = _keys(a)
    other_keys, also_broken = _keys(b)
    common = sorted(keys & other_keys)
    held_out = [key for key in common if key[0] == "eval"]
    last = max((step for _, step, _ in held_out), default=0)
    chosen = [key for key in held_out if key[1] == last][: MAX_PROMPTS // 2]
    trained = [key for key in common if key[0] == "train"]
    steps = _spread_steps([step for _, step, _ in trained])
    chosen += [key for key in trained if key[1] in steps]
    if not chosen:
        return None, broken + also_broken
    chosen = chosen[:MAX_PROMPTS]
    first = _rows_of_groups(a, chosen)
    second = _rows_of_groups(b, chosen)
    groups = [_browser_group(key, [first[key], second[key]]) for key in chosen]
    names = short_names(a, b)
    sides = [_side(run, name) for run, name in zip((a, b), names, strict=True)]
    return {"groups": groups, "sides": sides}, broken + also_broken


def _keys(run: Run) -> tuple[set[Key], list[str]]:
    """(the groups of a run's completions, `file:line` of broken lines)."""
    broken: list[str] = []
    return {key for key, _ in _completions(run, broken)}, broken


def _rows_of_groups(run: Run, chosen: Sequence[Key]) -> dict[Key, list[Row]]:
    """The completions of some groups, by reading the file again: all of a long run may be more than
    the memory holds."""
    groups: dict[Key, list[Row]] = {key: [] for key in chosen}
    for key, row in _completions(run, []):
        if key in groups:
            groups[key].append(row)
    return groups


def _completions(run: Run, broken: list[str]) -> Iterator[tuple[Key, Row]]:
    """The completions of training and evaluations, one by one, with their groups; `file:line` of
    broken lines is added to `broken`."""
    path = run.path / "completions.jsonl"
    if not path.exists():
        return
    for row in rows_of_jsonl(path, broken):
        if row.get("stage") in ("train", "eval") and isinstance(row.get("text"), str):
            yield (row["stage"], row["step"], str(row["id"])), row


def _browser_group(key: Key, sides: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    stage, step, prompt_id = key
    first = sides[0][0]
    shown = []
    for rows in sides:
        shown.append([{k: row[k] for k in BROWSER_KEYS if k in row} for row in rows])
    return {
        "stage": stage,
        "step": step,
        "id": prompt_id,
        "question": first.get("question", ""),
        "targets": first.get("targets", []),
        "sides": shown,
    }


def _side(run: Run, name: str) -> dict[str, Any]:
    """A run's name on the page, and what its reward's components are called, in their order."""
    config = load_config(run.path / "config.yaml")
    layout = component_layout(grammar_of(config), reward_of(config.reward))
    return {"run": name, "components": [name for name, _ in layout]}


def _spread_steps(step_of_group: Sequence[int]) -> set[int]:
    """The steps to show: at least two, evenly spread, with about MAX_PROMPTS groups together."""
    steps = sorted(set(step_of_group))
    if not steps:
        return set()
    groups_per_step = max(1, len(step_of_group) // len(steps))
    wanted = min(len(steps), max(2, MAX_PROMPTS // groups_per_step))
    return {steps[round(i)] for i in np.linspace(0, len(steps) - 1, wanted)}


# --- the file --------------------------------------------------------------------------------


def data_url(figure: Figure) -> str:
    """A figure as an SVG image: inline, the names in one figure could meet those in another."""
    out = io.BytesIO()
    with rc_context(plots.STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def fill_template(data: Mapping[str, Any], path: Path) -> None:
    """Put styles, scripts and the data into the template; escaping `<` keeps the data in their
    element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair becomes "?"
    folder = files("mar.figures")
    page = folder.joinpath("report.html").read_text(encoding="utf-8")
    for name in ("report.css", "curves.js", "report.js"):
        part = folder.joinpath(name).read_text(encoding="utf-8")
        page = page.replace(f"__{name}__", part)
    path.write_text(page.replace("__DATA__", text), encoding="utf-8")

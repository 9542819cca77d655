"""Make the tables in the Markdown files again, from the committed logs that they name.

    python experiments/report.py [--check]

A table stands between a marker and `<!-- end -->`. There are three kinds of markers:

    <!-- log PATH -->            floor, before, after and ceiling of one run of `mar.train`
    <!-- logs PATH PATH ... -->  one line for each run
    <!-- claims -->              what the function in TABLES makes

A marker may name the rows that it shows, in their order, behind a colon:
`<!-- log PATH: coverage@3 top1 -->`, `<!-- claims: multi_rlcr base -->`. Paths are relative to
the repository. The last line of a log is the JSON document that `mar.train` ends with.

`--check` writes nothing; it exits with 1 and names the files where a table differs from its logs.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.algorithms import ideas_summary as ideas
from experiments.algorithms import summary as algorithms
from experiments.claims import confidences, probe
from experiments.claims import summary as claims
from experiments.common import glossary
from experiments.common.tables import markdown_table
from experiments.credit import run as credit
from experiments.ddxplus_smollm2 import constant, elsewhere, profile
from experiments.ddxplus_smollm2 import summary as ddxplus
from experiments.embedded_model import summary as embedded_model
from experiments.first_light import recipes
from experiments.medqa_smollm2 import run as medqa
from experiments.peers import summary as peers
from experiments.plan import fake_run as settings
from experiments.plan import run as plans
from experiments.real_model import known as real_model_known
from experiments.real_model import shift as real_model_shift
from experiments.real_model import summary as real_model
from experiments.sweeps import summary as sweeps
from experiments.tasks import two_steps
from mar.measure.shown_metrics import HEADLINE
from mar.run.console import format_metric

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?P<open><!-- (?:logs? (?P<paths>[^>:]+?)|(?P<table>[a-z ]+))(?:: (?P<rows>[^>]+?))? -->\n)"
    r".*?"
    r"(?P<close><!-- end -->)",
    re.DOTALL,
)
STAGES = ("floor", "before", "after", "ceiling")
OF_SEVERAL = ("coverage@3", "top1", "ece", "q_mse", "repeats_per_set")
MEDQA_METRICS = (*ddxplus.SET_METRICS, "repeats_per_set")
DDXPLUS_LOGS = ddxplus.HERE / "logs"

# Marker -> the function that makes its table.
TABLES: dict[str, Callable[..., str]] = {
    "claims": claims.markdown,
    "claims short": claims.short_markdown,
    "claims confidences": confidences.markdown,
    "claims probe": probe.markdown,
    "claims probe of four layers": partial(probe.markdown, probe.FOUR_LAYERS),
    "embedded model stages": embedded_model.markdown,
    "recipes": recipes.markdown,
    "recipes words": recipes.words_of_recipes,
    "peers": peers.markdown,
    "plan tracked": partial(plans.markdown, "tracked"),
    "plan computed": partial(plans.markdown, "computed"),
    "plan settings": settings.markdown,
    "ddxplus": partial(ddxplus.held_out, DDXPLUS_LOGS, 9),
    "ddxplus constant": constant.markdown,
    "ddxplus elsewhere": elsewhere.markdown,
    "ddxplus completions": partial(
        ddxplus.to_read,
        DDXPLUS_LOGS / "multi_rlcr_completions0.jsonl",
        DDXPLUS_LOGS / "rlvr_single_completions0.jsonl",
    ),
    "ddxplus profile": profile.markdown,
    "medqa": partial(ddxplus.held_out, medqa.LOGS, 3, MEDQA_METRICS),
    "medqa learning": partial(ddxplus.learning, medqa.LOGS),
    "real model": real_model.coverage_table,
    "real model short": real_model.short_table,
    "real model change": real_model.change_table,
    "real model cold": real_model.cold_table,
    "real model paired": real_model.paired_table,
    "real model calibration": real_model.calibration_table,
    "real model known": real_model_known.markdown,
    "real model shift": real_model_shift.markdown,
    "two steps": two_steps.markdown,
    "algorithms": algorithms.markdown,
    "algorithms paired": algorithms.paired,
    "ideas": ideas.markdown,
    "ideas paired": ideas.paired,
    "k sweep": sweeps.k_sweep,
    "k sweep asked": sweeps.asked,
    "brier weight": sweeps.brier_weight,
    "sum rule": sweeps.sum_rule,
    "sum rule steps": sweeps.sum_rule_steps,
    "thinking": sweeps.thinking,
    "credit": sweeps.credit,
    "credit expectation": credit.expectation,
    "credit variance": credit.variances,
    "glossary of one set": glossary.one_set,
    "glossary of several sets": glossary.several_sets,
    "glossary of steps": glossary.steps,
}


def of_one(end: dict[str, Any], metrics: Sequence[str] = ()) -> str:
    """Floor, before, after and ceiling of each metric of one run."""
    coverage = next(iter(end["floor"]))
    rows = []
    for metric in metrics or (coverage, *HEADLINE):
        cells = [format_metric(end[stage][metric]) for stage in STAGES]
        rows.append([metric, *cells])
    return markdown_table(["", *STAGES], rows)


def of_several(ends: dict[str, dict[str, Any]]) -> str:
    """One line for each run."""
    rows = []
    for log, end in ends.items():
        cells = [format_metric(end["after"][metric]) for metric in OF_SEVERAL]
        rows.append([log, format_metric(end["gap_closed"]), *cells, f"{end['job_s']:.0f}"])
    return markdown_table(["log", "gap_closed", *OF_SEVERAL, "seconds"], rows)


def read_end(path: Path) -> dict[str, Any]:
    """The JSON document that closes a log."""
    try:
        text = path.read_text(encoding="utf-8")
        last_line = text.rstrip().rpartition("\n")[2]
        return json.loads(last_line)
    except FileNotFoundError:
        sys.exit(f"{path}: a README names this log and it is not there")
    except json.JSONDecodeError:
        sys.exit(f"{path}: the last line is no JSON document; the run did not finish")


def made_again(block: re.Match[str]) -> str:
    """A block with its table made from the logs."""
    rows = block["rows"].split() if block["rows"] else []
    if block["table"]:
        make = TABLES[block["table"]]
        table = make(rows) if rows else make()
    else:
        paths = [ROOT / path for path in block["paths"].split()]
        ends = {path.stem: read_end(path) for path in paths}
        first = next(iter(ends.values()))
        table = of_one(first, rows) if len(ends) == 1 else of_several(ends)
    return f"{block['open']}\n{table}\n\n{block['close']}"


def fill(text: str) -> str:
    """The text with all of its tables made again."""
    return BLOCK.sub(made_again, text)


def pages() -> list[Path]:
    """The Markdown files that may hold tables."""
    folders = ("conf", "experiments", "kernels", "mar")
    pages = [file for folder in folders for file in ROOT.glob(f"{folder}/**/*.md")]
    return [ROOT / "README.md", *sorted(pages)]


def check(stale: dict[Path, str]) -> None:
    for file in stale:
        print(f"{file.relative_to(ROOT)}: a table differs from its logs; run `make report`")
    if claims.stale():
        print(
            "experiments/claims: results.json and the figures are of other logs; run `make report`"
        )
    sys.exit(bool(stale) or claims.stale())


def main() -> None:
    options = sys.argv[1:]
    if options not in ([], ["--check"]):
        sys.exit(f"usage: python experiments/report.py [--check], not {' '.join(options)}")
    stale = {}
    for file in pages():
        text = file.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            stale[file] = filled
    if options == ["--check"]:
        check(stale)
    if claims.stale():
        claims.write()
        print("wrote experiments/claims/results.json and figures")
    for experiment in (peers, algorithms, ideas, sweeps, ddxplus, real_model):
        if experiment.HERE / "README.md" in stale:
            experiment.write()
    for file, text in stale.items():
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

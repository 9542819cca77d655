"""Write the tables of the Markdown files again from the committed logs they name:  python experiments/report.py [--check]

A table stands between `<!-- log PATH -->` or `<!-- logs PATH PATH ... -->` and `<!-- end -->`, the paths relative to the repository; a log's
last line is the JSON document that `mar.train` ends with. One log gives floor, before, after and ceiling; several give a line for each; the tables
after `<!-- claims -->` and the like are made by the functions in MADE. `--check` writes nothing and exits with 1, naming the files, where
something is not what its logs say.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.algorithms import summary as algorithms
from experiments.claims import confidences, probe, summary
from experiments.credit import run as credit
from experiments.ddxplus_smollm2 import constant, profile
from experiments.ddxplus_smollm2 import summary as ddxplus
from experiments.generalise import run as generalise
from experiments.medqa_smollm2 import run as medqa
from experiments.peers import summary as peers
from experiments.plan import run as plans
from experiments.sweeps import summary as sweeps
from experiments.tasks import two_steps
from mar.measure.shown_metrics import HEADLINE
from mar.run.console import format_metric

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?P<open><!-- (?:logs? (?P<paths>[^>]+?)|(?P<made>[a-z ]+)) -->\n).*?(?P<close><!-- end -->)",
    re.DOTALL,
)
DDXPLUS = ddxplus.HERE

MADE = {  # what stands after `<!-- name -->`
    "claims": summary.markdown,
    "claims predicted": summary.predicted,
    "claims confidences": confidences.markdown,
    "claims probe": probe.markdown,
    "peers": peers.markdown,
    "plan tracked": partial(plans.markdown, "tracked"),
    "plan computed": partial(plans.markdown, "computed"),
    "ddxplus": partial(ddxplus.held_out, DDXPLUS / "logs", 9),
    "ddxplus learning": partial(ddxplus.learning, DDXPLUS / "logs"),
    "ddxplus calibration": partial(ddxplus.calibration, DDXPLUS / "logs"),
    "ddxplus constant": constant.markdown,
    "ddxplus completions": partial(
        ddxplus.to_read,
        DDXPLUS / "logs/multi_rlcr_completions0.jsonl",
        DDXPLUS / "logs/rlvr_single_completions0.jsonl",
    ),
    "ddxplus profile": profile.markdown,
    "medqa": partial(
        ddxplus.held_out, medqa.LOGS, 3, (*ddxplus.OF_SETS, "auroc", "repeats_per_set")
    ),
    "medqa learning": partial(ddxplus.learning, medqa.LOGS),
    "generalise": generalise.markdown,
    "two steps": two_steps.markdown,
    "algorithms": algorithms.markdown,
    "algorithms paired": algorithms.paired,
    "k sweep": sweeps.k_sweep,
    "k sweep asked": sweeps.asked,
    "brier weight": sweeps.brier_weight,
    "sum rule": sweeps.sum_rule,
    "sum rule steps": sweeps.sum_rule_steps,
    "thinking": sweeps.thinking,
    "credit": sweeps.credit,
    "credit expectation": credit.expectation,
    "credit variance": credit.variances,
}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_one(end: dict[str, Any]) -> str:
    """Floor, before, after and ceiling of each metric."""
    stages = ("floor", "before", "after", "ceiling")
    coverage = next(iter(end["floor"]))
    return table(
        ["", *stages],
        [[m, *(format_metric(end[stage][m]) for stage in stages)] for m in (coverage, *HEADLINE)],
    )


def of_several(ends: dict[str, dict[str, Any]]) -> str:
    """One line for each log."""
    metrics = ("coverage@3", "top1", "ece", "q_mse", "repeats_per_set")
    rows = [
        [
            log,
            format_metric(end["gap_closed"]),
            *(format_metric(end["after"][m]) for m in metrics),
            f"{end['job_s']:.0f}",
        ]
        for log, end in ends.items()
    ]
    return table(["log", "gap_closed", *metrics, "seconds"], rows)


def read_end(path: Path) -> dict[str, Any]:
    """The JSON document that closes a log."""
    try:
        return json.loads(path.read_text(encoding="utf-8").rstrip().rpartition("\n")[2])
    except FileNotFoundError:
        sys.exit(f"{path}: a README names this log and it is not there")
    except json.JSONDecodeError:
        sys.exit(f"{path}: the last line is no JSON document; the run did not finish")


def fill(text: str) -> str:
    """The text with all of its tables made again."""

    def block(match: re.Match[str]) -> str:
        if match["made"]:
            made = MADE[match["made"]]()
        else:
            ends = {
                path.stem: read_end(path)
                for path in (ROOT / path for path in match["paths"].split())
            }
            made = of_one(next(iter(ends.values()))) if len(ends) == 1 else of_several(ends)
        return f"{match['open']}\n{made}\n\n{match['close']}"

    return BLOCK.sub(block, text)


def main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(f"usage: python experiments/report.py [--check], not {' '.join(sys.argv[1:])}")
    files = [ROOT / "README.md", *sorted(ROOT.glob("experiments/*/README.md"))]
    stale = {
        file: made
        for file in files
        if (made := fill(text := file.read_text(encoding="utf-8"))) != text
    }
    if "--check" in sys.argv[1:]:
        for file in stale:
            print(f"{file.relative_to(ROOT)}: a table differs from its logs; run `make report`")
        if summary.stale():
            print(
                "experiments/claims: results.json and the figures are of other logs; run `make report`"
            )
        sys.exit(bool(stale) or summary.stale())
    if summary.stale():
        summary.write()
        print("wrote experiments/claims/results.json and figures")
    for drawn in (peers, algorithms, sweeps, ddxplus):
        if drawn.HERE / "README.md" in stale:
            drawn.write()
    for file, text in stale.items():
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

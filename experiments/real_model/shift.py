"""Do confidences survive other questions? Trained policies and the warm-up, asked something else.

    python -m experiments.real_model.shift multi_rlcr_own 0 DATASETS [out=<folder>]

DATASETS: the folder with ddxplus/ and protoqa/dev.scraped.jsonl. The row of that method and seed
has to be there (row.py, the same out=). Measured are other numbers of findings than in training,
DDXPlus's own patients in its own words, and ProtoQA; three answers a question. Logs: logs/shift/.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from experiments.common.commands import kept_of_arm, read_evaluation, run_module, write_log
from experiments.common.tables import Log, markdown_table, read_logs_by
from experiments.real_model.row import LOGS as ROW_LOGS
from experiments.real_model.row import METHODS, WARM_UPS, Rows, out_and_words
from experiments.real_model.summary import of_answers, shown
from mar.errors import exit_code
from mar.policy.sources import environment

LOGS = ROW_LOGS.parent / "shift"
ITEMS = 200
SET_SIZE = 3
LONG = ["model.max_prompt_tokens=448"]
# Name -> the data's place below DATASETS, and the words that ask for it.
SHIFTS: dict[str, tuple[str, list[str]]] = {
    "8, 12 or 20 asked": ("ddxplus", []),
    "4 asked": ("ddxplus", ["data.num_asked=[4]"]),
    "32 asked": ("ddxplus", ["data.num_asked=[32]", *LONG]),
    "ddxplus": (
        "ddxplus/patients_all49_en.jsonl",
        ["data.task=ddxplus", "data.eval_split=validation", *LONG],
    ),
    "protoqa": ("protoqa/dev.scraped.jsonl", ["data.task=protoqa", "data.eval_split=validation"]),
}
METRICS = ("top1", "ece", "auroc", "brier", "format_rate")


def measure(rows: Rows, method: str, seed: int, shift: str, data: Path) -> None:
    """One evaluation and its log."""
    place, words = SHIFTS[shift]
    out = rows.out / "shift" / shift.replace(" ", "_").replace(",", "") / f"{method}_seed{seed}"
    settings = [f"data.path={data / place}", *words, f"eval.num_items={ITEMS}", f"k={SET_SIZE}"]
    settings += ["num_answers=", "arms=policy", f"out={out}"]
    if method in METHODS:
        seconds = run_module("mar.evaluate", str(rows.folder(method, seed)), *settings)
    else:
        seconds = run_module("mar.evaluate", "base", *rows.settings(method, seed), *settings)
    evaluation = read_evaluation(out)
    log: dict[str, Any] = {
        "shift": shift,
        "method": method,
        "seed": seed,
        **environment(),
        "num_items": evaluation["num_items"],
        "evaluate_s": seconds,
        "multiplied_in": rows.multiplied_in,
        **kept_of_arm(evaluation["arms"]["policy"]),
        "bars": evaluation["bars"],
    }
    write_log(LOGS / f"{out.parent.name}_{out.name}.json", log)


def markdown() -> str:
    """A line for each kind of questions, method and seed."""
    rows = []
    for shift, logs in read_logs_by(LOGS, "shift", SHIFTS).items():
        for log in sorted(logs, key=lambda log: log["method"]):
            rows.append([shift, log["method"], str(log["seed"]), *cells_of(log)])
    names = ["questions", "most possible", "coverage@3", *METRICS]
    return markdown_table(["asked", "method", "seed", *names], rows)


def cells_of(log: Log) -> list[str]:
    bars = log.get("bars") or {}
    ceiling = bars.get("ceiling")
    best = "–" if ceiling is None else f"{ceiling[SET_SIZE - 1]:.3f}"
    covered = shown(of_answers(log, "coverage", SET_SIZE))
    metrics = [shown(log["metrics"].get(name)) for name in METRICS]
    return [str(log["num_items"]), best, covered, *metrics]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("method", choices=[*METHODS, *WARM_UPS])
    add("seed", type=int)
    add("data", type=Path, help="the folder with ddxplus/ and protoqa/")
    add("words", nargs="*", metavar="WORD", help="such as out=FOLDER, where the rows' runs lie")
    args = parser.parse_args()
    out, words = out_and_words(args.words)
    rows = Rows(out, [f"data.path={args.data / 'ddxplus'}", *words])
    rows.prepare(args.method)
    for shift in SHIFTS:
        measure(rows, args.method, args.seed, shift, args.data)


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Do confidences that were learnt on DDXPlus survive another distribution?

    python -m experiments.ddxplus_smollm2.elsewhere DATASETS [seed]

DATASETS: the folder with ddxplus/ and medqa/. Measures Multi-RLCR of this experiment (its
checkpoint has to be there) and its warm-up on its own held-out patients, on patients of 19
conditions in another selection, and on MedQA. Logs: logs/elsewhere.
"""

import argparse
from pathlib import Path

from experiments.common.commands import kept_of_arm, read_evaluation, run_module, write_log
from experiments.common.tables import (
    Columns,
    Log,
    curve_at,
    metric,
    read_logs_by,
    table_over_seeds,
)
from experiments.ddxplus_smollm2.run import PATIENTS, RUNS
from mar.policy.sources import environment

LOGS = Path(__file__).parent / "logs" / "elsewhere"
# Name -> the file of questions, and the words that ask for them.
SHIFTS = {
    "ddxplus": (f"ddxplus/{PATIENTS}", ["eval.num_items=64"]),
    "ddxplus_19": ("ddxplus/patients_19path_dro_validate_en.jsonl", ["eval.num_items=150"]),
    "medqa": ("medqa/medqa_usmle_4opt_dev.jsonl", ["data.task=medqa", "eval.num_items=150"]),
}
METRICS = ("top1", "brier", "ece", "auroc", "set_ece", "format_rate", "repeats_per_set")
# Method of a log -> arm of the evaluation.
ARMS = {"multi_rlcr": "policy", "base": "base"}


def one(data: Path, shift: str, seed: int) -> None:
    """Measure the policy of a seed and its warm-up on one distribution."""
    out = Path("runs/ddxplus_smollm2_elsewhere") / f"{shift}_seed{seed}"
    file, words = SHIFTS[shift]
    seconds = run_module(
        "mar.evaluate",
        str(RUNS / "multi_rlcr" / f"seed{seed}"),
        f"data.path={data}/{file}",
        *words,
        "k=3",
        "num_answers=",
        f"arms={','.join(ARMS.values())}",
        f"out={out}",
    )
    evaluation = read_evaluation(out)
    for method, arm in ARMS.items():
        document = {
            "shift": shift,
            "method": method,
            "seed": seed,
            **environment(),
            "num_items": evaluation["num_items"],
            "evaluate_s": seconds,
            **kept_of_arm(evaluation["arms"][arm]),
        }
        write_log(LOGS / f"{shift}_{method}_seed{seed}.json", document)


def markdown() -> str:
    """A line for each distribution and model: one set of three a question."""
    rows: dict[str, list[Log]] = {}
    for shift, logs in read_logs_by(LOGS, "shift", SHIFTS).items():
        for method in ARMS:
            rows[f"{shift}, {method}"] = [log for log in logs if log["method"] == method]
    columns: Columns = {
        "questions": lambda log: log["num_items"],
        "coverage@3": curve_at("coverage", 3),
        **{name: metric(name) for name in METRICS},
    }
    return table_over_seeds(rows, columns, "asked, model")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    args = parser.parse_args()
    for shift in SHIFTS:
        one(args.data, shift, args.seed)


if __name__ == "__main__":
    main()

"""Do confidences that were learnt on DDXPlus survive another distribution?  python -m experiments.generalise.run DATASETS [seed] [method]

DATASETS: the folder with ddxplus/ and medqa/. Measures a policy of experiments/ddxplus_smollm2 (its checkpoint has to be there) and its warm-up on
its own held-out patients, on patients of 19 conditions in another selection, and on MedQA. Logs: experiments/generalise/logs/.
"""

import argparse
import json
from pathlib import Path

from experiments.claims.run import command, kept
from experiments.claims.summary import grouped, lines_of, metric, on_curve
from experiments.ddxplus_smollm2.run import PATIENTS, RUNS
from mar.policy.sources import environment

LOGS = Path(__file__).parent / "logs"
SHIFTS = {  # name -> the words that ask for it
    "ddxplus": ["data.path=ddxplus/" + PATIENTS, "eval.num_items=64"],
    "ddxplus_19": ["data.path=ddxplus/patients_19path_dro_validate_en.jsonl", "eval.num_items=150"],
    "medqa": [
        "data.path=medqa/medqa_usmle_4opt_dev.jsonl",
        "data.task=medqa",
        "eval.num_items=150",
    ],
}
METRICS = ("top1", "brier", "ece", "auroc", "set_ece", "format_rate", "repeats_per_set")
METHODS = ("multi_rlcr", "multi_rlcr_own", "base")


def one(data: Path, shift: str, seed: int, method: str) -> None:
    """Measure a policy on one distribution; beside the first method, the warm-up too."""
    arms = {"policy": method} | ({"base": "base"} if method == METHODS[0] else {})
    out = Path("runs/generalise") / f"{shift}_{method}_seed{seed}"
    path, *words = SHIFTS[shift]
    where = path.replace("=", f"={data}/", 1)
    seconds = command(
        "mar.evaluate",
        str(RUNS / method / f"seed{seed}"),
        where,
        *words,
        "k=3",
        "num_answers=",
        f"arms={','.join(arms)}",
        f"out={out}",
    )
    document = json.loads((out / "evaluation.json").read_text())
    LOGS.mkdir(exist_ok=True)
    for arm, name in arms.items():
        told = {
            "shift": shift,
            "method": name,
            "seed": seed,
            **environment(),
            "num_items": document["num_items"],
        }
        (LOGS / f"{shift}_{name}_seed{seed}.json").write_text(
            json.dumps(told | {"evaluate_s": seconds, **kept(document["arms"][arm])}) + "\n"
        )


def markdown() -> str:
    """A line for each distribution and model: one set of three a question."""
    by_shift = grouped(LOGS, "shift", SHIFTS)
    found = {
        f"{s}, {m}": [log for log in logs if log["method"] == m]
        for s, logs in by_shift.items()
        for m in METHODS
    }
    columns = {
        "questions": lambda log: log["num_items"],
        "coverage@3": lambda log: on_curve(log, "coverage", 3),
    }
    return lines_of(found, columns | {name: metric(name) for name in METRICS}, "asked, model")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("method", nargs="?", default="multi_rlcr", choices=METHODS[:-1])
    args = parser.parse_args()
    for shift in SHIFTS:
        one(args.data, shift, args.seed, args.method)


if __name__ == "__main__":
    main()

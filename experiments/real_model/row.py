"""One row of the comparison on a real language model: a method and a seed, trained and measured.

    python -m experiments.real_model.row multi_rlcr_own 0 data.path=<folder of DDXPlus>

It trains with `mar.train`, 200 steps from the committed warm-up, then measures test questions with
`mar.evaluate`, and writes logs/rows/<method>_seed<seed>.json. The same command goes on where it was
interrupted. `warm_up_sets` and `warm_up_single` are the warm-up itself, not trained.

More words go to `mar.train`; `out=<folder>` is where runs lie, by default runs/real_model.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from experiments.common.commands import (
    kept_of_arm,
    read_evaluation,
    run_module,
    train_unless_finished,
    write_log,
)
from mar.files import read_jsonl
from mar.policy.sources import environment

HERE = Path(__file__).parent
ADAPTERS = HERE / "adapters"
LOGS = HERE / "logs" / "rows"
# Test questions, and answers of each.
ITEMS = 500
ANSWERS = 15

# The prompt's words are those of the warm-up.
PROMPTS = ["data.findings=lists", "data.request_first=true", "model.explain_decimals=false"]
BASE = ["+experiment=ddxplus_bayes", "model=smollm2-135m", "model.source=wheel"]
WARM_UP = [*BASE, *PROMPTS, "model.lora_rank=12", "model.lora_base=bfloat16"]
ROW = [
    "+experiment=ddxplus_bayes",
    "model=hf",
    *PROMPTS,
    "model.thinking=false",
    "model.max_prompt_tokens=256",
    "model.max_completion_tokens=96",
    "model.lora_rank=8",
    "model.lora_base=bfloat16",
    "model.lr=3e-4",
    "model.threads=1",
    "data.num_train=4000",
    "algo.group_size=8",
    "train.steps=200",
    "eval.num_items=16",
    "checkpoint.every=10",
]
# Patients of a step: sets are three times as long.
SETS = ["algo.prompts_per_step=4"]
SINGLE = ["algo.prompts_per_step=8"]
OWN = ["algo=own", "reward=multi_rlcr", "reward.brier_weight=3", *SETS]
METHODS = {
    "rlvr_single": ["algo=reinforce", "reward=rlvr_single", *SINGLE],
    "rlcr_single": ["algo=reinforce", "reward=rlcr_single", *SINGLE],
    "pass_at_k": ["algo=reinforce", "reward=rlvr_single", "algo.credit=set", "algo.pass_k=3"]
    + SINGLE,
    "multi_rlvr": ["algo=reinforce", "reward=multi_rlvr", *SETS],
    "multi_rlcr": ["algo=reinforce", "reward=multi_rlcr", *SETS],
    "multi_rlcr_own": OWN,
    "multi_rlcr_own_exact": [*OWN, "data.target=probabilities"],
}
UNTRAINED = {
    "warm_up_sets": METHODS["multi_rlcr_own"],
    "warm_up_single": METHODS["rlvr_single"],
}
# Of each training step, what the log keeps.
KEPT_OF_STEP = (
    "step",
    "reward/total",
    "policy/entropy",
    "policy/sampler_kl",
    "train/coverage@1",
    "train/coverage@3",
    "train/ece",
    "train/auroc",
    "train/q_mse",
    "train/format_rate",
    "train/repeats_per_set",
    "train/tokens_per_set",
)


def start_of(out: Path, words: list[str]) -> Path:
    """The checkpoint folder of the warm-up, made where it is not there yet."""
    start = out / "start"
    if not (start / "config.json").is_file():
        run_module("experiments.real_model.merge", str(ADAPTERS), str(start), *WARM_UP, *words)
    return start


def curve_of(run: Path) -> list[dict[str, Any]]:
    """What the log keeps of each training step."""
    steps = read_jsonl(run / "metrics.jsonl")
    return [{key: step[key] for key in KEPT_OF_STEP if key in step} for step in steps]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("method", choices=[*METHODS, *UNTRAINED])
    add("seed", type=int)
    add("words", nargs="*", metavar="WORD", help="such as data.path=<folder>")
    args = parser.parse_args()
    out = Path("runs/real_model")
    words = []
    for word in args.words:
        if word.startswith("out="):
            out = Path(word.removeprefix("out="))
        else:
            words.append(word)

    start = start_of(out, [word for word in words if word.startswith("data.path=")])
    method_words = (METHODS | UNTRAINED)[args.method]
    settings = [*ROW, *method_words, f"model.path={start}", f"seed={args.seed}", *words]
    run = out / args.method / f"seed{args.seed}"
    measure = [f"eval.num_items={ITEMS}", f"k={ANSWERS}", "num_answers=", "arms=policy"]
    log: dict[str, Any] = {"method": args.method, "seed": args.seed, **environment()}
    if args.method in METHODS:
        log["train_s"] = train_unless_finished(run, *settings, f"run_dir={run}")
        log["curve"] = curve_of(run)
        log["evaluate_s"] = run_module("mar.evaluate", str(run), *measure)
    else:
        log["evaluate_s"] = run_module("mar.evaluate", "base", *settings, *measure, f"out={run}")
    evaluation = read_evaluation(run)
    log |= {"num_items": evaluation["num_items"], "bars": evaluation["bars"]}
    log |= kept_of_arm(evaluation["arms"]["policy"])
    write_log(LOGS / f"{args.method}_seed{args.seed}.json", log)


if __name__ == "__main__":
    sys.exit(main())

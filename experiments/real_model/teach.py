"""The warm-up, taught on: confidences near the exact probability of their answer.

    python -m experiments.real_model.teach START OUT data.path=<folder of DDXPlus>

START is the merged warm-up (`experiments.real_model.merge`), OUT a checkpoint with its log,
sft.jsonl. The same command goes on where it was stopped.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.common.commands import run_module
from mar.errors import exit_code

# The prompt's words are those of the warm-up.
PROMPTS = ["data.findings=lists", "data.request_first=true", "model.explain_decimals=false"]
WORDS = [
    "+experiment=ddxplus_bayes",
    "model=hf",
    *PROMPTS,
    "model.thinking=false",
    "model.lora_rank=8",
    "model.lora_base=bfloat16",
    "model.threads=1",
    "reward=multi_rlcr",
    "sft.steps=120",
    "sft.batch=16",
    "sft.shares=[0.05,0,0.05,0.9]",
    "sft.hint=1",
    "sft.hint_counts=3",
    "sft.asked=[4,8,12,20]",
    "sft.log_every=5",
    "sft.save_every=10",
    "sft.eval_every=60",
    "sft.eval_items=32",
    "sft.warmup_steps=10",
    "sft.decay=0.5",
]


def taught_from(start: Path, out: Path, words: Sequence[str]) -> Path:
    """The checkpoint folder, made where it is not there yet."""
    if not (out / "config.json").is_file():
        places = [f"model.path={start}", f"run_dir={out}"]
        run_module("mar.sft", *WORDS, *places, *words, "logger.console=plain")
    return out


if __name__ == "__main__":
    sys.exit(exit_code(lambda: taught_from(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])))

"""The warm-up, taught on: what a confidence means, and then to write it badly again.

    python -m experiments.real_model.teach START OUT data.path=<folder of DDXPlus>

START is the merged warm-up (`experiments.real_model.merge`). The stages are the last two of the
embedded model's recipe:

`truth`: confidences at the exact probability of their answer.
`noise`: confidences nearly uninformative again, so that reinforcement learning has something to
bring back. Adapters of the last layers alone are trained, so that the layers below keep what they
know.

OUT/<stage> is a checkpoint with its log, sft.jsonl. The same command goes on where it was stopped.
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
    "sft.batch=16",
    "sft.asked=[4,8,12,20]",
    "sft.log_every=5",
    "sft.save_every=10",
    "sft.eval_items=32",
    "sft.warmup_steps=10",
    "sft.decay=0.5",
]
STAGES = {
    "truth": [
        "sft.steps=120",
        "sft.eval_every=60",
        "sft.shares=[0.05,0,0.05,0.9]",
        "sft.hint=1",
        "sft.hint_counts=3",
    ],
    "noise": [
        "sft.steps=30",
        "sft.eval_every=30",
        "sft.shares=[0,0,0,1]",
        "sft.hint=0.35",
        "sft.hint_counts=2",
        "model.lora_layers='^blocks[.]2[6-9][.]'",
    ],
}


def taught_from(start: Path, out: Path, words: Sequence[str]) -> Path:
    """The checkpoint folder of the last stage; a stage that is there is not made again."""
    for name, of_stage in STAGES.items():
        folder = out / name
        if not (folder / "config.json").is_file():
            places = [f"model.path={start}", f"run_dir={folder}"]
            run_module("mar.sft", *WORDS, *of_stage, *places, *words, "logger.console=plain")
        start = folder
    return start


if __name__ == "__main__":
    sys.exit(exit_code(lambda: taught_from(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])))

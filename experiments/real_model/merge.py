"""A checkpoint folder out of a base and the warm-up's adapters, for mar.train to start from.

    python -m experiments.real_model.merge ADAPTERS OUT model=... model.lora_rank=12 ...

The words are those of the warm-up. Then: python -m mar.train model=hf model.path=OUT
model.explain_decimals=false ...
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.real_model.warmed_up import open_warmed_up
from mar.answers.tokenizer import copy_tokenizer
from mar.errors import exit_code
from mar.policy.lora import merge
from mar.policy.weights import save_model


def run(adapters: str, out: Path, words: Sequence[str]) -> None:
    opened = open_warmed_up(adapters, words)
    save_model(merge(opened.model), out, torch.bfloat16)
    copy_tokenizer(opened.folder, out)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])))

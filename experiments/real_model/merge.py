"""A checkpoint folder out of a base and the warm-up's adapters, for mar.train to start from.

    python -m experiments.real_model.merge ADAPTERS OUT model=... model.lora_rank=12 ...

The words are those of the warm-up. Then: python -m mar.train model=hf model.path=OUT
model.explain_decimals=false ...
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mar.answers.tokenizer import copy_tokenizer, load_tokenizer, num_tokens
from mar.errors import exit_code
from mar.policy.lora import adapted, load_adapters, merge
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model, save_model
from mar.run.compose import compose


def run(adapters: Path, out: Path, words: Sequence[str]) -> None:
    config = compose(words)
    options = config.model
    base, _ = resolve_model(options.source, options.name, options.path)
    model = adapted(load_model(base, num_tokens=num_tokens(load_tokenizer(base))), options)
    load_adapters(model, adapters)
    save_model(merge(model), out, torch.bfloat16)
    copy_tokenizer(base, out)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])))

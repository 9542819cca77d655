"""The base model with a warm-up's adapters, opened in the words of that warm-up."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mar.answers.tokenizer import load_tokenizer, num_tokens
from mar.config import Config
from mar.policy.lora import adapted, load_adapters
from mar.policy.model import Decoder
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model
from mar.run.compose import compose

UNTOUCHED = "none"


@dataclass(frozen=True)
class WarmedUp:
    config: Config
    # Of the base model, whose tokenizer it is.
    folder: Path
    tokenizer: Any
    model: Decoder


def open_warmed_up(adapters: str, words: Sequence[str]) -> WarmedUp:
    """`adapters`: their folder, or UNTOUCHED for the base model alone."""
    config = compose(words)
    options = config.model
    torch.set_num_threads(options.threads or torch.get_num_threads())
    folder, _ = resolve_model(options.source, options.name, options.path)
    tokenizer = load_tokenizer(folder)
    model = adapted(load_model(folder, num_tokens=num_tokens(tokenizer)), options)
    if adapters != UNTOUCHED:
        load_adapters(model, Path(adapters))
    return WarmedUp(config, folder, tokenizer, model)

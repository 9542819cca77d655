"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): W x + scale * B (A x).

They sit on chosen linear layers, whose own weight W is not copied. A fused layer (`qkv`, `gate_up`)
has one A; its B has the rows of all its parts. peft's format knows the parts apart and repeats A.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from mar.config import ModelOptions
from mar.errors import UserError
from mar.policy.model import Decoder, Linear
from mar.policy.weights import fill, layout

# what the names of adapters' parameters have in common
ADAPTERS = "lora_"


class AdaptedLinear(Linear):
    """A linear layer with an adapter.

    lora_a [rank, in] starts random, lora_b [out, rank] at zero: at first nothing changes.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.scale = scale
        self.weight = base.weight
        self.bias = base.bias
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * linear(linear(x, self.lora_a), self.lora_b)


def add_adapters(model: Decoder, rank: int, scale: float, layers: str) -> None:
    """Put an adapter on every linear layer of the blocks in whose name the regular expression
    `layers` is found. In place, and started (`start_adapters`).

    Raises UserError where it finds none.
    """
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    chosen = [name for name in linears if re.search(layers, name)]
    if not chosen:
        raise UserError(
            f"model.lora_layers={layers!r} is found in no linear layer's name; "
            f"they are {', '.join([*linears][:4])}, ..."
        )
    for name in chosen:
        model.set_submodule(name, AdaptedLinear(linears[name], rank, scale))
    start_adapters(model)


def start_adapters(model: Decoder) -> None:
    """Give the adapters the values that they start from, the same every time: what they add is 0.

    A is normal with variance 1 / inputs, B is 0.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, AdaptedLinear):
            rank, inputs = layer.lora_a.shape
            start = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            fill(layer.lora_a, start)
            fill(layer.lora_b, torch.zeros(layer.lora_b.shape))


def adapted(model: Decoder, options: ModelOptions) -> Decoder:
    """The same model, with the adapters that the config asks for."""
    if options.lora_rank:
        add_adapters(model, options.lora_rank, options.lora_scale, options.lora_layers)
    return model


def trainable_pattern(options: ModelOptions) -> str:
    """The regular expression that finds the parameters to train, in their names.

    That is `model.trainable`; where it is empty the adapters, and without adapters everything.
    """
    if options.trainable:
        return options.trainable
    if options.lora_rank:
        return ADAPTERS
    return ""


def is_adapter(name: str) -> bool:
    """Whether a parameter with this name belongs to an adapter."""
    return f".{ADAPTERS}" in name


def merged_parameters(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter of the plain decoder that computes the same."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if is_adapter(name):
            continue
        layer = name.removesuffix(".weight")
        has_adapter = layer != name and f"{layer}.lora_a" in parameters
        if not has_adapter:
            yield name, parameter
            continue
        a = parameters[f"{layer}.lora_a"]
        b = parameters[f"{layer}.lora_b"]
        scale = cast(AdaptedLinear, model.get_submodule(layer)).scale
        yield name, parameter + scale * b @ a


def merge(model: Decoder) -> Decoder:
    """A decoder without adapters that computes the same; it shares what had no adapter."""
    with torch.device("meta"):
        plain = Decoder(model.config)
    state = {name: value.detach() for name, value in merged_parameters(model)}
    plain.load_state_dict(state, assign=True)
    return plain


def save_adapters(model: Decoder, folder: Path, base: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which peft reads:
    `PeftModel.from_pretrained(base_model, folder)`.

    Other parameters that were trained (`model.trainable`) are not in them.
    """
    parts = layout(model.config)
    tensors: dict[str, Tensor] = {}
    target_modules = []
    adapters = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)
    }
    for name, layer in adapters.items():
        theirs = parts[f"{name}.weight"]
        rows = layer.lora_b.detach().split([shape[0] for _, shape in theirs])
        for (weight_name, _), b in zip(theirs, rows, strict=True):
            module = weight_name.removesuffix(".weight")
            target_modules.append(module)
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = layer.lora_a.detach().clone()
            tensors[f"{prefix}.lora_B.weight"] = b.contiguous()
    first = next(iter(adapters.values()))
    rank = len(first.lora_a)
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank * first.scale,
        "lora_dropout": 0.0,
        "bias": "none",
        "base_model_name_or_path": base,
        "target_modules": sorted(target_modules),
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2) + "\n")

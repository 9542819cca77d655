"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): W x + scale * B (A x) in chosen linear layers; W is not copied.

A fused layer (`qkv`, `gate_up`) has one A and, in B, the rows of its parts; peft's format knows the parts and repeats that A.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from mar.errors import UserError
from mar.policy.model import Decoder, Linear
from mar.policy.weights import layout


class AdaptedLinear(Linear):
    """A linear layer with an adapter: lora_a [rank, in] starts random, lora_b [out, rank] at zero, so that at first nothing changes."""

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, scale
        self.weight, self.bias = base.weight, base.bias
        drawn = torch.randn(rank, base.in_features, generator=generator) * base.in_features**-0.5
        self.lora_a = nn.Parameter(drawn.to(base.weight))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * linear(linear(x, self.lora_a), self.lora_b)


def adapt(model: Decoder, rank: int, scale: float, where: str) -> None:
    """Put an adapter, in place, on every linear layer of the blocks in whose name the regular expression `where` is found. The same start every time.
    Raises UserError where it finds none."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    chosen = [name for name in linears if re.search(where, name)]
    if not chosen:
        raise UserError(
            f"model.lora_layers={where!r} is found in no linear layer's name; they are {', '.join([*linears][:4])}, ..."
        )
    generator = torch.Generator().manual_seed(0)
    for name in chosen:
        model.set_submodule(name, AdaptedLinear(linears[name], rank, scale, generator))


def merged(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter of the plain decoder that computes the same, one at a time, whole where the model is sharded."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_a" in parameters and layer != name:
            a, b = _whole(parameters[f"{layer}.lora_a"]), _whole(parameters[f"{layer}.lora_b"])
            scale = cast(AdaptedLinear, model.get_submodule(layer)).scale
            yield name, _whole(parameter) + scale * b @ a
        elif ".lora_" not in name:
            yield name, _whole(parameter)


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def merge(model: Decoder) -> Decoder:
    """A decoder without adapters that computes the same; it shares what had none."""
    with torch.device("meta"):
        out = Decoder(model.config)
    out.load_state_dict({name: value.detach() for name, value in merged(model)}, assign=True)
    return out


def save_adapters(model: Decoder, folder: Path, base: str) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, which `peft.PeftModel.from_pretrained(base_model, folder)` reads. What else was trained
    (model.trainable) is not in them."""
    parts, tensors = layout(model.config), {}
    adapted = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)
    }
    for name, layer in adapted.items():
        rows = layer.lora_b.detach().split([shape[0] for _, shape in parts[f"{name}.weight"]])
        for (theirs, _), b in zip(parts[f"{name}.weight"], rows, strict=True):
            prefix = "base_model.model." + theirs.removesuffix(".weight")
            tensors[f"{prefix}.lora_A.weight"] = layer.lora_a.detach().clone()
            tensors[f"{prefix}.lora_B.weight"] = b.contiguous()
    first = next(iter(adapted.values()))
    rank, modules = (
        len(first.lora_a),
        sorted({key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors}),
    )
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank * first.scale,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    told |= {
        "base_model_name_or_path": base,
        "target_modules": modules,
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(told, indent=2) + "\n")

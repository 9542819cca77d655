"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): W x + scale * B (A x).

They sit on chosen linear layers, whose own weight W is not copied. A fused layer (`qkv`, `gate_up`)
has one A; its B has the rows of all its parts. peft's format knows the parts apart and repeats A.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from mar.config import ModelOptions
from mar.errors import UserError
from mar.files import read_json_object
from mar.policy.model import Decoder, Linear
from mar.policy.weights import fill, layout

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

# what the names of adapters' parameters have in common
ADAPTERS = "lora_"


class AdaptedLinear(Linear):
    """A linear layer with an adapter.

    lora_a [rank, in] starts random, lora_b [out, rank] at zero: at first nothing changes. With a
    `base_dtype` the frozen weight is kept in it, and everything is multiplied in it; the adapter is
    kept as the weight was.
    """

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, base_dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.scale = scale
        self.weight = base.weight
        self.bias = base.bias
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        if base_dtype not in (None, base.weight.dtype):
            self.weight = nn.Parameter(base.weight.detach().to(base_dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype != x.dtype:
            low = x.to(self.weight.dtype)
            bias = None if self.bias is None else self.bias.to(low.dtype)
            inner = self.scale * linear(low, self.lora_a.to(low.dtype))
            below = linear(low, self.weight, bias)
            return torch.addmm(below, inner, self.lora_b.to(low.dtype).T).to(x.dtype)
        return super().forward(x) + self.scale * linear(linear(x, self.lora_a), self.lora_b)


def add_adapters(
    model: Decoder,
    rank: int,
    scale: float,
    layers: str,
    base_dtype: torch.dtype | None = None,
) -> None:
    """Put an adapter on every linear layer of the blocks in whose name the regular expression
    `layers` is found. In place, and started (`start_adapters`). `base_dtype`: see `AdaptedLinear`.

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
        model.set_submodule(name, AdaptedLinear(linears[name], rank, scale, base_dtype))
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
        base_dtype = torch.bfloat16 if options.lora_base == "bfloat16" else None
        add_adapters(model, options.lora_rank, options.lora_scale, options.lora_layers, base_dtype)
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


def save_adapters(
    model: Decoder, folder: Path, base: str, dtype: torch.dtype | None = None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which peft reads:
    `PeftModel.from_pretrained(base_model, folder)`.

    Other parameters that were trained (`model.trainable`) are not in them. `dtype`: what they are
    stored in; None: their own.
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
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(adapter_config, indent=2) + "\n")


def require_rounded_are_frozen(model: Decoder) -> None:
    """Raises UserError where weights below the adapters are rounded and are to be trained."""
    for name, layer in model.named_modules():
        if not isinstance(layer, AdaptedLinear):
            continue
        if layer.weight.requires_grad and layer.weight.dtype != layer.lora_a.dtype:
            raise UserError(
                f"model.trainable finds {name}.weight, which model.lora_base=bfloat16 has rounded, so "
                "small updates would not move it: take model.lora_base=as_stored"
            )


def _has_shape(tensor: Tensor | None, shape: tuple[int, ...]) -> bool:
    return tensor is not None and tuple(tensor.shape) == shape


def load_adapters(model: Decoder, folder: Path) -> None:
    """Put what `save_adapters` wrote, in place, into a model with adapters of the same rank, scale
    and layers. Raises UserError where they differ, for what another program trained (each part of a
    fused layer has its own A there), and where the folder cannot be read."""
    told = read_json_object(folder / ADAPTER_CONFIG)
    try:
        tensors = load_file(folder / ADAPTER_FILE)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / ADAPTER_FILE} cannot be read ({error})") from None
    advice = "set the model.lora_* that it was made with"
    parts = layout(model.config)
    for name, layer in model.named_modules():
        if not isinstance(layer, AdaptedLinear):
            continue
        rank = len(layer.lora_a)
        theirs = parts[f"{name}.weight"]
        modules = [tensor_name.removesuffix(".weight") for tensor_name, _ in theirs]
        prefixes = [f"base_model.model.{module}" for module in modules]
        a_of_parts = [tensors.pop(f"{prefix}.lora_A.weight", None) for prefix in prefixes]
        b_of_parts = [tensors.pop(f"{prefix}.lora_B.weight", None) for prefix in prefixes]
        fits_a = [_has_shape(a, tuple(layer.lora_a.shape)) for a in a_of_parts]
        fits_b = [
            _has_shape(b, (shape[0], rank))
            for b, (_, shape) in zip(b_of_parts, theirs, strict=True)
        ]
        if not all((*fits_a, *fits_b)):
            raise UserError(f"{folder} has no adapter of rank {rank} for {name}: {advice}")
        first_a, *more_a = (cast(Tensor, a) for a in a_of_parts)
        if not all(torch.equal(a, first_a) for a in more_a):
            raise UserError(
                f"{folder} has a lora_A of its own for each part of {name}, which is one layer here: "
                "mar reads the adapters that it wrote itself"
            )
        alpha = told.get("lora_alpha")
        if not isinstance(alpha, int | float) or not math.isclose(alpha, rank * layer.scale):
            raise UserError(
                f"{folder} has lora_alpha={alpha}, which is not rank * "
                f"model.lora_scale = {rank * layer.scale:g}: {advice}"
            )
        fill(layer.lora_a, first_a)
        fill(layer.lora_b, torch.cat([cast(Tensor, b) for b in b_of_parts]))
    if tensors:
        raise UserError(
            f"{folder} has {min(tensors)}, for which the model has no adapter: {advice}"
        )

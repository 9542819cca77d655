"""Hugging Face checkpoints in and out: config.json and safetensors.

The fused `qkv` and `gate_up` exist only in memory; a checkpoint has their parts.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mar.errors import UserError
from mar.files import read_json_object
from mar.policy.model import Decoder, ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# what weights may be stored as; narrower numbers mean nothing without their scales
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# our parameter -> name and shape of the checkpoint's tensors, which are joined along axis 0
Layout = dict[str, list[tuple[str, tuple[int, ...]]]]


def layout(config: ModelConfig) -> Layout:
    """Which tensors of a checkpoint, with their shapes, make each parameter of the decoder."""
    embedding = (config.vocab_size, config.hidden_size)
    parts: Layout = {
        "embed.weight": [("model.embed_tokens.weight", embedding)],
        "norm.weight": [("model.norm.weight", (config.hidden_size,))],
    }
    for index in range(config.num_layers):
        parts |= _block_layout(config, f"blocks.{index}", f"model.layers.{index}")
    if not config.tied_embeddings:
        parts["head.weight"] = [("lm_head.weight", embedding)]
    return parts


def _block_layout(config: ModelConfig, ours: str, theirs: str) -> Layout:
    """The layout of one block, which is called `ours` here and `theirs` in the checkpoint."""
    parts: Layout = {}

    def linear(name: str, sizes: tuple[int, ...], inputs: int, bias: bool) -> None:
        """`sizes`: the outputs of each of the checkpoint's layers, in our order.

        A checkpoint may have them as one layer, as we do.
        """
        layers = config.family.tensors[name]
        if len(layers) == 1:
            sizes = (sum(sizes),)
        outputs = list(zip(layers, sizes, strict=True))
        parts[f"{ours}.{name}.weight"] = [
            (f"{theirs}.{layer}.weight", (size, inputs)) for layer, size in outputs
        ]
        if bias:
            parts[f"{ours}.{name}.bias"] = [
                (f"{theirs}.{layer}.bias", (size,)) for layer, size in outputs
            ]

    def norm(name: str, size: int) -> None:
        (layer,) = config.family.tensors[name]
        parts[f"{ours}.{name}.weight"] = [(f"{theirs}.{layer}.weight", (size,))]

    hidden = config.hidden_size
    wide = config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    linear("qkv", (queries, keys, keys), inputs=hidden, bias=config.attention_bias)
    linear("o", (hidden,), inputs=queries, bias=config.output_bias)
    linear("gate_up", (wide, wide), inputs=hidden, bias=config.mlp_bias)
    linear("down", (hidden,), inputs=wide, bias=config.mlp_bias)
    norm("attention_norm", hidden)
    norm("mlp_norm", hidden)
    if config.qk_norm:
        q_width, k_width = config.qk_norm_widths
        norm("q_norm", q_width)
        norm("k_norm", k_width)
    return parts


def split_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's state dictionary -> the checkpoint's tensors (a tied head is dropped)."""
    tensors: dict[str, Tensor] = {}
    for ours, parts in layout(config).items():
        pieces = state[ours].split([shape[0] for _, shape in parts])
        for (name, _), piece in zip(parts, pieces, strict=True):
            tensors[name] = piece
    return tensors


def save_model(
    model: Decoder,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write `config.json` and one `model.safetensors`, which transformers reads.

    `dtype` None keeps the model's own. `extra` goes into config.json as it is (`eos_token_id`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.embed.weight.dtype
    tensors = {}
    for name, tensor in split_state(model.config, model.state_dict()).items():
        tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
    # an interrupted save leaves no half file under the real name
    unfinished = folder / f"{SINGLE}.tmp"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / SINGLE)
    # a checkpoint that was here before may have had an index
    (folder / INDEX).unlink(missing_ok=True)

    dtype_name = str(dtype).removeprefix("torch.")
    config = model.config.to_hf() | {
        # without these, transformers fills in the numbers of its own class
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        # transformers 4 reads the first name, transformers 5 the second
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
    }
    config |= extra or {}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_model(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    num_tokens: int | None = None,
) -> Decoder:
    """A decoder with the weights of a checkpoint folder.

    `num_tokens`: how many ids the tokenizer has, where the embedding may have more rows
    (ModelConfig.num_tokens).

    Raises UserError naming the file that is missing or damaged, or the tensor that is missing,
    unexpected or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder, num_tokens)
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(dict(_parameters(folder, config, dtype, device)), assign=True)
    return model


def load_into(model: Decoder, folder: Path) -> None:
    """Give a decoder, which may be sharded or have adapters, the weights of a checkpoint folder.

    One parameter at a time, so that no more than one is whole in memory: the files are mapped. What
    the decoder does not have, as a critic's trunk has no head, is left out. Raises as `load_model`.
    """
    parameters = dict(model.named_parameters())
    dtype = model.embed.weight.dtype
    for name, whole in _parameters(folder, model.config, dtype, "cpu"):
        if name in parameters:
            fill(parameters[name], whole)


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Give a parameter these values; one that is sharded takes this rank's rows of them."""
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                mesh = parameter.device_mesh
                shards = whole.chunk(mesh.size(axis))
                index = mesh.get_local_rank(axis)
                # with fewer rows than ranks the last ranks have none
                whole = shards[index] if index < len(shards) else whole[:0]
        parameter = parameter.to_local()
    parameter.copy_(whole)


def read_config(folder: Path, num_tokens: int | None = None) -> ModelConfig:
    """The shape that a checkpoint folder's config.json describes. Raises UserError.

    `num_tokens`: how many ids the tokenizer has, where the embedding may have more rows.
    """
    config = ModelConfig.from_hf(read_json_object(folder / "config.json"))
    if num_tokens is None or num_tokens == config.vocab_size:
        return config
    return replace(config, num_tokens=num_tokens)


def _parameters(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter of the decoder; see `load_model` for the errors."""
    found = _read_tensors(folder)
    embedding = None
    for ours, parts in layout(config).items():
        pieces = [_take(found, folder, name, shape).to(device, dtype) for name, shape in parts]
        # a single piece is not copied
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if ours == "embed.weight" and config.tied_embeddings:
            embedding = whole
        yield ours, whole
    if embedding is not None and "lm_head.weight" in found:
        head = found.pop("lm_head.weight").to(device, dtype)
        if not torch.equal(head, embedding):
            raise UserError(
                f"{folder}: lm_head.weight differs from the embedding, "
                "but tie_word_embeddings is true"
            )
    # old Llama files hold the buffer of their rotary positions
    unexpected = [name for name in found if not name.endswith("rotary_emb.inv_freq")]
    if unexpected:
        raise UserError(
            f"{folder}: {config.architecture} has no tensor {unexpected[0]} "
            f"({len(unexpected)} unexpected)"
        )


def _take(found: dict[str, Tensor], folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """Take a tensor out of those that were found."""
    if name not in found:
        raise UserError(f"{folder}: the tensor {name} is missing")
    tensor = found.pop(name)
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{folder}: {name} has shape {list(tensor.shape)}, "
            f"but config.json asks for {list(shape)}"
        )
    if tensor.dtype not in FLOATS:
        raise UserError(
            f"{folder}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, which are "
            "codes of quantised numbers: take the checkpoint that is not quantised"
        )
    return tensor


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the files that the index names."""
    files = [SINGLE]
    if (folder / INDEX).exists():
        files = _indexed_files(folder / INDEX)
    tensors: dict[str, Tensor] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path} does not exist as a file: the checkpoint is incomplete")
        try:
            with safe_open(path, framework="pt") as handle:
                inside = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is truncated or not a safetensors file ({error}): fetch or copy it again"
            ) from None
        twice = sorted(inside.keys() & tensors.keys())
        if twice:
            raise UserError(f"{path} holds {twice[0]}, which another file of the index holds too")
        tensors |= inside
    return tensors


def _indexed_files(index: Path) -> list[str]:
    """The files that an index names. Each must lie beside it: the hashes that a run records are of
    the files there (sources.hashes), and a checkpoint has no business elsewhere on the disk."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map must say in which file each tensor is")
    for name, file in weight_map.items():
        is_plain_name = isinstance(file, str) and Path(file).name == file
        if not is_plain_name or not file.endswith(".safetensors"):
            raise UserError(
                f"{index}: {name} is said to be in {file!r}, "
                "which is no *.safetensors file beside the index"
            )
    return sorted(set(weight_map.values()))

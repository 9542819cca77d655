"""Hugging Face checkpoints in and out: config.json and safetensors. The fused `qkv` and `gate_up` exist only in memory."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mar.errors import UserError
from mar.policy.model import Decoder, ModelConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

Layout = dict[
    str, list[tuple[str, tuple[int, ...]]]
]  # our parameter -> the checkpoint's tensors, joined along axis 0


def layout(config: ModelConfig) -> Layout:
    """Which tensors of a checkpoint, with their shapes, make each parameter of the decoder."""
    size, wide, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "qkv": (
            "self_attn",
            {"q_proj": query, "k_proj": key, "v_proj": key},
            size,
            config.attention_bias,
        ),
        "o": ("self_attn", {"o_proj": size}, query, config.output_bias),
        "gate_up": ("mlp", {"gate_proj": wide, "up_proj": wide}, size, config.mlp_bias),
        "down": ("mlp", {"down_proj": size}, wide, config.mlp_bias),
    }
    norms = {
        "attention_norm": ("input_layernorm", size),
        "mlp_norm": ("post_attention_layernorm", size),
    }
    if config.qk_norm:
        norms |= {f"{x}_norm": (f"self_attn.{x}_norm", config.head_dim) for x in "qk"}
    out: Layout = {
        "embed.weight": [("model.embed_tokens.weight", (vocab, size))],
        "norm.weight": [("model.norm.weight", (size,))],
    }
    for index in range(config.num_layers):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        for name, (part, outputs, inputs, bias) in linears.items():
            out[f"{ours}.{name}.weight"] = [
                (f"{theirs}.{part}.{x}.weight", (n, inputs)) for x, n in outputs.items()
            ]
            if bias:
                out[f"{ours}.{name}.bias"] = [
                    (f"{theirs}.{part}.{x}.bias", (n,)) for x, n in outputs.items()
                ]
        for name, (theirs_norm, length) in norms.items():
            out[f"{ours}.{name}.weight"] = [(f"{theirs}.{theirs_norm}.weight", (length,))]
    if not config.tied_embeddings:
        out["head.weight"] = [("lm_head.weight", (vocab, size))]
    return out


def split_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's state dictionary -> the checkpoint's tensors (a tied head is dropped)."""
    tensors: dict[str, Tensor] = {}
    for ours, parts in layout(config).items():
        pieces = state[ours].split([shape[0] for _, shape in parts])
        tensors |= {name: piece for (name, _), piece in zip(parts, pieces, strict=True)}
    return tensors


def save_model(
    model: Decoder,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write `config.json` and one `model.safetensors`, which transformers reads.

    `dtype` None keeps the model's own. `extra` goes into config.json as it is (say eos_token_id).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.embed.weight.dtype
    tensors = split_state(model.config, model.state_dict())
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()
    }
    unfinished = (
        folder / f"{SINGLE}.tmp"
    )  # an interrupted save leaves no half file under the real name
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / SINGLE)
    (folder / INDEX).unlink(missing_ok=True)  # of another checkpoint in this folder
    written = str(dtype).removeprefix("torch.")
    tokens = {
        "bos_token_id": None,
        "eos_token_id": None,
    }  # else transformers fills in its class's own numbers
    config = (
        model.config.to_hf() | tokens | {"torch_dtype": written, "dtype": written} | (extra or {})
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: give a folder with config.json and safetensors files"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """A checkpoint folder -> Decoder.

    Raises UserError naming the file that is missing or damaged, or the tensor that is missing, unexpected or mis-shaped.
    """
    folder = Path(folder)
    config, found = (
        ModelConfig.from_hf(read_json_object(folder / "config.json")),
        _read_tensors(folder),
    )
    state: dict[str, Tensor] = {}
    for ours, parts in layout(config).items():
        pieces = [_take(found, folder, name, shape).to(device, dtype) for name, shape in parts]
        state[ours] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    tied_head = found.pop("lm_head.weight", None) if config.tied_embeddings else None
    if tied_head is not None and not torch.equal(
        tied_head.to(device, dtype), state["embed.weight"]
    ):
        raise UserError(
            f"{folder}: lm_head.weight differs from the embedding, but tie_word_embeddings is true"
        )
    unexpected = [
        name for name in found if not name.endswith("rotary_emb.inv_freq")
    ]  # a buffer of old Llama files
    if unexpected:
        raise UserError(
            f"{folder}: {config.architecture} has no tensor {unexpected[0]} ({len(unexpected)} unexpected)"
        )
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(state, assign=True)
    return model


def _take(found: dict[str, Tensor], folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in found:
        raise UserError(f"{folder}: the tensor {name} is missing")
    tensor = found.pop(name)
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{folder}: {name} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}"
        )
    return tensor


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the files that the index names."""
    files = [SINGLE]
    if (folder / INDEX).exists():
        files = sorted(set(read_json_object(folder / INDEX).get("weight_map", {}).values()))
    tensors: dict[str, Tensor] = {}
    for path in (folder / file for file in files):
        if not path.exists():
            raise UserError(f"{path} does not exist: the checkpoint is incomplete")
        try:
            with safe_open(path, framework="pt") as handle:
                tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is truncated or not a safetensors file ({error}): fetch or copy it again"
            ) from None
    return tensors

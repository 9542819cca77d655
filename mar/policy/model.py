"""The policy: one decoder for Llama, Mistral, Qwen2 and Qwen3, in training, prefill and decode.

Its tokens are one line without padding. There is no cache, mask, generation or logits tensor here: how tokens attend is a function of the
caller, and token log-probabilities come from `mar_kernels.linear_logprobs`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mar_kernels
from mar.errors import UserError
from mar.policy.attention import Attend, PackedGroups, group_attention

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

SAME_NAMES = "vocab_size hidden_size intermediate_size head_dim rms_norm_eps rope_theta rope_scaling attention_bias mlp_bias".split()

HF_NAMES = {name: name for name in SAME_NAMES} | {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}

LARGE_WEIGHT, REORDERED_FOR = (
    1 << 18,
    16,
)  # elements from which a weight is packed, rows that it is laid out for (it serves any number)

LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. `rope_scaling` is None or the `llama3` dictionary of Hugging Face's config.json."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_positions: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd: rotary positions need an even one")

    @property
    def output_bias(self) -> bool:
        """Qwen2 has biases on q, k and v only."""
        return self.attention_bias and self.architecture != "Qwen2ForCausalLM"

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
        """From config.json of transformers 4 or 5. Raises UserError, naming what this decoder does not compute."""
        architecture = (hf.get("architectures") or ["none"])[0]
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(
                f"config.json: architecture {architecture} is not supported: use one of {known}"
            )
        _refuse_unsupported(architecture, hf)
        fields = {
            ours: hf[theirs] for ours, theirs in HF_NAMES.items() if hf.get(theirs) is not None
        }
        heads, qwen3 = fields["num_heads"], architecture == "Qwen3ForCausalLM"
        defaults = {
            "num_kv_heads": heads,
            "head_dim": 128 if qwen3 else fields["hidden_size"] // heads,
        }
        fields |= {
            "qk_norm": qwen3,
            "attention_bias": architecture == "Qwen2ForCausalLM"
            or fields.get("attention_bias", False),
        }
        return cls(architecture=architecture, **(defaults | fields | _read_rope(hf)))

    def to_hf(self) -> dict[str, Any]:
        """The dictionary of config.json, in the words of transformers 4, which transformers 5 reads too."""
        model_type = self.architecture.removesuffix("ForCausalLM").lower()
        fixed = {"hidden_act": "silu", "sliding_window": None, "use_sliding_window": False}
        shape = {theirs: getattr(self, ours) for ours, theirs in HF_NAMES.items()}
        return {"architectures": [self.architecture], "model_type": model_type, **shape, **fixed}


def _refuse_unsupported(architecture: str, hf: dict[str, Any]) -> None:
    window = (
        hf.get("sliding_window", 4096) if architecture == "MistralForCausalLM" else None
    )  # 4096 is its default
    problems = {
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "quantization_config": hf.get("quantization_config") is not None,
        "use_sliding_window": bool(hf.get("use_sliding_window")),
        "sliding_window": window is not None,
        "layer_types": any(kind != "full_attention" for kind in hf.get("layer_types") or ()),
    }
    for key in (key for key, refused in problems.items() if refused):
        raise UserError(
            f"config.json: {key}={hf.get(key, window)!r} is not supported for {architecture}"
        )
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        if not isinstance(hf.get(key), int):
            raise UserError(f"config.json: {key} is missing or not an integer")


def _read_rope(hf: dict[str, Any]) -> dict[str, Any]:
    """The rope fields. transformers 5 writes `rope_parameters`; transformers 4 wrote `rope_theta` and `rope_scaling`."""
    rope = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UserError(f"config.json: partial_rotary_factor={partial} is not supported")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "llama3":
        raise UserError(f"config.json: rope type {kind!r} is not supported: default and llama3 are")
    if missing := [key for key in LLAMA3_KEYS if key not in rope]:
        raise UserError(f"config.json: the llama3 rope scaling has no {missing[0]}")
    scaling = {"rope_type": "llama3", **{key: rope[key] for key in LLAMA3_KEYS}}
    return {"rope_theta": theta, "rope_scaling": scaling}


def rope_frequencies(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, " half"]:
    """Radians per position of each pair of channels, [head_dim / 2]; `llama3` slows the long waves (Llama 3.1)."""
    powers = torch.arange(0, config.head_dim, 2, device=device).to(dtype) / config.head_dim
    frequencies = 1.0 / config.rope_theta**powers
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, length = (config.rope_scaling[key] for key in LLAMA3_KEYS)
    turns = length * frequencies / (2 * math.pi)  # over the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves as pairs (Hugging Face's order); `sin` has its first half negated. x [N, H, D], tables [N, 1, D]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def reorder_weight(weight: Tensor) -> Tensor | None:
    """A copy of a weight in the layout that oneDNN wants, None where that gains nothing. On a CPU a product with few rows, as in decoding,
    takes about half as long with it, one with thousands nine tenths (experiments/bench)."""
    gains = (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= LARGE_WEIGHT
    )
    return (
        torch.ops.mkldnn._reorder_linear_weight(weight, REORDERED_FOR)
        if gains and torch.backends.mkldnn.is_available()
        else None
    )


def project(x: Tensor, weight: Tensor, bias: Tensor | None, reordered: Tensor | None) -> Tensor:
    """x [N, in] @ weight [out, in].T + bias -> [N, out]. `reordered`: what `reorder_weight` made of the weight."""
    if reordered is None:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], "")


class Linear(nn.Linear):
    reordered: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias, self.reordered)


class Block(nn.Module):
    """One layer: x + o(attend(qkv(norm x))), then x + down(silu(gate) * up) of its norm."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index, self.heads, self.kv_heads = index, config.num_heads, config.num_kv_heads
        size, wide, width = (
            config.hidden_size,
            config.intermediate_size,
            config.num_heads * config.head_dim,
        )
        self.attention_norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.qkv = Linear(
            size, width + 2 * config.num_kv_heads * config.head_dim, bias=config.attention_bias
        )
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.o = Linear(width, size, bias=config.output_bias)
        self.mlp_norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.gate_up = Linear(size, 2 * wide, bias=config.mlp_bias)
        self.down = Linear(wide, size, bias=config.mlp_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads = rearrange(self.qkv(self.attention_norm(x)), "n (h d) -> n h d", d=cos.shape[-1])
        both, v = heads.split(
            (self.heads + self.kv_heads, self.kv_heads), dim=1
        )  # q and k: one norm, one rotation
        if self.q_norm is not None and self.k_norm is not None:
            weights = (
                self.q_norm.weight.expand(self.heads, -1),
                self.k_norm.weight.expand(self.kv_heads, -1),
            )
            both = F.rms_norm(both, both.shape[-1:], eps=self.q_norm.eps) * torch.cat(weights)
        q, k = rotate(both, cos, sin).split((self.heads, self.kv_heads), dim=1)
        out = attend(self.index, q, k, v)
        x = x + self.o(out.flatten(1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """`checkpoint_blocks` recomputes each block in the backward pass: same gradients, less memory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.checkpoint_blocks = config, False
        self.embed = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = (
            None
            if config.tied_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self._frequencies: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif (
                parameter.dim() == 2 and not parameter.is_meta
            ):  # normal_ on meta imports torch._dynamo, 3 s
                residual = name.endswith(
                    ("o.weight", "down.weight")
                )  # 2L of them add up in the residual stream
                scale = parameter.shape[1] * (2 * self.config.num_layers if residual else 1)
                nn.init.normal_(parameter, std=scale**-0.5)

    @property
    def head_weight(self) -> Float[Tensor, "vocab size"]:
        return self.embed.weight if self.head is None else self.head.weight

    @contextmanager
    def reordered_weights(self) -> Iterator[None]:
        """For as long as no weight changes and no gradient is asked for: every linear layer of the blocks uses `reorder_weight` of its weight."""
        layers = [module for module in self.blocks.modules() if isinstance(module, Linear)]
        try:
            for layer in layers:
                layer.reordered = reorder_weight(layer.weight)
            yield
        finally:
            for layer in layers:
                layer.reordered = None

    def rope(self, positions: Int64[Tensor, " n"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin [N, 1, head_dim], computed in float32 or wider."""
        key = (torch.promote_types(dtype, torch.float32), positions.device)
        if key not in self._frequencies:  # not a buffer: `model.to(bfloat16)` must not touch it
            self._frequencies[key] = rope_frequencies(self.config, *key)
        angles = (positions[:, None].to(key[0]) * self._frequencies[key])[:, None]
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def hidden(
        self, ids: Int64[Tensor, " n"], positions: Int64[Tensor, " n"], attend: Attend
    ) -> Float[Tensor, "n size"]:
        """Hidden states of N tokens after the last norm. `attend(layer, q, k, v)` gets rotated q and k and scales by 1/sqrt(head_dim)."""
        x = self.embed(ids)
        cos, sin = self.rope(positions, x.dtype)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, cos, sin, attend)
        return self.norm(x)

    def forward(
        self, packed: PackedGroups, temperature: float = 1.0
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, " m"]]:
        """Log-probability, entropy and log-sum-exp (nats, at `temperature`) of each of the M completion tokens."""
        hidden = self.hidden(packed.ids, packed.positions, group_attention(packed))
        return mar_kernels.linear_logprobs(
            hidden[packed.predict_from], self.head_weight, packed.targets, temperature
        )

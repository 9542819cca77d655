"""The model families that the decoder computes, each by what it does otherwise than Llama.

To add one: an entry of ARCHITECTURES, a shape in `tests/conftest.py`, with which the sampler's
tests take it up, and a case in `tests/policy/test_model.py`, which holds it against transformers.
What an entry cannot say is a new field of `Family`, read in `model.py`; a number of a checkpoint is
a field of `ModelConfig`, named in HF_NAMES. A config.json that asks for more than its entry says is
refused by the name of the key, for the keys of `_refuse_unsupported` in `model.py`. What no key
says (a norm's gain counted from 1, scaled embeddings) only the comparison with transformers shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# The decoder's layer -> the checkpoint's, in the order in which the decoder joins them.
Tensors = Mapping[str, tuple[str, ...]]

LLAMA_TENSORS: Tensors = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "attention_norm": ("input_layernorm",),
    "mlp_norm": ("post_attention_layernorm",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
}


@dataclass(frozen=True)
class Family:
    """One model family; the defaults are Llama's."""

    # `model_type` of config.json
    model_type: str

    # q, k and v have biases and o has none, whatever config.json says
    qkv_bias: bool = False

    # RMSNorm of the queries and of the keys, before the rotation: over each head's channels, or
    # over those of all heads together
    qk_norm: Literal["none", "head", "all"] = "none"

    # where a block's two norms stand: x + f(norm(x)), or x + norm(f(x))
    norms: Literal["before", "after"] = "before"

    # every so many layers one has no rotary positions, if config.json has no `no_rope_layers`;
    # 0: all layers have them, and that key is not read
    no_rope_interval: int = 0

    # whether `sliding_window` of config.json holds without `use_sliding_window`, and the window
    # that transformers takes where the key is missing
    has_window: bool = False
    default_window: int | None = None

    # fields of ModelConfig, for keys that config.json may leave to transformers' class
    defaults: Mapping[str, Any] = field(default_factory=dict)

    # what a checkpoint calls the layers of a block
    tensors: Tensors = field(default_factory=lambda: LLAMA_TENSORS)


# `architectures` of config.json -> its family
ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family(
        "mistral", has_window=True, default_window=4096, defaults={"max_positions": 131072}
    ),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, defaults={"max_positions": 32768}),
    "Qwen3ForCausalLM": Family(
        "qwen3", qk_norm="head", defaults={"head_dim": 128, "max_positions": 32768}
    ),
    # Phi-4, and what there is of Phi-3 without a window and without long rope
    "Phi3ForCausalLM": Family(
        "phi3",
        has_window=True,
        defaults={"rms_norm_eps": 1e-5, "max_positions": 4096},
        tensors={
            **LLAMA_TENSORS,
            "qkv": ("self_attn.qkv_proj",),
            "gate_up": ("mlp.gate_up_proj",),
        },
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        no_rope_interval=4,
        defaults={"rope_theta": 2e6, "tied_embeddings": True, "max_positions": 32768},
    ),
    # OLMo 2 (arXiv:2501.00656), section 3.3
    "Olmo2ForCausalLM": Family(
        "olmo2",
        qk_norm="all",
        norms="after",
        defaults={"rms_norm_eps": 1e-5},
        tensors={
            **LLAMA_TENSORS,
            "attention_norm": ("post_attention_layernorm",),
            "mlp_norm": ("post_feedforward_layernorm",),
        },
    ),
}

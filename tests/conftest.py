"""What several tests need: tiny random models whose distributions are far from uniform."""

from collections.abc import Callable

import pytest
import torch

from mar.policy.model import Decoder, ModelConfig

SHAPES = {
    "LlamaForCausalLM": {"tied_embeddings": True},
    "MistralForCausalLM": {"num_kv_heads": 4},
    "Qwen2ForCausalLM": {"attention_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True, "tied_embeddings": True},
    "Phi3ForCausalLM": {},
    "SmolLM3ForCausalLM": {"tied_embeddings": True, "without_rope": (1,)},
    "Olmo2ForCausalLM": {"qk_norm": True},
}


@pytest.fixture
def tiny_model() -> Callable[..., Decoder]:
    """A function: (architecture, vocab, dtype, layers, seed) -> Decoder with sharp attention and logits of size 1 to 3."""

    def make(architecture="Qwen3ForCausalLM", vocab=23, dtype=torch.float64, layers=2, seed=0):
        shape = {"num_kv_heads": 2, **SHAPES[architecture]}
        torch.manual_seed(seed)
        model = Decoder(
            ModelConfig(architecture, vocab, 16, 24, layers, 4, head_dim=6, **shape)
        ).to(dtype)
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 2 else 0.1
            parameter.data = spread * torch.randn_like(parameter) + float("norm" in name)
        return model

    return make

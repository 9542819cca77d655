"""Committed loss and gradient norm of one fixed step per credit rule: a change of either is a change of the algorithm.

`python tests/test_golden.py` rewrites tests/golden.json (look at the difference before committing it).
"""

import json
from pathlib import Path

import pytest
import torch

from mar.attention import pack_groups
from mar.losses import reinforce, token_weights
from mar.model import Decoder, ModelConfig
from mar_kernels import answer_advantages

FILE = Path(__file__).with_name("golden.json")
CREDITS = ("to_go", "set", "own")


def _values(*shape: int) -> torch.Tensor:
    """Fixed numbers without a random generator: the fractional parts of a quadratic sequence, in [-0.5, 0.5)."""
    n = torch.arange(1, int(torch.tensor(shape).prod()) + 1, dtype=torch.float64)
    return ((n * 0.6180339887498949 + n * n * 0.1234567) % 1.0 - 0.5).reshape(shape)


def step(credit: str) -> dict[str, float]:
    """Loss and gradient norm of 2 groups x 3 completions on a tiny float64 model."""
    shape = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 29,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
    }
    shape |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    model = Decoder(ModelConfig.from_hf(shape)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(_values(*parameter.shape) + (1.0 if parameter.ndim == 1 else 0.0))
    lengths = [[3, 7, 5], [6, 1, 4]]
    completions = [
        [[(5 * i + 3 * j + t) % 29 for t in range(n)] for j, n in enumerate(group)] for i, group in enumerate(lengths)
    ]
    flat = torch.tensor([n for group in lengths for n in group])
    mask = torch.arange(int(flat.max())) < flat[:, None]
    segments = (torch.arange(int(flat.max())) // 2).clamp(max=3).expand(6, -1)
    advantages = answer_advantages(
        _values(6, 4),
        torch.ones(4, dtype=torch.float64),
        torch.tensor([[0, 1, 2, 3]]).expand(6, -1),
        segments,
        torch.tensor([0, 0, 0, 1, 1, 1]),
        credit,
    )
    logprobs, _, _ = model(pack_groups([[1, 2, 3, 4], [7, 8]], completions), 0.7)
    loss = reinforce(logprobs, advantages[mask], token_weights(mask, "token_mean", 8)[mask])
    loss.backward()
    return {
        "loss": loss.item(),
        "grad_norm": torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item(),
    }


@pytest.mark.golden
@pytest.mark.parametrize("credit", CREDITS)
def test_golden_step(credit: str) -> None:
    assert step(credit) == pytest.approx(json.loads(FILE.read_text())[credit], rel=1e-9)


if __name__ == "__main__":
    FILE.write_text(json.dumps({credit: step(credit) for credit in CREDITS}, indent=2) + "\n")

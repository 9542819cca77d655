"""Random draws by identity, and the distribution that tokens are drawn from.

Every draw is a hash of what it is for (run seed, stage, step, prompt id, sample index, position), never of where or when it happens: a completion can
be re-made alone, in any batch, on any number of ranks.
"""

import hashlib

import torch
from torch import Tensor

_GOLDEN, _MIX1, _MIX2 = (
    -0x61C8864680B583EB,
    -0x40A7B892E31B1A47,
    -0x6B2FB644ECCEEE15,
)  # splitmix64's constants as signed integers


def stream_key(*identity: int | str) -> int:
    """A signed 64-bit key for one stream of draws; different identities give independent streams."""
    text = ascii(identity)  # quotes and escapes: no two identities share one
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical, on signed integers


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) per (key, position): splitmix64 of both. keys [B] int64, positions [B] int64 -> [B] float64."""
    z = keys + (positions + 1) * _GOLDEN
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return _shift(z ^ _shift(z, 31), 11).double() * 2.0**-53


def draw_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row from softmax(logits / temperature) by inverting the cumulative distribution at `uniform`; temperature 0 takes the largest.

    logits [B, V], uniform [B] float64 -> tokens [B] int64, logprobs [B] (0 when temperature is 0).
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(logits[:, 0])
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    cumulative = logprobs.double().exp().cumsum(-1)  # [B, V]; not exp_: a float64 tensor is its own double()
    tokens = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(1)
    tokens = tokens.clamp_(max=logits.shape[1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)

"""Random draws by identity, and the distribution that tokens are drawn from.

Every draw is a hash of what it is for (run seed, stage, step, prompt id, sample index, position), never of where or when it happens: a completion can
be re-made alone, in any batch, on any number of ranks.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_GOLDEN, _MIX1, _MIX2 = (
    -0x61C8864680B583EB,
    -0x40A7B892E31B1A47,
    -0x6B2FB644ECCEEE15,
)  # splitmix64's constants as signed integers

BLOCK = 256  # tokens whose probabilities are summed first


def stream_key(*identity: int | str) -> int:
    """A signed 64-bit key for one stream of draws; different identities give independent streams."""
    text = ascii(identity)  # quotes and escapes: no two identities share one
    return int.from_bytes(
        hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True
    )


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical, on signed integers


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) per (key, position): splitmix64 of both. keys [B] int64, positions [B] int64 -> [B] float64."""
    z = keys + (positions + 1) * _GOLDEN
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return _shift(z ^ _shift(z, 31), 11).double() * 2.0**-53


@dataclass(frozen=True)
class Truncation:
    """Which tokens may be drawn: the `top_k` most probable (0: all), of these the fewest that hold `top_p` of the mass, of these those at
    least `min_p` times as probable as the first. The rest is drawn from in proportion."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1, not {self}")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. temperature 0 is greedy; a row ends after a token of `stop_ids` (kept), after the token that completes one of
    `stop_strings`, or after `max_tokens`. A row that has not written `</think>` within `think_budget` tokens gets the tokens `think_close`."""

    max_tokens: int
    temperature: float = 1.0
    stop_ids: tuple[int, ...] = ()
    truncation: Truncation = Truncation()
    stop_strings: tuple[str, ...] = ()
    think_budget: int | None = None
    think_close: tuple[int, ...] = ()
    decode: Callable[[tuple[int, ...]], str] | None = (
        None  # needed by stop_strings and think_budget
    )
    on_done: Callable[[int, Any], None] | None = (
        None  # called with the number of a completion, and the completion, as soon as it is there
    )

    def __post_init__(self) -> None:
        if (self.stop_strings or self.think_budget is not None) and self.decode is None:
            raise ValueError("stop_strings and think_budget read text: they need decode")
        if "" in self.stop_strings or (self.think_budget is not None and not self.think_close):
            raise ValueError(
                "a stop string is empty, or think_budget has no think_close tokens to put in"
            )
        if (
            self.think_budget is not None
            and not 0 <= self.think_budget <= self.max_tokens - len(self.think_close) - 1
        ):
            raise ValueError(
                f"think_budget={self.think_budget} leaves no room below max_tokens={self.max_tokens}"
            )


def truncated_logprobs(logprobs: Tensor, truncation: Truncation) -> Tensor:
    """The log-probabilities [B, V] of the truncated distribution, -inf where nothing is drawn. Equal tokens are ranked by their id."""
    if truncation == Truncation():
        return logprobs
    ranked, order = logprobs.sort(dim=-1, descending=True, stable=True)
    if 0 < truncation.top_k < logprobs.shape[-1]:
        ranked[:, truncation.top_k :] = -torch.inf
    mass = torch.softmax(ranked.double(), -1)
    before = mass.cumsum(-1) - mass  # what the more probable ones hold
    keep = (
        (before < truncation.top_p)
        & (mass >= truncation.min_p * mass[:, :1])
        & (ranked > -torch.inf)
    )
    keep[:, 0] = True
    kept = torch.full_like(logprobs, -torch.inf).scatter_(
        -1, order, ranked.masked_fill(~keep, -torch.inf)
    )
    return torch.log_softmax(kept, -1)


def _find(masses: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where [B, 1] the cumulative sum of masses [B, N] passes `uniform` of the whole, and that sum."""
    ends = masses.double().cumsum(-1)
    index = torch.searchsorted(ends, (uniform * ends[:, -1])[:, None], right=True)
    return index.clamp_(max=masses.shape[1] - 1), ends  # beyond the end: nan


def invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the cumulative distribution passes `uniform` of its whole. In a large vocabulary first the block of tokens, then the
    token in it: a tenth of the time of one long sum in float64. probabilities [B, V], uniform [B] float64 -> [B] int64."""
    rows, size = probabilities.shape
    if size <= 16 * BLOCK:
        return _find(probabilities, uniform)[0].squeeze(1)
    blocks = F.pad(probabilities, (0, -size % BLOCK)).view(rows, -1, BLOCK)
    masses = blocks.sum(-1).double()
    block, ends = _find(masses, uniform)
    end, mass = ends.gather(1, block)[:, 0], masses.gather(1, block)[:, 0]
    inside = ((uniform * ends[:, -1] - (end - mass)) / mass).clamp_(0, 1 - 2**-53)
    token, _ = _find(blocks[torch.arange(rows, device=block.device), block[:, 0]], inside)
    return (block * BLOCK + token).squeeze(1).clamp_(max=size - 1)


def draw_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, truncation: Truncation = Truncation()
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row from softmax(logits / temperature), truncated, by inverting the cumulative distribution at `uniform`; temperature 0
    takes the largest logit.

    logits [B, V], uniform [B] float64 -> tokens [B] int64, their log-probabilities in the distribution drawn from [B] (0 when temperature
    is 0) and in that of temperature alone [B] (1 when temperature is 0).
    """
    logprobs = torch.log_softmax(
        logits / temperature if temperature not in (0, 1) else logits, dim=-1
    )
    if temperature == 0:
        tokens = logits.argmax(-1)
        return (
            tokens,
            torch.zeros_like(logits[:, 0]),
            logprobs.gather(1, tokens[:, None]).squeeze(1),
        )
    kept = truncated_logprobs(logprobs, truncation)
    tokens = invert(kept.exp(), uniform)
    drawn, full = (x.gather(1, tokens[:, None]).squeeze(1) for x in (kept, logprobs))
    return tokens, drawn, full

"""Random draws by identity, and the distribution that tokens are drawn from.

Every draw is a hash of what it is for (run seed, stage, step, prompt id, sample index, position),
never of where or when it happens: a completion can be made again alone, in any batch, on any number
of ranks.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

# splitmix64's constants as signed integers
_GOLDEN = -0x61C8864680B583EB
_MIX1 = -0x40A7B892E31B1A47
_MIX2 = -0x6B2FB644ECCEEE15

# the largest number below 1 in float64
_BELOW_ONE = 1 - 2**-53

# tokens whose probabilities are summed first (`invert`)
BLOCK = 256


def stream_key(*identity: int | str) -> int:
    """A signed 64-bit key for one stream of draws; other identities give independent streams."""
    # quotes and escapes: no two identities share one text
    text = ascii(identity)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift(z: Tensor, bits: int) -> Tensor:
    """A logical right shift of signed integers."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(keys: Int64[Tensor, " B"], positions: Int64[Tensor, " B"]) -> Float64[Tensor, " B"]:
    """One number in [0, 1) for each key and position: output `position` of splitmix64 (Steele et
    al. 2014, doi 10.1145/2660193.2660195) seeded with the key."""
    z = keys + (positions + 1) * _GOLDEN
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() * 2.0**-53


@dataclass(frozen=True)
class Truncation:
    """Which tokens may be drawn; the rest of the distribution is scaled up to one.

    The `top_k` most probable (0: all); of these the fewest that hold `top_p` of the mass; of these
    those at least `min_p` times as probable as the first.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1, not {self}")


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn, and where they end.

    Temperature 0 is greedy. A completion ends after a token of `stop_ids` (kept), after the token
    that completes one of `stop_strings`, or after `max_tokens`. One that has not written
    `</think>` within `think_budget` tokens gets the tokens `think_close` next.
    """

    max_tokens: int
    temperature: float = 1.0
    stop_ids: tuple[int, ...] = ()
    truncation: Truncation = Truncation()
    stop_strings: tuple[str, ...] = ()
    think_budget: int | None = None
    think_close: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if "" in self.stop_strings:
            raise ValueError("a stop string is empty")
        if self.think_budget is None:
            return
        if not self.think_close:
            raise ValueError("think_budget has no think_close tokens to put in")
        # at least one token follows the closing tag
        room = self.max_tokens - len(self.think_close) - 1
        if not 0 <= self.think_budget <= room:
            raise ValueError(
                f"think_budget={self.think_budget} leaves no room "
                f"below max_tokens={self.max_tokens}"
            )

    @property
    def reads_text(self) -> bool:
        """Whether the sampler has to decode what it writes."""
        return bool(self.stop_strings) or self.think_budget is not None


def truncated_logprobs(
    logprobs: Float[Tensor, "B V"], truncation: Truncation
) -> Float[Tensor, "B V"]:
    """Log-probabilities of the truncated distribution, -inf for tokens that it leaves out.

    Tokens that are equally probable are ranked by their id.
    """
    if truncation == Truncation():
        return logprobs
    ranked, order = logprobs.sort(dim=-1, descending=True, stable=True)
    if 0 < truncation.top_k < logprobs.shape[-1]:
        ranked[:, truncation.top_k :] = -torch.inf
    mass = torch.softmax(ranked.double(), -1)
    mass_before = mass.cumsum(-1) - mass
    in_top_k = ranked > -torch.inf
    in_top_p = mass_before < truncation.top_p
    above_min_p = mass >= truncation.min_p * mass[:, :1]
    keep = in_top_p & above_min_p & in_top_k
    keep[:, 0] = True
    ranked = ranked.masked_fill(~keep, -torch.inf)
    kept = torch.full_like(logprobs, -torch.inf).scatter_(-1, order, ranked)
    return torch.log_softmax(kept, -1)


def _find(
    masses: Float[Tensor, "B N"], uniform: Float64[Tensor, " B"]
) -> tuple[Int64[Tensor, "B 1"], Float64[Tensor, "B N"]]:
    """The first index at which the cumulative sum passes `uniform` of the whole, and that sum."""
    cumulative = masses.double().cumsum(-1)
    target = uniform * cumulative[:, -1]
    index = torch.searchsorted(cumulative, target[:, None], right=True)
    # nan lies beyond the end
    return index.clamp_(max=masses.shape[1] - 1), cumulative


def invert(
    probabilities: Float[Tensor, "B V"], uniform: Float64[Tensor, " B"]
) -> Int64[Tensor, " B"]:
    """The first token at which the cumulative distribution passes `uniform` of its whole.

    In a large vocabulary first the block of tokens is found, then the token in it: a tenth of the
    time of one long sum in float64.
    """
    num_rows, vocab_size = probabilities.shape
    if vocab_size <= 16 * BLOCK:
        token, _ = _find(probabilities, uniform)
        return token.squeeze(1)
    blocks = F.pad(probabilities, (0, -vocab_size % BLOCK)).view(num_rows, -1, BLOCK)
    block_masses = blocks.sum(-1).double()
    block, cumulative = _find(block_masses, uniform)
    mass = block_masses.gather(1, block)[:, 0]
    mass_before = cumulative.gather(1, block)[:, 0] - mass
    # the same point, as a share of its block
    uniform_inside = (uniform * cumulative[:, -1] - mass_before) / mass
    uniform_inside = uniform_inside.clamp_(0, _BELOW_ONE)
    rows = torch.arange(num_rows, device=block.device)
    token, _ = _find(blocks[rows, block[:, 0]], uniform_inside)
    return (block * BLOCK + token).squeeze(1).clamp_(max=vocab_size - 1)


class DrawnTokens(NamedTuple):
    """One token per row, and its two log-probabilities (0 and that at temperature 1 when greedy).

    `sampler_logprobs` belong to the distribution drawn from, `full_logprobs` to temperature alone.
    """

    tokens: Int64[Tensor, " B"]
    sampler_logprobs: Float[Tensor, " B"]
    full_logprobs: Float[Tensor, " B"]


def draw_tokens(
    logits: Float[Tensor, "B V"],
    uniform: Float64[Tensor, " B"],
    temperature: float,
    truncation: Truncation = Truncation(),
) -> DrawnTokens:
    """Draw from softmax(logits / temperature), truncated.

    The cumulative distribution is inverted at `uniform`; temperature 0 takes the largest logit.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
        certain = torch.zeros_like(logits[:, 0])
        return DrawnTokens(tokens, certain, _logprobs_of(tokens, logprobs))
    kept = truncated_logprobs(logprobs, truncation)
    tokens = invert(kept.exp(), uniform)
    return DrawnTokens(tokens, _logprobs_of(tokens, kept), _logprobs_of(tokens, logprobs))


def _logprobs_of(
    tokens: Int64[Tensor, " B"], logprobs: Float[Tensor, "B V"]
) -> Float[Tensor, " B"]:
    return logprobs.gather(1, tokens[:, None]).squeeze(1)

"""Our sampler: admit groups under a KV budget, prefill each prompt once, decode all rows together, retire rows as they stop."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mar.cache import KVCache
from mar.draw import draw_tokens, uniforms
from mar.model import Decoder
from mar.records import UserError

RETIRE_EVERY = 8  # steps between two looks for finished rows: each look waits for the device


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. temperature 0 is greedy; a row ends after a token of `stop_ids` (kept) or after `max_tokens`."""

    max_tokens: int
    temperature: float = 1.0
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt and the random stream (draw.stream_key) of each of its completions."""

    prompt_ids: tuple[int, ...]
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Sampled:
    """One completion: `sampler_logprobs` of the distribution drawn from, `full_logprobs` of temperature alone (1 when greedy)."""

    ids: np.ndarray
    sampler_logprobs: np.ndarray
    full_logprobs: np.ndarray
    finish_reason: str


def waves(requests: Sequence[Request], max_tokens: int, kv_budget_tokens: int) -> Iterator[list[int]]:
    """Indices of requests that fit the budget together, in order. A group needs its prompt once and `max_tokens` per row; the prompts of a
    wave are padded to the longest."""
    wave: list[int] = []
    longest, own = 0, 0
    for index, request in enumerate(requests):
        length, rows = len(request.prompt_ids), len(request.keys) * max_tokens
        need = length + rows
        if need > kv_budget_tokens:
            raise UserError(
                f"one group needs {need} tokens of KV memory (prompt {length} + {len(request.keys)} x {max_tokens}): "
                f"raise scale.kv_budget_tokens from {kv_budget_tokens}, or lower algo.group_size or model.max_completion_tokens"
            )
        if (len(wave) + 1) * max(longest, length) + own + rows > kv_budget_tokens:
            yield wave
            wave, longest, own = [], 0, 0
        wave.append(index)
        longest, own = max(longest, length), own + rows
    if wave:
        yield wave


@torch.inference_mode()
def generate(
    model: Decoder, requests: Sequence[Request], params: SamplingParams, kv_budget_tokens: int
) -> list[list[Sampled]]:
    """Completions of every request, in its order: one list per request, one entry per key."""
    results: list[list[Sampled]] = [[] for _ in requests]
    for wave in waves(requests, params.max_tokens, kv_budget_tokens):
        for index, group in zip(wave, _generate_wave(model, [requests[i] for i in wave], params), strict=True):
            results[index] = group
    return results


def _prefill(model: Decoder, cache: KVCache, requests: Sequence[Request]) -> Tensor:
    """Run the packed prompts once, fill the prompt cache, and return the hidden state after each prompt [groups, d]."""
    device = cache.prompt_keys.device
    lengths = [len(r.prompt_ids) for r in requests]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = torch.tensor([i for r in requests for i in r.prompt_ids], device=device)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    hidden = model.hidden(
        ids, positions, cache.prefill_attend([(int(s), n) for s, n in zip(starts, lengths, strict=True)])
    )
    return hidden[torch.tensor(starts + np.array(lengths) - 1, device=device)]


def _generate_wave(model: Decoder, requests: Sequence[Request], params: SamplingParams) -> list[list[Sampled]]:
    weight = model.head_weight
    device, rows_per_group = weight.device, [len(r.keys) for r in requests]
    precise = torch.promote_types(weight.dtype, torch.float32)
    cache = KVCache.allocate(
        model.config, [len(r.prompt_ids) for r in requests], rows_per_group, params.max_tokens, weight
    )
    hidden = _prefill(model, cache, requests)[cache.row_group]  # each row draws its own first token
    keys = torch.tensor([key for r in requests for key in r.keys], device=device)
    stops = torch.tensor(params.stop_ids, dtype=torch.int64, device=device)
    positions = cache.prompt_lengths[cache.row_group]

    rows = torch.arange(len(keys), device=device)  # which completion each live row is
    tokens = torch.zeros(len(keys), params.max_tokens, dtype=torch.int64, device=device)
    drawn_logprobs, full_logprobs = (
        torch.zeros(len(keys), params.max_tokens, dtype=precise, device=device) for _ in range(2)
    )
    lengths = torch.full((len(keys),), params.max_tokens, device=device)
    stopped = torch.zeros(len(keys), dtype=torch.bool, device=device)
    for step in range(params.max_tokens):
        logits = (hidden @ weight.T).to(precise)
        token, logprob = draw_tokens(logits, uniforms(keys[rows], torch.full_like(rows, step)), params.temperature)
        tokens[rows, step], drawn_logprobs[rows, step] = token, logprob
        full_logprobs[rows, step] = (
            logprob if params.temperature else logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        )
        ends = torch.isin(token, stops) & ~stopped[rows]
        lengths[rows] = torch.where(ends, step + 1, lengths[rows])
        stopped[rows] |= ends
        if step + 1 == params.max_tokens:
            break
        if (step + 1) % RETIRE_EVERY == 0:
            live = (~stopped[rows]).nonzero()[:, 0]
            if len(live) == 0:
                break
            if len(live) < len(rows):
                cache.keep_rows(live)
                rows, token = rows[live], token[live]
        hidden = model.hidden(token, positions[rows] + step, cache.decode_attend(step))
    ids, drawn, full = (x.cpu().numpy() for x in (tokens, drawn_logprobs, full_logprobs))
    reasons = ["stop" if s else "length" for s in stopped.tolist()]
    flat = [
        Sampled(ids[i, :n].copy(), drawn[i, :n].copy(), full[i, :n].copy(), reason)
        for i, (n, reason) in enumerate(zip(lengths.tolist(), reasons, strict=True))
    ]
    splits = np.cumsum([0, *rows_per_group])
    return [flat[a:b] for a, b in zip(splits[:-1], splits[1:], strict=True)]

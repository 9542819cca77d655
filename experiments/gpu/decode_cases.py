"""Decode steps of random numbers, for the kernels that attend in them."""

import torch
from torch import Tensor

from mar_kernels import LayerCache


def a_step(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    device: torch.device | str = "cpu",
    lengths: tuple[int, ...] = (19, 1, 33),
    groups: tuple[int, ...] = (3, 1, 5),
    free: int = 1,
    prompt_tokens: int = 37,
    own_tokens: int = 21,
) -> tuple[Tensor, Tensor, Tensor, LayerCache]:
    """q, k, v and a cache, of (query heads, key heads, channels).

    Groups have several sizes and their rows are mixed. There are a prompt slot that nobody reads,
    free rows, a row without a token of its own and one whose slot is nearly full. What no row may
    see is NaN.
    """
    num_heads, num_kv_heads, width = heads
    generator = torch.Generator().manual_seed(sum(lengths))
    num_rows = sum(groups) + free
    lengths = (*lengths, prompt_tokens // 2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    order = torch.randperm(num_rows, generator=generator).tolist()
    members = torch.zeros(len(lengths), max(groups), dtype=torch.int64)
    row_prompt = torch.zeros(num_rows, dtype=torch.int64)
    member_index = torch.zeros(num_rows, dtype=torch.int64)
    for prompt, size in enumerate(groups):
        for member in range(size):
            row = order.pop()
            members[prompt, member] = row
            row_prompt[row] = prompt
            member_index[row] = member
    own_lengths = torch.randint(own_tokens, (num_rows,), generator=generator)
    own_lengths[:2] = torch.tensor([0, own_tokens - 1])

    def slots(ends: Tensor, num_tokens: int) -> Tensor:
        entries = normal(len(ends), num_kv_heads, num_tokens, width)
        gone = torch.arange(num_tokens) >= ends[:, None]
        return entries.masked_fill_(gone[:, None, :, None].to(device), torch.nan)

    prompt_lengths = torch.tensor(lengths)
    cache = LayerCache(
        prompt_keys=slots(prompt_lengths, prompt_tokens),
        prompt_values=slots(prompt_lengths, prompt_tokens),
        own_keys=slots(own_lengths, own_tokens),
        own_values=slots(own_lengths, own_tokens),
        prompt_lengths=prompt_lengths.to(device),
        own_lengths=own_lengths.to(device),
        row_prompt=row_prompt.to(device),
        members=members.to(device),
        member_index=member_index.to(device),
    )
    # as the model has them: parts of one tensor
    qkv = normal(num_rows, num_heads + 2 * num_kv_heads, width)
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), 1)
    return q, k, v, cache


def in_float64(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerCache
) -> tuple[Tensor, Tensor, Tensor, LayerCache]:
    """The same step for exact results, in a cache of its own."""
    wider = [x.double() if x.is_floating_point() else x.clone() for x in cache]
    return q.double(), k.double(), v.double(), LayerCache(*wider)


def some_heads(
    dtype: torch.dtype,
    width: int,
    device: torch.device | str = "cpu",
    num_tokens: int = 3,
    num_queries: int = 5,
    num_keys: int = 2,
) -> tuple[Tensor, Tensor, Tensor, int, Tensor, Tensor, float]:
    """What `rotated_heads` takes: heads as they stand in qkv, cos and sin as the model makes them,
    other gains for q than for k.
    """
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    num_heads = num_queries + num_keys
    heads = normal(num_tokens, num_heads + num_keys, width)[:, :num_heads]
    angles = 10 * torch.randn(num_tokens, 1, width // 2, generator=generator)
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(device, dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(device, dtype)
    return heads, cos, sin, num_queries, 1 + normal(width), 2 + normal(width), 1e-5


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()

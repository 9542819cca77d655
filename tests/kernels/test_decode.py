"""The kernels of a decode step against the reference in float64, which plain attention checks."""

from importlib.util import find_spec
from itertools import chain
from unittest.mock import patch

import numpy as np
import pytest
import torch

from experiments.gpu.decode_cases import a_step, in_float64, relative_error, some_heads
from mar.policy.model import Decoder, ModelConfig, rotate
from mar.sample import engine
from mar.sample.draws import SamplingParams, stream_key
from mar.sample.engine import Request, generate
from mar_kernels import LayerCache, decode_attention, rotated_heads
from tests.helpers.interpreted import on_triton

if find_spec("triton") is None:
    pytest.skip(
        "the package triton is not installed (pyproject asks for it on Linux)",
        allow_module_level=True,
    )

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64

# (query heads, key heads, channels)
HEADS = [(4, 2, 32), (2, 2, 16), (7, 1, 24)]


def copy_of(cache):
    return LayerCache(*(x.clone() for x in cache))


def small_tiles(dtype, channels):
    """So that a few tokens are many tiles and several spans."""
    from mar_kernels import triton_decode

    return patch.multiple(
        triton_decode,
        SPAN=16,
        TILE_BYTES=16 * max(channels, 16) * dtype.itemsize,
        ROWS={dtype: 16},
    )


@pytest.mark.parametrize("free", [0, 2])
def test_the_reference_is_plain_attention_over_a_row_that_repeats_its_prompt(free):
    q, k, v, cache = a_step(F64, (6, 2, 8), free=free)
    got = decode_attention(q, k, v, cache)
    for row, own in enumerate(cache.own_lengths):
        prompt = cache.row_prompt[row]
        length = cache.prompt_lengths[prompt]
        if cache.members[prompt, cache.member_index[row]] != row:
            length = 0
        parts = []
        for prompts, owns, new in (
            (cache.prompt_keys, cache.own_keys, k),
            (cache.prompt_values, cache.own_values, v),
        ):
            assert torch.equal(owns[row, :, own], new[row])
            parts.append(torch.cat((prompts[prompt, :, :length], owns[row, :, : own + 1]), 1))
        want = torch.nn.functional.scaled_dot_product_attention(
            q[row, :, None], *parts, enable_gqa=True
        )
        torch.testing.assert_close(got[row], want[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("heads", HEADS)
@on_triton
def test_decode_attention(device, heads, dtype):
    """Within a small multiple of what rounding alone costs, and the new keys and values, to the
    last bit, where they belong and nowhere else.
    """
    q, k, v, cache = a_step(dtype, heads, device)
    exact = decode_attention(*in_float64(q, k, v, cache))
    plain_cache = copy_of(cache)
    plain = decode_attention(q, k, v, plain_cache, backend="reference")
    with small_tiles(dtype, heads[2]):
        got = decode_attention(q, k, v, cache, backend="triton")
    assert got.dtype == dtype and got.shape == q.shape
    assert got.isfinite().all()
    assert relative_error(got, exact) <= max(relative_error(plain, exact), 3e-7)
    for ours, theirs in zip(cache, plain_cache, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@on_triton
def test_the_tiles_of_a_gpu(device):
    """One tile and one span hold everything; the heads of a row do not lie together."""
    q, k, v, cache = a_step(F32, (4, 2, 32), device)
    exact = decode_attention(*in_float64(q, k, v, cache))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert relative_error(decode_attention(q, k, v, cache, backend="triton"), exact) <= 3e-7


@on_triton
def test_a_row_gets_the_same_bits_whoever_runs_beside_it(device):
    """Rows and prompts leave, prompt slots become fewer, groups smaller."""
    q, k, v, cache = a_step(F32, (4, 2, 16), device, groups=(3, 1, 2), free=0)
    kept_prompts = torch.tensor([0, 2], device=device)
    rows = torch.stack([cache.members[0, 1], cache.members[2, 1], cache.members[2, 0]])
    alone = LayerCache(
        prompt_keys=cache.prompt_keys[kept_prompts],
        prompt_values=cache.prompt_values[kept_prompts],
        own_keys=cache.own_keys[rows],
        own_values=cache.own_values[rows],
        prompt_lengths=cache.prompt_lengths[kept_prompts],
        own_lengths=cache.own_lengths[rows],
        row_prompt=torch.tensor([0, 1, 1], device=device),
        members=torch.tensor([[0, 0], [2, 1]], device=device),
        member_index=torch.tensor([0, 1, 0], device=device),
    )
    with small_tiles(F32, 16):
        together = decode_attention(q, k, v, cache, backend="triton")
        found = decode_attention(q[rows], k[rows], v[rows], alone, backend="triton")
    assert torch.equal(found, together[rows])


@pytest.mark.parametrize("where", ["query", "key", "own", "prompt"])
@on_triton
def test_nan_stays_with_those_who_see_it(device, where):
    q, k, v, cache = a_step(F32, (4, 2, 16), device, groups=(3, 1, 2))
    # a row with tokens of its own in a group of three
    row = next(int(r) for r in cache.members[0] if cache.own_lengths[r] > 0)
    slot = {
        "query": q[row],
        "key": k[row],
        "own": cache.own_values[row, :, 0],
        "prompt": cache.prompt_values[0, :, 18],
    }[where]
    slot.fill_(torch.nan)
    seen_by = cache.members[0].tolist() if where == "prompt" else [row]
    with small_tiles(F32, 16):
        got = decode_attention(q, k, v, cache, backend="triton")
    broken = got.isnan().flatten(1)
    assert broken[seen_by].all()
    others = torch.ones(len(q), dtype=torch.bool, device=device)
    others[seen_by] = False
    assert not broken[others].any()


@on_triton
def test_scores_of_ten_thousand(device):
    q, k, v, cache = a_step(F32, (4, 2, 16), device, groups=(3, 1, 2))
    q = 1e4 * q
    exact = decode_attention(*in_float64(q, k, v, cache))
    with small_tiles(F32, 16):
        got = decode_attention(q, k, v, cache, backend="triton")
    # a score's own rounding is 1e4 x 6e-8
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=0.02)


# --- norm and rotation of queries and keys ----------------------------------------------------


def test_the_reference_is_the_models_rotation():
    heads, cos, sin, *_ = some_heads(F64, 6)
    assert torch.equal(rotated_heads(heads, cos, sin, 5), rotate(heads, cos, sin))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [24, 64])
@pytest.mark.parametrize("normed", [False, True])
@on_triton
def test_rotated_heads(device, dtype, width, normed):
    from mar_kernels import triton_decode

    case = some_heads(dtype, width, device)
    if not normed:
        case = case[:4]
    exact = rotated_heads(*(x.double() if isinstance(x, torch.Tensor) else x for x in case))
    plain = rotated_heads(*case, backend="reference")
    # two programs a token, the second with one head of four
    with patch.object(triton_decode, "HEAD_ELEMENTS", 4 * (32 if width == 24 else width)):
        got = rotated_heads(*case, backend="triton")
    assert got.dtype == dtype and got.shape == plain.shape
    assert relative_error(got, exact) <= max(relative_error(plain, exact), 3e-7)
    if device != "cpu" and dtype == BF16:
        # the operators' roundings, one by one; sums of squares may differ in their last bit
        assert (got != plain).float().mean() < 0.01


# --- the sampler ------------------------------------------------------------------------------

SHAPES = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"qk_norm": True, "tied_embeddings": True},
    "SmolLM3ForCausalLM": {"without_rope": (1,)},
    "Olmo2ForCausalLM": {"qk_norm": True},
}


def a_model(architecture, device):
    torch.manual_seed(0)
    model = Decoder(ModelConfig(architecture, 23, 16, 24, 2, 4, 2, 16, **SHAPES[architecture]))
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.ndim == 2 else 0.1
        parameter.data = spread * torch.randn_like(parameter) + float("norm" in name)
    return model.to(device)


@pytest.mark.parametrize(
    "architecture",
    [
        "Qwen3ForCausalLM",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SHAPES if "Qwen3" not in name),
    ],
)
@on_triton
def test_the_sampler_draws_the_same_with_kernels(device, architecture):
    """Slots are taken again, groups have several sizes, rows leave one after another."""
    from mar_kernels import triton_decode

    model = a_model(architecture, device)
    requests = []
    for index, (length, limits) in enumerate(((5, (1, 4, 2)), (1, (3,)), (9, (2, 4)))):
        keys = tuple(stream_key("decode", index, row) for row in range(len(limits)))
        requests.append(Request(tuple(range(length)), keys, limits))
    found = []
    with patch.object(triton_decode, "SPAN", 4):
        for backend in ("triton", "reference"):
            with patch.object(engine, "BACKEND", backend):
                groups = generate(model, requests, SamplingParams(4), kv_budget_tokens=40).groups
            found.append(list(chain.from_iterable(groups)))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_allclose(ours.full_logprobs, theirs.full_logprobs, atol=1e-5)
    assert not any(block.heads_in_kernel for block in model.blocks)

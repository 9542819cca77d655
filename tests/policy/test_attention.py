"""Attention over shared prompts equals plain attention over rows that repeat their prompt."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mar.policy.attention import _block_mask, _flex_attend, group_attention
from mar.policy.model import Decoder, ModelConfig
from mar.policy.packing import chunks, pack_groups

CONFIG = ModelConfig("Qwen3ForCausalLM", 37, 24, 40, 2, 6, 2, 6, qk_norm=True)
PROMPTS, LENGTHS = (7, 1, 19, 4), ((5, 1, 9), (3, 3), (1, 1), (12, 2, 2, 1, 30))


def random_groups(prompts=PROMPTS, lengths=LENGTHS, vocab=37):
    draw = random.Random(0)

    def tokens(count):
        return [draw.randrange(vocab) for _ in range(count)]

    drawn_prompts = [tokens(count) for count in prompts]
    completions = []
    for group in lengths:
        completions.append([tokens(count) for count in group])
    return drawn_prompts, completions


def naive_attend(lengths):
    """Softmax over all scores of a row; the rows, each with its own prompt, one after the other."""

    def attend(layer, q, k, v):
        heads_per_key = q.shape[1] // k.shape[1]
        out = []
        start = 0
        for n in lengths:
            row = slice(start, start + n)
            keys = k[row].repeat_interleave(heads_per_key, 1)
            values = v[row].repeat_interleave(heads_per_key, 1)
            scores = torch.einsum("nhd,mhd->hnm", q[row], keys) / q.shape[-1] ** 0.5
            later = torch.ones(n, n, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
            out.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values))
            start += n
        return torch.cat(out)

    return attend


def plain_logprobs(model, prompts, completions):
    """Log-probability and entropy of each completion token, from rows that repeat their prompt."""
    rows = []
    for prompt, group in zip(prompts, completions, strict=True):
        rows += [(prompt, completion) for completion in group]
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    ids = torch.tensor([token for prompt, completion in rows for token in prompt + completion])
    positions = torch.cat([torch.arange(n) for n in lengths])
    hidden = model.hidden(ids, positions, naive_attend(lengths))
    logprobs = (hidden @ model.head_weight.T / 0.7).log_softmax(-1)

    predict_from = []
    start = 0
    for (prompt, completion), length in zip(rows, lengths, strict=True):
        last_of_prompt = start + len(prompt) - 1
        predict_from += range(last_of_prompt, last_of_prompt + len(completion))
        start += length
    predict_from = torch.tensor(predict_from)
    chosen = logprobs[predict_from].gather(1, ids[predict_from + 1, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)[predict_from]
    return chosen, entropy


def gradients(model, outputs):
    logprobs, entropy = outputs[:2]
    weights = torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)
    loss = (logprobs * weights).sum() + (entropy * weights.square()).sum()
    return torch.autograd.grad(loss, tuple(model.parameters()))


def test_groups_equal_plain_rows():
    torch.manual_seed(0)
    model = Decoder(CONFIG).double()
    for parameter in model.parameters():
        parameter.data.mul_(5.0)  # sharper attention than at initialisation
    prompts, completions = random_groups()
    grouped = model(pack_groups(prompts, completions), 0.7)
    plain = plain_logprobs(model, prompts, completions)
    found = (*grouped[:2], *gradients(model, grouped))
    expected = (*plain, *gradients(model, plain))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2)], ids=["channels first", "heads first"])
def test_inputs_of_any_memory_order(order):
    """PyTorch's CPU operators take contiguous channels for granted, forward and backward."""
    torch.manual_seed(0)
    packed = pack_groups(*random_groups())
    attend = group_attention(packed)
    plain = [torch.randn(len(packed.ids), heads, 6, dtype=torch.float64) for heads in (6, 2, 2)]
    # both orders are their own inverse: same values, another layout in memory
    strided = [x.permute(order).contiguous().permute(order) for x in plain]
    found = []
    for inputs in (plain, strided):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attend(0, *leaves)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        found.append([out, *torch.autograd.grad((out * upstream).sum(), leaves)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_bfloat16_is_rounded_once_and_at_the_end():
    """No part is rounded before it is merged, forward or backward.

    The output is kept as it is returned, rounded: what backward computes from it errs a little more
    than one rounding does. Rounded parts would err twice as much (2.0 for the queries).
    """
    torch.manual_seed(0)
    packed = pack_groups(*random_groups())
    attend = group_attention(packed)
    inputs = [torch.randn(len(packed.ids), heads, 6).bfloat16() for heads in (6, 2, 2)]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = attend(0, *leaves)
        upstream = torch.linspace(-1, 1, out.numel()).bfloat16().view(out.shape)
        gradients = torch.autograd.grad(out, leaves, upstream.to(dtype))
        found.append([out.detach(), *gradients])
    largest_ratios = (1.01, 1.5, 1.5, 1.01)
    for got, exact, largest_ratio in zip(*found, largest_ratios, strict=True):
        assert got.dtype == torch.bfloat16
        error = (got.double() - exact).norm()
        rounding = (exact.bfloat16().double() - exact).norm()
        assert error < largest_ratio * rounding


def test_a_row_does_not_see_its_neighbours():
    """A row's log-probabilities do not depend on which other rows and prompts share the line."""
    torch.manual_seed(0)
    model = Decoder(CONFIG).double()
    prompts, completions = random_groups()
    together = model(pack_groups(prompts, completions), 0.7)[0]
    alone = [
        model(pack_groups([prompt], [[completion]]), 0.7)[0]
        for prompt, group in zip(prompts, completions, strict=True)
        for completion in group
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-12, rtol=0)


def test_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    packed = pack_groups(*random_groups())
    expected = gradients(model, model(packed, 1.0))
    model.checkpoint_blocks = True
    for ours, theirs in zip(gradients(model, model(packed, 1.0)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_packing():
    packed = pack_groups([[5, 6], [7]], [[[1, 2, 3], [4]], [[8, 9]]])
    assert packed.ids.tolist() == [5, 6, 1, 2, 7, 8]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0, 1]
    assert packed.prompts == ((0, 2), (4, 1))
    assert packed.rows == ((2, 2, 0), (4, 0, 0), (5, 1, 1))
    assert packed.predict_from.tolist() == [1, 2, 3, 1, 4, 5]
    assert packed.targets.tolist() == [1, 2, 3, 4, 8, 9]
    for prompts, completions in (([[]], [[[1]]]), ([[1]], [[[1], []]])):
        with pytest.raises(ValueError, match="group 0 has an empty"):
            pack_groups(prompts, completions)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_no_tensor_of_squared_length():
    model = Decoder(ModelConfig("Qwen3ForCausalLM", 32, 16, 16, 1, 2, 1, 8, qk_norm=True))
    packed = pack_groups(*random_groups((1024,), ((129,) * 24,), vocab=32))
    tokens = len(packed.ids)
    assert tokens == 4096
    with Largest() as largest:
        model(packed, 1.0)[0].sum().backward()
    assert 0 < largest.elements < tokens**2 // 32  # linear: 2 T d_ff, T V


def as_table(counts, keys):
    """[query blocks, key blocks] bool, from the lists of a BlockMask."""
    table = torch.zeros(keys.shape[2:], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        table[row, keys[0, 0, row, :count].long()] = True
    return table


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_block_mask_against_the_dense_mask():
    """CUDA's mask on a CPU: block lists that miss nothing, whole blocks that are whole, and the
    same attention.
    """
    for prompts, lengths in ((PROMPTS, LENGTHS), ((90, 16), ((40, 1, 70), (10, 33)))):
        packed = pack_groups(*random_groups(prompts, lengths))
        size = 16
        num_tokens = len(packed.ids)
        mask = _block_mask(packed, size)
        index = torch.arange(num_tokens)
        dense = mask.mask_mod(None, None, index[:, None], index[None, :])
        part = as_table(mask.kv_num_blocks, mask.kv_indices)
        whole = as_table(mask.full_kv_num_blocks, mask.full_kv_indices)
        assert len(part) == -(-num_tokens // size)
        for row in range(len(part)):
            for column in range(len(part)):
                tile = dense[row * size : (row + 1) * size, column * size : (column + 1) * size]
                assert not (part[row, column] and whole[row, column])
                assert bool(tile.any()) == bool(part[row, column] or whole[row, column])
                assert bool(tile.all()) or not whole[row, column]
        assert whole.any() or num_tokens < 100

        q = torch.randn(num_tokens, 6, 8)
        k = torch.randn(num_tokens, 2, 8)
        v = torch.randn(num_tokens, 2, 8)
        flex = _flex_attend(packed)(0, q, k, v)
        cpu = group_attention(packed)(0, q, k, v)
        torch.testing.assert_close(flex, cpu, atol=1e-5, rtol=0)


@given(sizes=st.lists(st.integers(0, 9)), most=st.integers(0, 20))
def test_chunks_are_as_large_as_fits_and_no_larger(sizes, most):
    found = chunks(range(len(sizes)), sizes, most)
    assert [i for chunk in found for i in chunk] == [*range(len(sizes))]
    for chunk, following in zip(found, [*found, []][1:], strict=True):
        total = sum(sizes[i] for i in chunk)
        assert total <= most or len(chunk) == 1
        assert not following or total + sizes[following[0]] > most

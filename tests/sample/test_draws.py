"""Draws depend on what they are for, and follow the distribution that they are drawn from."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from mar.sample.draws import (
    BLOCK,
    Truncation,
    draw_tokens,
    invert,
    stream_key,
    truncated_logprobs,
    uniforms,
)

MASK = 2**64 - 1


def splitmix64(seed, index):
    """Output `index` of Vigna's generator started at `seed`, on unsigned integers."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_uniforms_are_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567, i) for i in range(3)] == published
    keys = [0, 1, -1, 2**63 - 1, -(2**63), *(stream_key("k", i) for i in range(50))]
    for position in (0, 1, 7, 1535):
        ours = uniforms(torch.tensor(keys), torch.full((len(keys),), position))
        assert ours.dtype == torch.float64
        theirs = [(splitmix64(key & MASK, position) >> 11) * 2.0**-53 for key in keys]
        assert ours.tolist() == theirs


def test_uniforms_fill_the_unit_interval():
    keys = torch.tensor([stream_key(0, "train", 3, "prompt", g) for g in range(200)])
    # [position, sample]
    u = torch.stack([uniforms(keys, torch.full_like(keys, t)) for t in range(200)]).numpy()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / u.size) ** 0.5
    assert abs(u.var() - 1 / 12) < 4 * (1 / 180 / u.size) ** 0.5
    neighbours_in_position = (u[1:], u[:-1])
    neighbours_in_sample = (u[:, 1:], u[:, :-1])
    unrelated = (u, u.T)
    for a, b in (neighbours_in_position, neighbours_in_sample, unrelated):
        cell = (a * 8).astype(int) * 8 + (b * 8).astype(int)
        counts = np.bincount(cell.ravel(), minlength=64)
        assert chisquare(counts).pvalue > 1e-4


def test_different_identities_have_different_keys():
    identities = [
        (0, "train", 3, "p", 0, 1),
        (0, "train", 3, "p", 1, 0),
        (0, "train", 30, "p", 0, 1),
        (0, "eval", 3, "p", 0, 1),
    ]
    identities += [
        ("a", 1),
        ("a", "1"),
        (1, "a"),
        ("a1",),
        ("a", 1, ""),
        ("a", "b"),
        ("ab", ""),
        ("b", "a"),
        ("a', 'b",),
    ]
    # any id of a user's file will do
    identities += [
        ("a\x1fstr:b",),
        ("a\\x1fstr:b",),
        ("\ud800",),
        ("\\ud800",),
        (),
        ("",),
    ]
    assert len({stream_key(*identity) for identity in identities}) == len(identities)


def test_a_key_is_the_same_in_every_process_and_version():
    assert stream_key(43, "train", 7, "patient-12", 0, 5) == 2690915478524524955


def test_draw_inverts_the_cumulative_distribution():
    torch.manual_seed(0)
    logits, n = 2 * torch.randn(9, dtype=torch.float64), 4000
    for temperature in (0.7, 1.0, 2.0):
        exact = (logits / temperature).log_softmax(0)
        grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        tokens, logprobs, _ = draw_tokens(logits.expand(n, -1), grid, temperature)
        counts = torch.bincount(tokens, minlength=9)
        # an even grid leaves no room for chance
        assert (counts - n * exact.exp()).abs().max() <= 1
        torch.testing.assert_close(logprobs, exact[tokens], atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [1, 16 * BLOCK, 16 * BLOCK + 1, 17 * BLOCK, 20 * BLOCK - 1])
def test_blocks_change_no_draw(size):
    """Against the cumulative sum itself, with masses that leave whole blocks, the first and the
    last tokens without any."""
    rng = np.random.default_rng(size)
    masses = rng.random((300, size)) ** 20 * (rng.random((300, size)) < rng.random((300, 1)))
    masses[:, rng.integers(size)] += 0.01
    masses[:100, : size // 2] = 0
    masses[100:200, size // 2 + 1 :] = 0
    masses = masses[masses.sum(1) > 0]
    uniform = rng.random(len(masses))
    uniform[::7] = 0
    uniform[::11] = 1 - 2.0**-53
    drawn = invert(torch.from_numpy(masses), torch.from_numpy(uniform)).numpy()
    below = masses.cumsum(1)
    target, at = uniform * below[:, -1], np.arange(len(masses))
    tolerance = 1e-12 * below[:, -1]
    assert (masses[at, drawn] > 0).all()
    assert (below[at, drawn] > target - tolerance).all()
    assert (below[at, drawn] - masses[at, drawn] <= target + tolerance).all()


def test_draws_pass_chi_squared():
    torch.manual_seed(1)
    logits = torch.randn(12)
    keys = torch.tensor([stream_key("chi", i) for i in range(5000)])
    tokens, _, _ = draw_tokens(logits.expand(5000, -1), uniforms(keys, torch.zeros_like(keys)), 0.8)
    counts = torch.bincount(tokens, minlength=12).double()
    assert chisquare(counts, 5000 * (logits.double() / 0.8).softmax(0)).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_tokens_are_never_drawn(dtype):
    off = -torch.inf
    logits = torch.tensor([off, 0.0, off, off, 0.0, 0.0, -800.0, off, 0.0, off, off], dtype=dtype)
    edges = [0.0, 5e-324, 0.25, 0.5, 0.75, 1 - 2.0**-53]
    u = torch.tensor(edges + [np.nextafter(e, 0.0) for e in edges[2:]], dtype=torch.float64)
    tokens, logprobs, _ = draw_tokens(logits.expand(len(u), -1), u, 1.0)
    assert set(tokens.tolist()) <= {1, 4, 5, 8}
    assert torch.isfinite(logprobs).all()
    assert tokens[0] == 1 and tokens[5] == 8


def test_temperature_zero_takes_the_largest():
    logits = torch.tensor([[0.0, 3.0, 2.999], [5.0, -torch.inf, 5.1]])
    uniform = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs, _ = draw_tokens(logits, uniform, 0.0)
    assert tokens.tolist() == [1, 2]
    assert logprobs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "top_k, top_p, min_p",
    [(3, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.3), (6, 0.8, 0.1), (50, 0.999, 0.001)],
)
def test_truncation_keeps_what_it_says(top_k, top_p, min_p):
    torch.manual_seed(3)
    logprobs = (2 * torch.randn(20, 11, dtype=torch.float64)).log_softmax(-1)
    ours = truncated_logprobs(logprobs, Truncation(top_k, top_p, min_p)).exp()
    for row, got in zip(logprobs.exp().tolist(), ours.tolist(), strict=True):
        ranked = sorted(range(11), key=lambda i: -row[i])[: top_k or None]
        mass, kept = sum(row[i] for i in ranked), []
        for i in ranked:
            if sum(row[j] for j in kept) / mass < top_p and row[i] >= min_p * row[ranked[0]]:
                kept.append(i)
        total = sum(row[i] for i in kept)
        expected = [row[i] / total if i in kept else 0.0 for i in range(11)]
        assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "values", [(-1, 1.0, 0.0), (0, 0.0, 0.0), (0, 1.5, 0.0), (0, 1.0, -0.1), (0, 1.0, 2.0)]
)
def test_nonsense_truncation_is_refused(values):
    with pytest.raises(ValueError, match="top_k >= 0"):
        Truncation(*values)

"""The Triton kernels, compiled, against the reference in float64."""

import itertools
from functools import partial

import torch
from torch import Tensor

import mar_kernels
from experiments.gpu.decode_cases import a_step, in_float64, relative_error, some_heads
from experiments.gpu.measuring import Place, Record
from mar_kernels import LayerCache

# tokens N, width D, vocabulary V: none is a multiple of a tile
RAGGED = ((1, 24, 7), (63, 100, 1000), (257, 576, 49_152), (190, 1000, 151_936))
# The number of logits is above 2^31, then that of the hidden states.
MANY_ELEMENTS = ((16_384, 64, 151_936), (34_000_000, 64, 96))
TINY = ((1, 24, 7), (5, 20, 61))

# Rounding a gradient to bfloat16 alone is an error of 0.002.
GRADIENT_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
OUTPUT_LIMIT = 1e-4
# Rounding a result to bfloat16 alone is 0.0017.
DECODE_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
# (query heads, key heads, channels) of Qwen3-8B, SmolLM2-135M and Phi-3-mini
HEADS = ((32, 8, 128), (9, 3, 64), (32, 32, 96))
OUTPUTS = ("log-probability", "entropy", "log-sum-exp")


def measure(place: Place, record: Record) -> None:
    import triton

    interpreted = triton.knobs.runtime.interpret
    found = "interpreted" if interpreted else "compiled"
    record.check("kernels", interpreted != place.is_gpu, found)
    cases = TINY if place.tiny else RAGGED
    for (n, d, v), dtype in itertools.product(cases, GRADIENT_LIMITS):
        record.attempt(
            f"linear_logprobs N {n} D {d} V {v} {dtype}",
            partial(linear_logprobs, place, record, n, d, v, dtype),
        )
    for heads, dtype in itertools.product(HEADS, DECODE_LIMITS):
        record.attempt(
            f"decode_attention {heads} {dtype}",
            partial(decode_attention, place, record, heads, dtype),
        )
    for dtype in DECODE_LIMITS:
        record.attempt(f"rotated_heads {dtype}", partial(rotated_heads, place, record, dtype))
    record.attempt("answer_advantages", partial(answer_advantages, place, record))
    record.attempt("selected_logprobs", partial(selected_logprobs, place, record))
    if not place.tiny:
        for n, d, v in MANY_ELEMENTS:
            record.attempt(
                f"linear_logprobs past 2^31 elements, N {n} D {d} V {v}",
                partial(linear_logprobs, place, record, n, d, v, torch.bfloat16),
            )


def linear_logprobs(
    place: Place, record: Record, n: int, d: int, v: int, dtype: torch.dtype
) -> None:
    """Largest error of each output, and the relative error of both gradients, with gradients of
    all three outputs coming in."""
    name = f"N {n:,} D {d:,} V {v:,} {str(dtype).removeprefix('torch.')}"
    torch.manual_seed(n + v)
    device = place.device
    # logits with a spread of 3
    hidden = (3 * d**-0.5 * torch.randn(n, d, device=device)).to(dtype).requires_grad_()
    weight = torch.randn(v, d, device=device).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), device=device)
    incoming = torch.randn(len(OUTPUTS), n, device=device)

    outputs, gradients = _run((hidden, weight), targets, incoming, "triton")
    exact = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    wanted, wanted_gradients = _run(exact, targets, incoming, "reference")
    for output, got, want in zip(OUTPUTS, outputs, wanted, strict=True):
        error = ((got.double() - want).abs() / want.abs().clamp(min=1)).max().item()
        record(f"{name}: error of the {output}", error, at_most=OUTPUT_LIMIT)
    for leaf, got, want in zip(("hidden", "weight"), gradients, wanted_gradients, strict=True):
        error = ((got.double() - want).norm() / want.norm()).item()
        limit = GRADIENT_LIMITS[dtype]
        record(f"{name}: error of the gradient of {leaf}", error, at_most=limit)


def _run(
    leaves: tuple[Tensor, Tensor], targets: Tensor, incoming: Tensor, backend: str
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    outputs = mar_kernels.linear_logprobs(*leaves, targets, 0.7, backend=backend)
    loss = leaves[0].new_zeros((), dtype=outputs[0].dtype)
    for output, gradient in zip(outputs, incoming, strict=True):
        loss = loss + (output * gradient.to(output.dtype)).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return [output.detach() for output in outputs], gradients


def selected_logprobs(place: Place, record: Record) -> None:
    """Of logits [M, V] with more than 2^31 elements."""
    rows, vocabulary = place.size(15_000, 5), place.size(151_936, 61)
    torch.manual_seed(0)
    logits = torch.randn(rows, vocabulary, device=place.device, dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (rows,), device=place.device)
    got = mar_kernels.selected_logprobs(logits, targets, backend="triton")
    # The last rows stand past 2^31.
    ends = slice(rows - min(rows, 512), rows)
    want = torch.log_softmax(logits[ends].double(), -1).gather(1, targets[ends, None])[:, 0]
    # The result has the type of the logits, and its rounding.
    error = ((got[ends].double() - want) / want).abs().max().item()
    name = f"selected_logprobs M {rows:,} V {vocabulary:,} bfloat16: relative error"
    record(name, error, at_most=2**-8)


def decode_attention(
    place: Place, record: Record, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Groups of several sizes, prompts of one to 3,000 tokens, and what is stored meanwhile."""
    num_heads, num_kv_heads, width = heads
    if place.tiny:
        heads = (num_heads // num_kv_heads, 1, width)
        q, k, v, cache = a_step(dtype, heads, place.device, (19, 1), (2, 1))
    else:
        lengths, groups = (3000, 1, 513, 1024), (32, 1, 7, 16)
        q, k, v, cache = a_step(dtype, heads, place.device, lengths, groups, 2, 3072, 700)
    want = mar_kernels.decode_attention(*in_float64(q, k, v, cache))
    plain_cache = LayerCache(*(x.clone() for x in cache))
    plain = mar_kernels.decode_attention(q, k, v, plain_cache, backend="reference")
    got = mar_kernels.decode_attention(q, k, v, cache, backend="triton")
    shape = f"{num_heads}/{num_kv_heads} heads of {width}, {str(dtype).removeprefix('torch.')}"
    name = f"decode_attention, {shape}"
    record(f"{name}: error", relative_error(got, want), at_most=DECODE_LIMITS[dtype])
    record(f"{name}: error of plain operators", relative_error(plain, want))
    same = [
        torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        for ours, theirs in zip(cache, plain_cache, strict=True)
    ]
    record.check(f"{name}: keys and values are stored", all(same), f"{sum(same)} of {len(same)}")


def rotated_heads(place: Place, record: Record, dtype: torch.dtype) -> None:
    """Norm and rotation, which round as the operators do, one after another."""
    case = some_heads(dtype, 128, place.device, place.size(96, 2), place.size(32, 2), 1)
    heads, cos, sin, num_queries, q_gain, k_gain, eps = case
    gains = q_gain.double(), k_gain.double()
    want = mar_kernels.rotated_heads(
        heads.double(), cos.double(), sin.double(), num_queries, *gains, eps
    )
    plain = mar_kernels.rotated_heads(*case, backend="reference")
    got = mar_kernels.rotated_heads(*case, backend="triton")
    name = f"rotated_heads, {str(dtype).removeprefix('torch.')}"
    record(f"{name}: error", relative_error(got, want), at_most=DECODE_LIMITS[dtype])
    record(f"{name}: error of plain operators", relative_error(plain, want))
    record(f"{name}: numbers unlike the plain operators'", (got != plain).float().mean().item())


def answer_advantages(place: Place, record: Record) -> None:
    """Every rule that the kernel has, in float64: the order of sums is all that differs."""
    generator = torch.Generator().manual_seed(0)
    rows, tokens, components = place.size(512, 12), place.size(1536, 9), 7
    layout = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7])
    segments = torch.randint(len(layout), (rows, tokens), generator=generator).sort(1).values
    earned = torch.randn(rows, components, generator=generator, dtype=torch.float64)
    weights = torch.rand(components, generator=generator, dtype=torch.float64)
    inputs = (
        earned.to(place.device),
        weights.to(place.device),
        layout.expand(rows, -1).contiguous().to(place.device),
        segments.to(place.device),
        (torch.arange(rows) // 4).to(place.device),
    )
    rules = itertools.product(
        mar_kernels.KERNEL_CREDITS, mar_kernels.KERNEL_BASELINES, mar_kernels.KERNEL_SCALES
    )
    worst = 0.0
    for rule in rules:
        got = mar_kernels.answer_advantages(*inputs, *rule, backend="triton")
        want = mar_kernels.answer_advantages(*inputs, *rule, backend="reference")
        worst = max(worst, (got - want).abs().max().item())
    record("answer_advantages, every rule, float64: error", worst, at_most=1e-10)

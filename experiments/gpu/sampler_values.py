"""The sampler on the device: against the CPU, graphs against eager steps, and against the trainer."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from experiments.gpu.attention_values import SHAPE
from experiments.gpu.measuring import Place, Record, random_decoder, random_requests
from mar.learn.optim import make_optimizer
from mar.policy.model import Decoder
from mar.policy.packing import pack_groups
from mar.records import Completion
from mar.run import checkpoint
from mar.sample import engine
from mar.sample.draws import SamplingParams
from mar.sample.engine import Request, generate

PLENTY = 10**7
# rows leave one after another, and the width of a captured step is passed
LIMITS = (20, 40, 60, 80, 100, 120, 140, 160)
TINY_LIMITS = (2, 4, 5, 6)


def measure(place: Place, record: Record) -> None:
    record.attempt("sampler against the CPU", lambda: against_the_cpu(place, record))
    record.attempt("Triton against operators", lambda: triton_against_operators(place, record))
    record.attempt("graphs against eager steps", lambda: graphs_against_eager(place, record))
    record.attempt("a checkpoint beside graphs", lambda: checkpoint_beside_graphs(place, record))
    record.attempt("sampler against trainer", lambda: against_the_trainer(place, record))


def small_model(place: Place) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(SHAPE)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3.0  # distributions far from uniform
    return model.to(place.device)


def small_requests(place: Place) -> list[Request]:
    limits = TINY_LIMITS if place.tiny else LIMITS
    return random_requests(SHAPE.vocab_size, [130, 7, 64], len(limits), limits)


def completions(
    model: Decoder, requests: list[Request], temperature: float = 1.0
) -> list[Completion]:
    longest = max(max(request.limits) for request in requests)
    params = SamplingParams(longest, temperature)
    groups = generate(model, requests, params, PLENTY).groups
    return list(chain.from_iterable(groups))


@contextmanager
def eager() -> Iterator[None]:
    with patch.object(engine, "GRAPHED", ()):
        yield


@contextmanager
def without_triton() -> Iterator[None]:
    """Decode steps take plain operators."""
    with patch.object(engine, "BACKEND", "reference"):
        yield


@contextmanager
def no_fallback() -> Iterator[None]:
    """A capture that fails is an error here, not a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "decoding goes on without CUDA graphs")
        yield


def same_tokens(a: list[Completion], b: list[Completion]) -> list[tuple[Completion, Completion]]:
    pairs = zip(a, b, strict=True)
    return [(one, other) for one, other in pairs if np.array_equal(one.ids, other.ids)]


def largest_difference(pairs: list[tuple[Completion, Completion]]) -> float:
    """Of log-probabilities; NaN where there is no pair."""
    found = [float(abs(a.full_logprobs - b.full_logprobs).max()) for a, b in pairs]
    return max(found, default=float("nan"))


def against_the_cpu(place: Place, record: Record) -> None:
    """The same draws in float32. A draw on a border may fall either way."""
    model = small_model(place)
    requests = small_requests(place)
    on_device = completions(model, requests)
    on_cpu = completions(model.to("cpu"), requests)
    same = same_tokens(on_device, on_cpu)
    record("rows with other tokens than on the CPU", len(on_cpu) - len(same), at_most=1)
    record("log-probabilities against the CPU", largest_difference(same), "nats", at_most=1e-3)


def triton_against_operators(place: Place, record: Record) -> None:
    """The same draws in float32, as against the CPU."""
    model = small_model(place)
    requests = small_requests(place)
    in_triton = completions(model, requests)
    with without_triton():
        in_operators = completions(model, requests)
    same = same_tokens(in_triton, in_operators)
    changed = len(in_operators) - len(same)
    record("rows with other tokens than without Triton", changed, at_most=1)
    largest = largest_difference(same)
    record("log-probabilities against those without Triton", largest, "nats", at_most=1e-3)


def graphs_against_eager(place: Place, record: Record) -> None:
    """Bit for bit: the same kernels in the same order."""
    model = small_model(place)
    requests = small_requests(place)
    with no_fallback():
        replayed = completions(model, requests)
    with eager():
        stepped = completions(model, requests)
    same = same_tokens(replayed, stepped)
    record("rows with other tokens than eager steps", len(stepped) - len(same), at_most=0)
    record("log-probabilities against eager steps", largest_difference(same), at_most=0.0)


def checkpoint_beside_graphs(place: Place, record: Record) -> None:
    """A checkpoint is copied and written while steps are captured and replayed."""
    model = small_model(place)
    requests = small_requests(place)
    expected = completions(model, requests)
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.999), eps=1e-8, weight_decay=0.0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        writing = checkpoint.save(folder, 1, model, optimizer, keep=1)
        with no_fallback():
            found = completions(model, requests)
        writing.result()
        problems: list[str] = []
        written = checkpoint.newest(folder, problems.append)
    record.check("the checkpoint is valid", written is not None, "; ".join(problems) or "it is")
    changed = len(expected) - len(same_tokens(expected, found))
    record("rows that a checkpoint beside them changed", changed, at_most=0)


def against_the_trainer(place: Place, record: Record) -> None:
    """In bfloat16, the shape of Qwen3-0.6B: |log p of the sampler - log p of the trainer|."""
    model = random_decoder(place, "0.6B", torch.bfloat16)
    tokens = place.size(128, 5)
    lengths = [place.size(512, 9)] * 2
    requests = random_requests(model.config.vocab_size, lengths, 8, (tokens,) * 8)
    for name, way in (("", nullcontext), (", without Triton", without_triton)):
        with way():
            rms, largest = mismatch(model, requests, tokens)
        record(f"sampler against trainer, bfloat16, rms{name}", rms, "nats")
        record(f"sampler against trainer, bfloat16, largest{name}", largest, "nats")


def mismatch(
    model: Decoder,
    requests: list[Request],
    tokens: int,
    sample: Callable[..., engine.Generation] = generate,
) -> tuple[float, float]:
    """(rms, largest) difference over the sampled tokens, at temperature 1."""
    groups = sample(model, requests, SamplingParams(tokens), PLENTY).groups
    prompts = [request.prompt_ids for request in requests]
    written = [[completion.ids.tolist() for completion in group] for group in groups]
    packed = pack_groups(prompts, written, model.head_weight.device)
    with torch.no_grad():
        trained = model(packed)[0].double().cpu().numpy()
    sampled = np.concatenate([c.full_logprobs for group in groups for c in group])
    gap = np.abs(sampled.astype(np.float64) - trained)
    return float(np.sqrt((gap**2).mean())), float(gap.max())

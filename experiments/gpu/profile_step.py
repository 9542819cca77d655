"""Where the time of a decode step and of an update goes: the dearest kernels, launches, gaps."""

import time
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from experiments.gpu.measuring import Place, Record, random_decoder, random_requests
from experiments.gpu.sampler_values import PLENTY, eager
from mar.policy.model import Decoder
from mar.policy.packing import pack_groups
from mar.sample.draws import SamplingParams
from mar.sample.engine import generate

SHOWN = 10


def measure(place: Place, record: Record) -> None:
    """The shape of Qwen3-0.6B in bfloat16, one prompt of 512 tokens with 32 completions."""
    model = random_decoder(place, "0.6B", torch.bfloat16)
    steps = place.size(16, 2)
    requests = random_requests(model.config.vocab_size, [place.size(512, 7)], place.size(32, 4))

    def decode() -> None:
        generate(model, requests, SamplingParams(steps), PLENTY)

    def decode_eagerly() -> None:
        with eager():
            decode()

    record.attempt(
        "decode", lambda: profiled(place, record, "decode, eager", decode_eagerly, steps)
    )
    if place.is_gpu:
        record.attempt("replay", lambda: profiled(place, record, "decode, graphs", decode, steps))
    record.attempt("update", lambda: profiled(place, record, "update", update_of(place, model), 1))


def update_of(place: Place, model: Decoder) -> Callable[[], None]:
    """A forward and backward pass over one group."""
    vocabulary = model.config.vocab_size
    prompt = torch.randint(vocabulary, (place.size(512, 7),)).tolist()
    lengths = [place.size(64, 5)] * place.size(32, 4)
    rows = [torch.randint(vocabulary, (length,)).tolist() for length in lengths]
    packed = pack_groups([prompt], [rows], place.device)

    def run() -> None:
        model.zero_grad()
        model(packed)[0].mean().backward()

    return run


def profiled(place: Place, record: Record, name: str, work: Callable[[], None], steps: int) -> None:
    """`work` makes so many steps. On a CPU its operators take the place of kernels."""
    work()  # compiles
    activities = [ProfilerActivity.CPU]
    if place.is_gpu:
        activities.append(ProfilerActivity.CUDA)
    place.wait()
    with profile(activities=activities) as prof:
        began = time.perf_counter()
        work()
        place.wait()
        seconds = time.perf_counter() - began
    device_type = DeviceType.CUDA if place.is_gpu else DeviceType.CPU
    entries = [entry for entry in prof.key_averages() if entry.device_type == device_type]

    def microseconds(entry: object) -> float:
        kind = "self_device_time_total" if place.is_gpu else "self_cpu_time_total"
        return getattr(entry, kind)

    entries.sort(key=microseconds, reverse=True)
    busy = sum(microseconds(entry) for entry in entries) / 1e6
    what = "kernels" if place.is_gpu else "operators"
    record(f"{name}: {what} a step", sum(entry.count for entry in entries) / steps)
    record(f"{name}: a step", 1e3 * seconds / steps, "ms")
    record(f"{name}: share of the time without a kernel", 1 - busy / seconds)
    for entry in entries[:SHOWN]:
        share = microseconds(entry) / 1e6 / seconds
        record(f"{name}: {entry.key[:80]}, {entry.count / steps:.1f} a step", 100 * share, "%")

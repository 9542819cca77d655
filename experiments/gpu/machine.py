"""What the machine is, and what it reaches: the numbers that others are compared with."""

import subprocess

import torch

from experiments.gpu.measuring import GB, Place, Record

ASKED = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def measure(place: Place, record: Record) -> None:
    record("cores", str(torch.get_num_threads()))
    if place.is_gpu:
        record.attempt("nvidia-smi", lambda: ask_driver(record))
        memory = torch.cuda.get_device_properties(place.device).total_memory
        record("memory", memory / GB, "GB")
    record("copy", copied_per_second(place) / GB, "GB/s")
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        record(f"product in {name}", flops_per_second(place, dtype) / 1e12, "TFLOP/s")


def ask_driver(record: Record) -> None:
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name, value in zip(ASKED, said.splitlines()[0].split(","), strict=True):
        record(name, value.strip())


def copied_per_second(place: Place) -> float:
    """Bytes read and written in a second by a large copy."""
    source = torch.zeros(place.size(1 << 31, 1 << 20), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / place.seconds(lambda: target.copy_(source))


def flops_per_second(place: Place, dtype: torch.dtype) -> float:
    """Of a large square product."""
    side = place.size(8192, 64)
    a = torch.randn(side, side, device=place.device, dtype=dtype)
    b = torch.randn(side, side, device=place.device, dtype=dtype)
    return 2 * side**3 / place.seconds(lambda: a @ b)

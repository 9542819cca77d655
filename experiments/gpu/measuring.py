"""What the parts of the first minutes share: where they measure, how long a call takes, and a
record that is on the disk before the next measurement begins."""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mar.policy.model import Decoder, ModelConfig
from mar.run.planning import SHAPES
from mar.sample.draws import stream_key
from mar.sample.engine import Request

ROOT = Path(__file__).resolve().parents[2]
GB = 1e9


@dataclass(frozen=True)
class Place:
    """Where a part measures. `tiny`: its cases are so small that a CPU goes through them."""

    device: torch.device
    tiny: bool

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.tiny else real

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], runs: int = 5) -> float:
        """The median of `runs` calls, after one that is not counted."""
        times = []
        for _ in range(runs + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    @contextmanager
    def peak(self) -> Iterator[Callable[[], float | None]]:
        """A function that says the most bytes allocated since this was opened; None on a CPU."""
        if self.is_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        yield lambda: float(torch.cuda.max_memory_allocated()) if self.is_gpu else None


class Record:
    """Rows of one part, each written to its file and printed as soon as it is measured."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  {shown(row)}", flush=True)

    def __call__(
        self, what: str, value: float | str | None, unit: str = "", at_most: float | None = None
    ) -> None:
        """A measured value. With `at_most` it is a check, which fails above that, and for NaN."""
        row: dict[str, Any] = {"what": what, "value": value, "unit": unit}
        if at_most is not None:
            row["at_most"] = at_most
            row["passed"] = isinstance(value, int | float) and value <= at_most
        self.write(row)

    def check(self, what: str, passed: bool, found: str) -> None:
        self.write({"what": what, "value": found, "unit": "", "passed": passed})

    def attempt(self, what: str, work: Callable[[], object]) -> None:
        """Let `work` measure. What it raises is a failed check, and the part goes on."""
        try:
            work()
        except Exception as error:  # of any kind: what fails on a new device is what this is for
            self.check(what, False, one_line(error))


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def shown_value(row: dict[str, Any]) -> str:
    """The value of a row with its unit and limit, and whether its check failed."""
    value = row["value"]
    if isinstance(value, float):
        value = f"{value:.4g}"
    text = f"{value} {row['unit']}".rstrip()
    if "at_most" in row:
        text += f" (at most {row['at_most']:.3g})"
    return text if row.get("passed", True) else f"{text} MISSED"


def shown(row: dict[str, Any]) -> str:
    return f"{row['what']}: {shown_value(row)}"


def environment(device: torch.device) -> dict[str, str]:
    """What numbers were measured on: machine, versions, commit, date."""

    def said(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        except FileNotFoundError:
            return "unknown"
        return (done.stdout.splitlines() or ["unknown"])[0].strip()

    def version(package: str) -> str:
        if importlib.util.find_spec(package) is None:
            return "not installed"
        return importlib.import_module(package).__version__

    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "CPU",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "numpy": np.__version__,
        "date": str(date.today()),
        "commit": said("git", "describe", "--always", "--dirty", "--exclude=*"),
    }


# ---------------------------------------------------------------------- models and requests

TINY_SHAPE = ModelConfig(
    "Qwen3ForCausalLM", 97, 32, 48, 2, 4, 2, 8, qk_norm=True, tied_embeddings=True
)


def shape_of(place: Place, name: str) -> ModelConfig:
    """The shape of `Qwen/Qwen3-<size>`, or the tiny one."""
    return TINY_SHAPE if place.tiny else SHAPES[f"Qwen/Qwen3-{name}"]


def fill_at_random(model: torch.nn.Module) -> None:
    """Weights of the usual size, gains of 1: what is written is nonsense, its price is real."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter)


def random_decoder(place: Place, name: str, dtype: torch.dtype) -> Decoder:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Decoder(shape_of(place, name)).to(dtype)
    model.to_empty(device=place.device)
    with torch.no_grad():
        fill_at_random(model)
    return model


def random_requests(
    vocab_size: int, prompt_lengths: list[int], group_size: int, limits: tuple[int, ...] = ()
) -> list[Request]:
    rng = np.random.default_rng(0)
    requests = []
    for index, length in enumerate(prompt_lengths):
        ids = tuple(rng.integers(0, vocab_size, length).tolist())
        keys = tuple(stream_key("first_minutes", index, row) for row in range(group_size))
        requests.append(Request(ids, keys, limits))
    return requests

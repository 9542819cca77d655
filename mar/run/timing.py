"""Seconds of the parts of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """`with timer("sample"): ...` adds the seconds of the block to `timer.seconds["sample"]`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[part] = self.seconds.get(part, 0.0) + spent

    def metrics(self, num_tokens: int) -> dict[str, float]:
        """`perf/*` of a step that made so many completion tokens."""
        metrics = {f"perf/{part}_s": seconds for part, seconds in self.seconds.items()}
        metrics["perf/tokens_per_s"] = num_tokens / sum(self.seconds.values())
        return metrics

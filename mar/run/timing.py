"""Seconds of the parts of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

# what is logged of every step -> its line in the glossary, mar/measure/README.md
MEANINGS = {
    "perf/sample_s": "seconds of sampling",
    "perf/verify_s": "seconds of verifying and paying",
    "perf/update_s": "seconds of the update",
    "perf/tokens_per_s": "completion tokens per second of the whole step",
}


class Timer:
    """`with timer("sample"): ...` adds the seconds of the block to `timer.seconds["sample"]`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()
        self.ended = self.began

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.ended = time.perf_counter()
            self.seconds[part] = self.seconds.get(part, 0.0) + self.ended - began

    def metrics(self, num_tokens: int) -> dict[str, float]:
        """`perf/*` of a step that made so many completion tokens. What lies between the parts, such
        as gathering a sharded policy, counts in tokens per second."""
        metrics = {f"perf/{part}_s": seconds for part, seconds in self.seconds.items()}
        metrics["perf/tokens_per_s"] = num_tokens / (self.ended - self.began)
        return metrics

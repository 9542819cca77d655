"""run.interrupts."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mar.policy.distributed import World


class Interrupts:
    """SIGINT, SIGTERM and SIGUSR1 wait for the end of a training step, so that no checkpoint is of half an update; elsewhere they stop at once."""

    def __init__(self, leads: bool) -> None:
        self.inside, self.since, self.leads = False, 0.0, leads
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(kind, self._receive)

    def _receive(self, *_: object) -> None:
        before, self.since = self.since, time.monotonic()
        if self.since > before + 1 if before else not self.inside:
            raise KeyboardInterrupt
        if (
            not before and self.leads
        ):  # else the same one: a cluster signals every process, and torchrun passes it on
            print(
                "\nstopping after this step (again, later: stop at once, back to the last checkpoint)",
                file=sys.stderr,
                flush=True,
            )

    def agreed(self, world: World) -> bool:
        """Whether to stop, on all ranks the same: a signal to one is one to all, and one that comes later waits for the next step."""
        return world.reduce((self.since,), largest=True) != [0.0]

    @contextmanager
    def held(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

"""Ctrl-C and a cluster's signals: a training step is finished first, so that no checkpoint holds
half an update."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mar.policy.distributed import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_SIGNAL_S = 1.0  # a cluster signals every process, and torchrun passes its own on


class Interrupts:
    """Inside `held()` a first signal is remembered, except inside `at_once()`. Elsewhere it stops the
    run at once.

    A second signal, later than `SAME_SIGNAL_S` after the one before, stops at once everywhere.
    """

    any_received = False  # by any run of this process

    def __init__(self, leads: bool) -> None:
        self.leads = leads
        self.is_held = False
        self.received_at: float | None = None
        for kind in SIGNALS:
            signal.signal(kind, self._receive)

    def _receive(self, *_: object) -> None:
        now = time.monotonic()
        before = self.received_at
        self.received_at = now
        Interrupts.any_received = True
        if before is None:
            if not self.is_held:
                raise KeyboardInterrupt
            if self.leads:
                print(
                    "\nstopping after this step "
                    "(again, later: stop at once, back to the last checkpoint)",
                    file=sys.stderr,
                    flush=True,
                )
        elif now > before + SAME_SIGNAL_S:
            raise KeyboardInterrupt

    def agreed(self, world: World) -> bool:
        """Whether to stop: a signal to one rank is a signal to all, so all decide the same. One
        that comes later waits for the next step; in the last step it has no effect."""
        mine = 0.0 if self.received_at is None else 1.0
        return world.reduce((mine,), largest=True) != [0.0]

    @contextmanager
    def held(self) -> Iterator[None]:
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A part of `held()` that a signal stops, also one that came before it."""
        self.is_held = False
        try:
            if self.received_at is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self.is_held = True

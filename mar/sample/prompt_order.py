"""Which questions a training step asks: a function of the seed and the step alone."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import numpy as np

from mar.records import Prompt

# The thread that makes prompts begins so much later than it is asked to. Two threads of Python take
# turns of 5 ms: without it a step would often wait for such a turn.
GIVE_WAY_S = 0.02

T = TypeVar("T")


@lru_cache(maxsize=2)  # a step may reach into the next epoch
def order_of_epoch(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of `count` items, drawn once for each epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def items_of_step(items: Sequence[T], step: int, per_step: int, seed: int) -> list[T]:
    """The `per_step` items of a step, counted from 0. Every epoch is a new order of all items."""
    count = len(items)
    chosen = []
    for position in range(step * per_step, (step + 1) * per_step):
        epoch, place_in_epoch = divmod(position, count)
        order = order_of_epoch(seed, epoch, count)
        chosen.append(items[order[place_in_epoch]])
    return chosen


@dataclass
class PromptOrder:
    """All training prompts, asked `per_step` at a time.

    Prompts may be made only when they are asked for (`answers/prompt_table.py`): while a step
    trains, those of the next one are made in a thread.
    """

    prompts: Sequence[Prompt]
    per_step: int
    seed: int
    _maker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), repr=False)
    _ahead: dict[int, Future[list[Prompt]]] = field(default_factory=dict, repr=False)

    def of_step(self, step: int) -> list[Prompt]:
        """The prompts of a step, counted from 0."""
        if step in self._ahead:
            prompts = self._ahead[step].result()
        else:
            prompts = self._made(step)
        self._ahead = {step + 1: self._maker.submit(self._made_later, step + 1)}
        return prompts

    def _made(self, step: int) -> list[Prompt]:
        return items_of_step(self.prompts, step, self.per_step, self.seed)

    def _made_later(self, step: int) -> list[Prompt]:
        time.sleep(GIVE_WAY_S)
        return self._made(step)

    def out_of_turn(self, step: int, attempt: int, num: int) -> list[Prompt]:
        """`num` of the `per_step` prompts drawn at random for a step whose own taught nothing
        (algo.resample). Attempts are counted from 1."""
        count = len(self.prompts)
        rng = np.random.default_rng([self.seed, step, attempt])
        drawn = rng.choice(count, self.per_step, replace=self.per_step > count)
        return [self.prompts[index] for index in drawn[:num]]

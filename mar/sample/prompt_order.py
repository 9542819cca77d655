"""Which prompts a training step asks: a function of the seed and the step alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mar.records import Prompt


@lru_cache(maxsize=2)  # a step may reach into the next epoch
def order_of_epoch(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of `count` prompts, drawn once for each epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class PromptOrder:
    """All training prompts, asked `per_step` at a time; every epoch is a new order of all of them."""

    prompts: Sequence[Prompt]
    per_step: int
    seed: int

    def of_step(self, step: int) -> list[Prompt]:
        """The prompts of a step, counted from 0."""
        count = len(self.prompts)
        chosen = []
        for position in range(step * self.per_step, (step + 1) * self.per_step):
            epoch, place_in_epoch = divmod(position, count)
            order = order_of_epoch(self.seed, epoch, count)
            chosen.append(self.prompts[order[place_in_epoch]])
        return chosen

    def out_of_turn(self, step: int, attempt: int) -> list[Prompt]:
        """Prompts drawn at random, for a step whose own taught nothing (algo.resample). Attempts are
        counted from 1."""
        count = len(self.prompts)
        rng = np.random.default_rng([self.seed, step, attempt])
        drawn = rng.choice(count, self.per_step, replace=self.per_step > count)
        return [self.prompts[index] for index in drawn]

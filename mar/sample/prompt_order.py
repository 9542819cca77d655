"""Which prompts a training step asks: a function of the seed and the step alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mar.records import Prompt


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
            epoch = position // count
            order = np.random.default_rng([self.seed, epoch]).permutation(count)
            chosen.append(self.prompts[order[position % count]])
        return chosen

    def out_of_turn(self, step: int, attempt: int) -> list[Prompt]:
        """Other prompts for a step whose own taught nothing (algo.resample); attempts from 1."""
        count = len(self.prompts)
        rng = np.random.default_rng([self.seed, step, attempt])
        drawn = rng.choice(count, self.per_step, replace=self.per_step > count)
        return [self.prompts[index] for index in drawn]

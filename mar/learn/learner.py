"""learn.learner."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mar.config import Config
from mar.files import append_jsonl
from mar.measure.held_out import Protocol
from mar.policy.critic import Critic
from mar.policy.distributed import World, gather_weights
from mar.policy.model import Decoder
from mar.records import Prompt


@dataclass(frozen=True)
class Job:
    """What the loop needs, built once from the config."""

    config: Config
    folder: Path
    model: Decoder
    optimizer: torch.optim.Optimizer
    prompts: tuple[Prompt, ...]
    protocol: Protocol
    first_open: np.ndarray
    world: World
    whole: Decoder | None  # an unsharded copy to sample from, where the policy is sharded
    reference: Decoder | None  # the first policy, where there is a KL term
    critic: tuple[Critic, torch.optim.Optimizer] | None

    @contextmanager
    def sampler(self) -> Iterator[Decoder]:
        """The policy of this moment, in one piece."""
        if self.whole is None:
            yield self.model
            return
        gather_weights(self.model, self.whole)
        yield self.whole
        for p in self.whole.parameters() if not self.config.scale.keep_copy else ():
            p.untyped_storage().resize_(0)

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a jsonl file of the run."""
        if self.world.leads:
            append_jsonl(self.folder / name, rows)

    def prompts_of(self, step: int, attempt: int = 0) -> list[Prompt]:
        """The prompts of a step, from the seed and the step alone: each epoch is a new order of all prompts. A later `attempt` (algo.resample)
        draws others out of turn."""
        per_step, count = self.config.algo.prompts_per_step, len(self.prompts)
        if attempt:
            drawn = np.random.default_rng([self.config.seed, step, attempt]).choice(
                count, per_step, per_step > count
            )
            return [self.prompts[i] for i in drawn]
        chosen = []
        for place in range(step * per_step, (step + 1) * per_step):
            order = np.random.default_rng([self.config.seed, place // count]).permutation(count)
            chosen.append(self.prompts[order[place % count]])
        return chosen

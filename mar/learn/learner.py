"""What learns: the policy, its optimizer, and the models beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mar.config import Config
from mar.policy.critic import Critic
from mar.policy.distributed import ALONE, World, gather_weights
from mar.policy.model import Decoder


@dataclass(frozen=True)
class Learner:
    """The policy and everything that its updates need.

    `reference`: the first policy, where there is a KL term. `critic`: the value model of PPO.
    `sampling_copy`: an unsharded copy to sample from, where the policy is sharded.
    """

    config: Config
    policy: Decoder
    optimizer: torch.optim.Optimizer
    world: World = ALONE
    reference: Decoder | None = None
    critic: Critic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    sampling_copy: Decoder | None = None

    @contextmanager
    def sampling_policy(self) -> Iterator[Decoder]:
        """The policy of this moment, in one piece."""
        copy = self.sampling_copy
        if copy is None:
            yield self.policy
            return
        gather_weights(self.policy, copy)
        yield copy
        if not self.config.scale.keep_copy:
            for parameter in copy.parameters():
                parameter.untyped_storage().resize_(0)

"""What learns: the policy, its optimizer, and the models beside it."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mar.config import Config
from mar.policy.critic import Critic
from mar.policy.distributed import ALONE, World, gather_weights
from mar.policy.model import Decoder


@dataclass(frozen=True)
class Learner:
    """The policy and everything that its updates need.

    `reference`: the first policy, where there is a KL term. `critic`: the value model of PPO.
    `sampling_copy`: an unsharded copy to sample from, where the policy is sharded. `past_weights`:
    the trained parameters before each of the last `algo.lag` steps, oldest first.
    """

    config: Config
    policy: Decoder
    optimizer: torch.optim.Optimizer
    world: World = ALONE
    reference: Decoder | None = None
    critic: Critic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    sampling_copy: Decoder | None = None
    past_weights: deque[dict[str, Tensor]] = field(default_factory=deque)

    @property
    def trained_weights(self) -> dict[str, Tensor]:
        """The parameters that are trained, or this rank's shards of them; not copies."""
        named = self.policy.named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad}

    def remember_weights(self) -> None:
        """Keep the weights of this moment, before a step changes them, for the next `algo.lag`
        steps."""
        lag = self.config.algo.lag
        if lag == 0:
            return
        if len(self.past_weights) == lag:
            self.past_weights.popleft()
        self.past_weights.append({name: p.clone() for name, p in self.trained_weights.items()})

    @contextmanager
    def lagged_policy(self) -> Iterator[Decoder]:
        """`policy`, with the weights of `algo.lag` steps ago; the first ones in the steps before.

        They trade places with those of now, tensor by tensor, and back.
        """
        if not self.past_weights:
            yield self.policy
            return
        oldest = self.past_weights[0]
        _trade(self.trained_weights, oldest)
        try:
            yield self.policy
        finally:
            _trade(self.trained_weights, oldest)

    @contextmanager
    def rollout_policy(self) -> Iterator[Decoder]:
        """What rollouts are sampled from: the policy of `algo.lag` steps ago, in one piece."""
        with self.lagged_policy(), self.sampling_policy() as policy:
            yield policy

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


def _trade(weights: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Exchange the values of two sets of tensors, in place."""
    for name, weight in weights.items():
        kept = weight.clone()
        weight.copy_(others[name])
        others[name].copy_(kept)

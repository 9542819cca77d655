"""The value model of PPO: a decoder of its own with a scalar head, started from the policy."""

import copy

from jaxtyping import Float
from torch import Tensor, nn

from mar.policy.attention import group_attention
from mar.policy.model import Decoder
from mar.policy.packing import PackedGroups


class Critic(nn.Module):
    """V(prompt and the completion so far), before each completion token.

    Starts as a copy of the policy's trunk with a head of zeros, so that V = 0 at first.
    """

    def __init__(self, policy: Decoder) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(policy)
        # the vocabulary's head has no use here
        self.trunk.head = None
        self.value = nn.Linear(policy.config.hidden_size, 1).to(policy.embed.weight)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, packed: PackedGroups) -> Float[Tensor, " m"]:
        """The value of each of the M states in which a completion token was chosen."""
        hidden = self.trunk.hidden(packed.ids, packed.positions, group_attention(packed))
        return self.value(hidden[packed.predict_from])[:, 0]

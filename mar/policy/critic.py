"""The value model of PPO: a decoder of its own with a scalar head, started from the policy, and generalised advantage estimation."""

import copy

from jaxtyping import Float
from torch import Tensor, nn

from mar.policy.attention import PackedGroups, group_attention
from mar.policy.model import Decoder


class Critic(nn.Module):
    """V(prompt and the completion so far) before each completion token. Starts with the policy's trunk and a head of zeros."""

    def __init__(self, policy: Decoder) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(policy)
        self.trunk.head = None  # the vocabulary's, unused here
        self.value = nn.Linear(policy.config.hidden_size, 1).to(policy.embed.weight)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, packed: PackedGroups) -> Float[Tensor, " m"]:
        """The value of the M states in which the completion tokens were chosen."""
        hidden = self.trunk.hidden(packed.ids, packed.positions, group_attention(packed))
        return self.value(hidden[packed.predict_from])[:, 0]

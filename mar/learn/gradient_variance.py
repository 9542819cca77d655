"""Which credit has the lower variance, measured on the rollouts of a step (algo.variance_every)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mar.errors import UserError
from mar.learn.advantages import token_advantages
from mar.learn.batch import Batch, micro_batches
from mar.learn.learner import Learner
from mar.learn.losses import policy_gradient, token_weights
from mar.learn.update import flat_columns

COMPARED = ("to_go", "set")

# what is logged -> its line in the glossary, mar/measure/README.md
MEANINGS = {
    "adv/variance_ratio": "every `algo.variance_every` steps: variance of a group's gradient with "
    "credit `to_go` over that with `set`, on the same completions (it costs two more backward "
    "passes)"
}


class GradientSpread:
    """Sum of squares of the gradients of single groups about their mean."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.total = [torch.zeros_like(p) for p in parameters]
        self.squares = 0.0
        self.num_groups = 0

    def add(self, gradient: Sequence[Tensor]) -> None:
        """Count the gradient of one group."""
        self.squares += _squared_norm(gradient)
        self.num_groups += 1
        for total, part in zip(self.total, gradient, strict=True):
            total += part

    def value(self) -> float:
        return self.squares - _squared_norm(self.total) / self.num_groups


def _squared_norm(tensors: Sequence[Tensor]) -> float:
    return sum(t.double().square().sum().item() for t in tensors)


def variance_ratio(learner: Learner, batch: Batch) -> float | None:
    """Variance of a group's policy gradient with to-go credit over that with one scalar per
    completion, on the same completions.

    Constant aggregation, no scaling. Prompts differ, and their spread is in both. None where the
    scalar has no variance. Costs two backward passes. Raises UserError for a sharded policy.
    """
    algo = learner.config.algo
    parameters = [p for p in learner.policy.parameters() if p.requires_grad]
    if any(isinstance(p, DTensor) for p in parameters):
        raise UserError(
            "algo.variance_every is for one process on a CPU, whose parameters are in one piece: "
            "set it to 0"
        )
    baseline = "leave_one_out" if algo.baseline == "value" else algo.baseline
    advantages = {credit: token_advantages(batch, credit, baseline, "none") for credit in COMPARED}
    spread = {credit: GradientSpread(parameters) for credit in COMPARED}
    for index in range(len(batch.groups)):
        group, rows = batch.take([index])
        columns = {credit: advantages[credit][rows] for credit in COMPARED}
        gradients = _group_gradients(learner, group, columns, parameters)
        for credit in COMPARED:
            spread[credit].add(gradients[credit])
    of_set = spread["set"].value()
    return spread["to_go"].value() / of_set if of_set > 0 else None


def _group_gradients(
    learner: Learner, group: Batch, advantages: dict[str, Tensor], parameters: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """The REINFORCE gradient of one group under each credit."""
    config = learner.config
    longest = config.model.max_completion_tokens
    weights = token_weights(group.loss_mask, "constant", longest)
    gradients = {credit: [torch.zeros_like(p) for p in parameters] for credit in advantages}
    for micro in micro_batches(group, config.train.micro_batch_tokens):
        logprobs = learner.policy(micro.packed, config.algo.temperature)[0]
        columns = flat_columns(micro, group, {"weights": weights, **advantages}, logprobs.dtype)
        for credit, gradient in gradients.items():
            loss = policy_gradient(logprobs, columns[credit], columns["weights"])
            parts = torch.autograd.grad(loss, parameters, retain_graph=True)
            for total, part in zip(gradient, parts, strict=True):
                total += part
    return gradients

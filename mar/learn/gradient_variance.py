"""Which credit has the lower variance, measured on the rollouts of a step (algo.variance_every)."""

import torch
from torch.distributed.tensor import DTensor

from mar.errors import UserError
from mar.learn.advantages import token_advantages
from mar.learn.batch import Batch, micro_batches
from mar.learn.learner import Job
from mar.learn.losses import reinforce, token_weights
from mar.learn.update import Logs, flat_columns


def variance_ratio(job: Job, batch: Batch) -> float | None:
    """Variance of a group's policy gradient with to-go credit over that with one scalar a completion, on the same completions (constant
    aggregation, no scaling; prompts differ, and their spread is in both). Costs two backward passes. UserError for a sharded policy."""
    algo, longest = job.config.algo, job.config.model.max_completion_tokens
    baseline = "leave_one_out" if algo.baseline == "value" else algo.baseline
    parameters = [p for p in job.model.parameters() if p.requires_grad]
    if any(isinstance(p, DTensor) for p in parameters):
        raise UserError(
            "algo.variance_every is for one process on a CPU, whose parameters are in one piece: set it to 0"
        )
    credits = ("to_go", "set")
    columns = {credit: token_advantages(batch, credit, baseline, "none") for credit in credits}
    total, square = (
        {credit: [torch.zeros_like(p) for p in parameters] for credit in credits},
        Logs(float),
    )
    for i in range(len(batch.groups)):
        part, rows = batch.take([i])
        weights = token_weights(part.loss_mask, "constant", longest)
        own = {credit: [torch.zeros_like(p) for p in parameters] for credit in credits}
        for micro in micro_batches(part, job.config.train.micro_batch_tokens):
            logprobs = job.model(micro.packed, algo.temperature)[0]
            c = flat_columns(
                micro,
                part,
                {"weights": weights, **{n: a[rows] for n, a in columns.items()}},
                logprobs.dtype,
            )
            for credit in credits:
                loss = reinforce(logprobs, c[credit], c["weights"])
                for held, g in zip(
                    own[credit],
                    torch.autograd.grad(loss, parameters, retain_graph=True),
                    strict=True,
                ):
                    held += g
        for credit in credits:
            square[credit] += sum(g.double().square().sum().item() for g in own[credit])
            for held, g in zip(total[credit], own[credit], strict=True):
                held += g
    spread = {
        c: square[c] - sum(g.double().square().sum().item() for g in total[c]) / len(batch.groups)
        for c in credits
    }
    return spread["to_go"] / spread["set"] if spread["set"] > 0 else None

"""From one rollout batch to optimizer steps: what stays fixed for the rollout, its advantages, then epochs of minibatches.

Columns are [B, T] tensors by name, next to those of the batch: `advantages`, and where the algorithm has them `old_logprobs`, `ref_logprobs`,
`values` and `returns`. Without `old_logprobs` there is one update, by the policy that sampled, and the ratio is 1.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mar.config import AlgoOptions
from mar.learn.advantages import (
    best_of_k_advantages,
    token_advantages,
    whiten,
    with_kl_cost,
    with_truncation_rule,
)
from mar.learn.batch import Batch, MicroBatch, micro_batches
from mar.learn.gae import explained_variance, gae, token_rewards
from mar.learn.learner import Job
from mar.learn.losses import (
    KL_ESTIMATORS,
    LOSSES,
    diagnostics,
    importance_weights,
    kl_k1,
    token_weights,
    value_loss,
)
from mar.learn.optim import clip_gradients, learning_rate, set_learning_rate
from mar.policy.attention import PackedGroups
from mar.policy.distributed import World

Columns = dict[str, Tensor]

Logs = defaultdict[str, float]

MAXIMA = ("ratio_max", "sampler_mismatch_max")  # of what is logged; the rest are sums


@torch.no_grad()
def one_pass(
    run: Callable[[PackedGroups], Tensor], batch: Batch, max_tokens: int, world: World
) -> Tensor:
    """What `run` says of each completion token, [B, T], zero elsewhere."""
    said = [
        (run(micro.packed).cpu(), factor)
        for micro, factor in world.deal(list(micro_batches(batch, max_tokens, world.size)))
    ]
    flat = torch.cat(world.gather([part for part, factor in said if factor])).to(
        batch.completion_mask.device
    )
    return flat.new_zeros(batch.completion_mask.shape).masked_scatter(batch.completion_mask, flat)


def rollout_columns(job: Job, batch: Batch) -> Columns:
    """Log-probabilities before the first update and of the reference, and values: each only where it is needed."""
    algo, limit, world = job.config.algo, job.config.train.micro_batch_tokens, job.world
    columns = {}
    if algo.epochs * algo.minibatches > 1:
        columns["old_logprobs"] = one_pass(
            lambda packed: job.model(packed, algo.temperature)[0], batch, limit, world
        )
    if job.reference is not None:
        reference = job.reference
        columns["ref_logprobs"] = one_pass(
            lambda packed: reference(packed, algo.temperature)[0], batch, limit, world
        )
    if job.critic:
        columns["values"] = one_pass(job.critic[0], batch, limit, world)
    return columns


def estimate(algo: AlgoOptions, batch: Batch, columns: Columns) -> Columns:
    """The advantages of the whole step, with a critic also its returns."""
    if algo.kl == "k1" and "ref_logprobs" in columns:
        old = columns.get("old_logprobs", batch.full_logprobs)
        batch = with_kl_cost(batch, kl_k1(old, columns["ref_logprobs"]), algo.kl_coef)
    if algo.pass_k > 1:
        return {"advantages": best_of_k_advantages(batch, algo.pass_k)}
    if algo.baseline != "value":
        return {"advantages": token_advantages(batch, algo.credit, algo.baseline, algo.scale_by)}
    rewards = token_rewards(batch, algo.credit)
    advantages, returns = gae(rewards, columns["values"], batch.completion_mask, algo.gae_lambda)
    if algo.scale_by == "whiten":
        advantages = whiten(advantages, batch.loss_mask) * batch.completion_mask
    return {"advantages": advantages, "returns": returns}


def prepare(job: Job, batch: Batch) -> tuple[Batch, Columns]:
    """The batch under the rule for truncated completions, and everything that its updates share."""
    algo, longest = job.config.algo, job.config.model.max_completion_tokens
    batch = with_truncation_rule(batch, algo.truncated, longest, algo.overlong_tokens)
    columns = rollout_columns(job, batch)
    return batch, columns | estimate(algo, batch, columns)


def entropy_coef(algo: AlgoOptions, step: int, num_steps: int) -> float:
    """The weight of the entropy bonus in update `step` (from 0)."""
    return algo.entropy_coef * (1 - step / num_steps if algo.entropy_decay else 1)


def policy_loss(
    algo: AlgoOptions, logprobs: Tensor, entropy: Tensor, c: Columns, bonus: float
) -> Tensor:
    """The loss of a micro-batch's tokens: the policy gradient, plus KL to the reference, minus the entropy bonus. `c` holds [M] columns."""
    weights = c["weights"]
    trusted = weights
    if algo.importance == "truncated":
        trusted = weights * importance_weights(
            c["old_logprobs"], c["sampler_logprobs"], algo.importance_cap
        )
    bounds = (algo.clip_low, algo.clip_high)
    loss = LOSSES[algo.loss](
        logprobs, c["advantages"], trusted, c["old_logprobs"], c["rows"], *bounds
    )
    if "ref_logprobs" in c and algo.kl != "k1":
        loss = (
            loss
            + algo.kl_coef * (weights * KL_ESTIMATORS[algo.kl](logprobs, c["ref_logprobs"])).sum()
        )
    if bonus:
        loss = loss - bonus * (weights * entropy).sum()
    return loss


def flat_columns(micro: MicroBatch, batch: Batch, columns: Columns, dtype: torch.dtype) -> Columns:
    """The micro-batch's part of every column, [M]."""
    mask = batch.completion_mask
    columns = columns | {
        "sampler_logprobs": batch.sampler_logprobs,
        "full_logprobs": batch.full_logprobs,
    }
    out = {name: micro.flat(column, mask).to(dtype) for name, column in columns.items()}
    own = mask[micro.rows]
    return out | {"rows": torch.arange(len(own), device=mask.device)[:, None].expand_as(own)[own]}


def _joined(world: World, logs: list[dict[str, float]]) -> Logs:
    """What the micro-batches of all ranks say, summed or the largest."""
    out = Logs(float)
    for said in world.gather(logs):
        for name, value in said.items():
            out[name] = max(out[name], value) if name in MAXIMA else out[name] + value
    return out


def _policy_pass(job: Job, batch: Batch, columns: Columns, bonus: float) -> Logs:
    """Gradients of one minibatch, in micro-batches that add up to the same whatever the cut; what is logged."""
    algo, world, logs = job.config.algo, job.world, list[dict[str, float]]()
    for micro, factor in world.deal(
        list(micro_batches(batch, job.config.train.micro_batch_tokens, world.size))
    ):
        logprobs, entropy, _ = job.model(micro.packed, algo.temperature)
        c = flat_columns(micro, batch, columns, logprobs.dtype)
        c = {"old_logprobs": logprobs.detach(), **c}
        loss = policy_loss(algo, logprobs, entropy, c, bonus)
        (factor * loss).backward()
        if not factor:
            continue
        kept = c["weights"] != 0
        said = diagnostics(logprobs, c, algo.loss == "gspo", algo.clip_low, algo.clip_high)
        said |= {"loss": loss.item(), "entropy": entropy.detach()[kept].sum().item()}
        if "ref_logprobs" in c:
            said["ref_kl"] = (
                KL_ESTIMATORS[algo.kl](logprobs.detach(), c["ref_logprobs"])[kept].sum().item()
            )
        logs.append(said)
    return _joined(world, logs)


def _critic_pass(job: Job, critic: nn.Module, batch: Batch, columns: Columns) -> Logs:
    world, logs = job.world, list[dict[str, float]]()
    for micro, factor in world.deal(
        list(micro_batches(batch, job.config.train.micro_batch_tokens, world.size))
    ):
        values = critic(micro.packed)
        c = flat_columns(micro, batch, columns, values.dtype)
        loss = value_loss(
            values, c["values"], c["returns"], c["weights"], job.config.algo.value_clip
        )
        (factor * loss).backward()
        if factor:
            logs.append({"value_loss": loss.item()})
    return _joined(world, logs)


def _apply(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: float, lr: float, clip: float
) -> tuple[float, bool]:
    """Clip and step; a loss or gradient that is not finite leaves everything as it is. Returns the norm and whether it stepped."""
    norm = clip_gradients(model, clip)
    finite = bool(np.isfinite([loss, norm]).all())
    if finite:
        set_learning_rate(optimizer, lr)
        optimizer.step()
    return norm, finite


def _minibatches(
    job: Job, batch: Batch, columns: Columns, step: int
) -> Sequence[tuple[Batch, Columns]]:
    """The parts of `batch` that each make one update: whole groups, in a new order every epoch if there are several."""
    algo, parts = job.config.algo, []
    for epoch in range(algo.epochs):
        order = np.arange(len(batch.groups))
        if algo.minibatches > 1:
            order = np.random.default_rng([job.config.seed, step, epoch]).permutation(order)
        for chosen in np.array_split(order, min(algo.minibatches, len(order))):
            part, rows = batch.take(chosen.tolist())
            weights = token_weights(
                part.loss_mask, algo.aggregation, job.config.model.max_completion_tokens
            )
            parts.append(
                (
                    part,
                    {name: column[rows] for name, column in columns.items()} | {"weights": weights},
                )
            )
    return parts


def update(job: Job, batch: Batch, columns: Columns, step: int) -> dict[str, Any]:
    """All optimizer steps of one rollout batch: algo.epochs passes of algo.minibatches updates, each with one denominator."""
    config, algo, o = job.config, job.config.algo, job.config.optim
    plan = (step, config.train.steps)
    lr, critic_lr = (
        learning_rate(*plan, rate, o.warmup_frac, o.schedule) for rate in (o.lr, algo.critic_lr)
    )
    logs, skipped = [], 0
    for part, own in _minibatches(job, batch, columns, step):
        sums = Logs(float)
        if step >= algo.critic_warmup:
            job.optimizer.zero_grad()
            sums = _policy_pass(job, part, own, entropy_coef(algo, *plan))
            sums["grad_norm"], finite = _apply(
                job.model, job.optimizer, sums["loss"], lr, o.grad_clip
            )
            skipped += not finite
        if job.critic:
            critic, optimizer = job.critic
            optimizer.zero_grad()
            sums |= _critic_pass(job, critic, part, own)
            sums["critic_grad_norm"], finite = _apply(
                critic, optimizer, sums["value_loss"], critic_lr, o.grad_clip
            )
            skipped += not finite
        logs.append(sums)
    return _metrics(job, batch, columns, logs) | {"optim/lr": lr, "optim/skipped": skipped}


def _metrics(job: Job, batch: Batch, columns: Columns, logs: Sequence[Logs]) -> dict[str, Any]:
    """Means over the tokens of all updates, of losses and norms over the updates, and maxima."""
    num = max(sum(sums["num"] for sums in logs), 1)
    by_update = {"policy/loss": "loss", "optim/grad_norm": "grad_norm"}
    by_token = {
        f"policy/{name}": name for name in ("entropy", "approx_kl", "clip_frac", "sampler_kl")
    }
    if job.reference is not None:
        by_token["policy/ref_kl"] = "ref_kl"
    out: dict[str, Any] = {}
    if job.critic:
        by_update |= {"value/loss": "value_loss", "optim/critic_grad_norm": "critic_grad_norm"}
        seen = [columns[name][batch.loss_mask].double() for name in ("values", "returns")]
        out["value/explained_variance"] = explained_variance(*seen)
    out |= {key: sum(sums[name] for sums in logs) / len(logs) for key, name in by_update.items()}
    out |= {key: sum(sums[name] for sums in logs) / num for key, name in by_token.items()}
    return out | {f"policy/{name}": max(sums[name] for sums in logs) for name in MAXIMA}

"""From a batch of rollouts to optimizer steps.

First what stays fixed for the whole batch is computed once (`compute_advantages`), then `update`
makes the optimizer steps: `algo.epochs` passes of `algo.minibatches` updates.

Columns are [B, T] tensors by name, beside those of the batch: `advantages`, and where the algorithm
has them `old_logprobs`, `ref_logprobs`, `values` and `returns`. Without `old_logprobs` there is one
update, and the ratio is 1. `old_logprobs_1` and so on are those of later epochs that pack the groups
in another order.

With `algo.lag` the policy that sampled is an older one. Something has to account for that:

    importance=none   the ratio of the loss: `old_logprobs` are those of the policy that sampled
    another           the importance weight, from the sampler to the policy before the first update;
                      the ratio of the loss is to that policy (decoupled PPO, arXiv:2110.00641)
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mar.config import AlgoOptions, Config
from mar.learn.advantages import (
    best_of_k_advantages,
    token_advantages,
    whiten,
    with_kl_cost,
    with_truncation_rule,
)
from mar.learn.batch import Batch, MicroBatch, micro_batches
from mar.learn.gae import explained_variance, gae, token_rewards
from mar.learn.learner import Learner
from mar.learn.losses import (
    IMPORTANCE,
    KL_ESTIMATORS,
    LARGEST,
    LOSSES,
    TOKEN_MEAN,
    UPDATE_MEAN,
    ImportanceInputs,
    Logged,
    LossInputs,
    diagnostics,
    kl_k1,
    options_of,
    token_weights,
    value_loss,
)
from mar.learn.optim import clip_gradients, learning_rate, set_learning_rate
from mar.policy.distributed import World, reshard
from mar.policy.packing import PackedGroups

Columns = dict[str, Tensor]
Logs = dict[str, Logged]

# what updates log, beside what losses.py does -> its line in the glossary, mar/measure/README.md
MEANINGS = {
    "policy/loss": "the policy-gradient loss",
    "policy/entropy": "mean token entropy, in nats",
    "policy/ref_kl": "KL to the reference (with `algo.kl_coef`)",
    "value/loss": "the critic's loss",
    "value/explained_variance": "share of the variance of the returns that the critic explains",
    "optim/grad_norm": "gradient norm before clipping",
    "optim/critic_grad_norm": "gradient norm of the critic before clipping",
    "optim/lr": "learning rate",
    "optim/skipped": "updates left out because something was not finite",
}


# --- once per batch --------------------------------------------------------------------------


def compute_advantages(learner: Learner, batch: Batch, step: int) -> tuple[Batch, Columns]:
    """The advantages of update step `step` (from 0), with everything else that its updates share.

    Returns the batch under the rule for truncated completions (algo.truncated changes masks or
    rewards), and the columns: `advantages` and what they are computed from.
    """
    config = learner.config
    algo = config.algo
    longest = config.model.max_completion_tokens
    batch = with_truncation_rule(batch, algo.truncated, longest, algo.overlong_tokens)
    columns = score_before_updates(learner, batch, step)
    return batch, columns | advantage_columns(algo, batch, columns)


def score_before_updates(learner: Learner, batch: Batch, step: int) -> Columns:
    """Log-probabilities before the first update and of the reference, and values: each only where
    it is needed. With `algo.lag` and without importance weights the old log-probabilities are those
    of the policy that sampled.

    They are computed in the very micro-batches of the updates. In low precision a token's
    log-probability depends on what it is packed with, by more than the bounds of GSPO's ratio. An
    epoch that packs anew has log-probabilities before the first update of its own.
    """
    config = learner.config
    algo = config.algo
    max_tokens = config.train.micro_batch_tokens

    def scores(model: nn.Module, run: Callable[[PackedGroups], Tensor], epoch: int) -> Tensor:
        parts = minibatch_groups(config, len(batch.groups), step, epoch)
        taken = [batch.take(chosen) for chosen in parts]
        columns = [one_pass(run, part, max_tokens, learner.world) for part, _ in taken]
        reshard(model)
        of_all = columns[0].new_zeros(batch.completion_mask.shape)
        for column, (_, rows) in zip(columns, taken, strict=True):
            of_all[rows] = column
        return of_all

    def logprobs(model: nn.Module, epoch: int = 0) -> Tensor:
        return scores(model, lambda packed: model(packed, algo.temperature)[0], epoch)

    columns = {}
    ratio_to_sampler = algo.lag > 0 and algo.importance == "none"
    several_updates = algo.epochs * algo.minibatches > 1
    # The KL cost is that of the policy before this step; with `algo.lag` an older one has sampled.
    kl_in_reward = algo.lag > 0 and algo.kl == "k1" and learner.reference is not None
    if ratio_to_sampler or several_updates or kl_in_reward:
        older = learner.lagged_policy() if ratio_to_sampler else nullcontext(learner.policy)
        with older as policy:
            for epoch in range(algo.epochs):
                name = _old_logprobs_of(epoch, algo)
                if name not in columns:
                    columns[name] = logprobs(policy, epoch)
    if learner.reference is not None:
        columns["ref_logprobs"] = logprobs(learner.reference)
    if learner.critic is not None:
        columns["values"] = scores(learner.critic, learner.critic, epoch=0)
    return columns


def minibatch_groups(config: Config, num_groups: int, step: int, epoch: int) -> list[list[int]]:
    """The groups of each minibatch of an epoch: where there are several, in a new order every epoch."""
    algo = config.algo
    order = np.arange(num_groups)
    if algo.minibatches > 1:
        order = np.random.default_rng([config.seed, step, epoch]).permutation(order)
    num_parts = min(algo.minibatches, num_groups)
    return [chosen.tolist() for chosen in np.array_split(order, num_parts)]


def _old_logprobs_of(epoch: int, algo: AlgoOptions) -> str:
    """The column of the log-probabilities before the first update in the packing of this epoch."""
    if epoch == 0 or algo.minibatches == 1:
        return "old_logprobs"
    return f"old_logprobs_{epoch}"


@torch.no_grad()
def one_pass(
    run: Callable[[PackedGroups], Tensor], batch: Batch, max_tokens: int, world: World
) -> Tensor:
    """What `run` returns for each completion token, as [B, T] with zeros elsewhere."""
    mask = batch.completion_mask
    mine = []
    for micro, factor in world.deal(list(micro_batches(batch, max_tokens, world.size))):
        values = run(micro.packed).cpu()
        if factor:
            mine.append(values)
    flat = torch.cat(world.gather(mine)).to(mask.device)
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def advantage_columns(algo: AlgoOptions, batch: Batch, columns: Columns) -> Columns:
    """The advantages of the whole step; with a critic also its returns."""
    if algo.kl == "k1" and "ref_logprobs" in columns:
        old_logprobs = columns.get("old_logprobs", batch.full_logprobs)
        kl = kl_k1(old_logprobs, columns["ref_logprobs"])
        batch = with_kl_cost(batch, kl, algo.kl_coef)
    if algo.pass_k > 1:
        return {"advantages": best_of_k_advantages(batch, algo.pass_k)}
    if algo.baseline != "value":
        return {"advantages": token_advantages(batch, algo.credit, algo.baseline, algo.scale_by)}
    rewards = token_rewards(batch, algo.credit)
    values = columns["values"]
    advantages, returns = gae(rewards, values, batch.completion_mask, algo.gae_lambda)
    if algo.scale_by == "whiten":
        advantages = whiten(advantages, batch.loss_mask) * batch.completion_mask
    return {"advantages": advantages, "returns": returns}


# --- the updates -----------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, columns: Columns, step: int) -> dict[str, Any]:
    """All optimizer steps of one batch, each with one denominator. Returns what is logged."""
    config = learner.config
    algo = config.algo
    optim = config.optim
    num_steps = config.train.steps
    lr = learning_rate(step, num_steps, optim.lr, optim.warmup_frac, optim.schedule)
    critic_lr = learning_rate(step, num_steps, algo.critic_lr, optim.warmup_frac, optim.schedule)
    bonus = entropy_coef(algo, step, num_steps)
    learner.remember_weights()

    logs: list[Logs] = []
    skipped = 0
    for minibatch, own_columns in _minibatches(learner, batch, columns, step):
        of_update: Logs = {"optim/grad_norm": Logged(0.0, UPDATE_MEAN)}
        if step >= algo.critic_warmup:
            learner.optimizer.zero_grad()
            of_update |= _policy_gradients(learner, minibatch, own_columns, bonus)
            loss = of_update["policy/loss"].value
            norm, finite = _clip_and_step(
                learner.policy, learner.optimizer, loss, lr, optim.grad_clip
            )
            of_update["optim/grad_norm"] = Logged(norm, UPDATE_MEAN)
            skipped += not finite
        if learner.critic is not None and learner.critic_optimizer is not None:
            learner.critic_optimizer.zero_grad()
            of_update |= _critic_gradients(learner, learner.critic, minibatch, own_columns)
            loss = of_update["value/loss"].value
            norm, finite = _clip_and_step(
                learner.critic, learner.critic_optimizer, loss, critic_lr, optim.grad_clip
            )
            of_update["optim/critic_grad_norm"] = Logged(norm, UPDATE_MEAN)
            skipped += not finite
        logs.append(of_update)
    metrics = _mean_over_updates(logs, int(batch.loss_mask.sum()) * algo.epochs)
    if learner.critic is not None:
        values = columns["values"][batch.loss_mask].double()
        returns = columns["returns"][batch.loss_mask].double()
        metrics["value/explained_variance"] = explained_variance(values, returns)
    return metrics | {"optim/lr": lr, "optim/skipped": skipped}


def entropy_coef(algo: AlgoOptions, step: int, num_steps: int) -> float:
    """The weight of the entropy bonus in update `step` (from 0)."""
    if algo.entropy_decay:
        return algo.entropy_coef * (1 - step / num_steps)
    return algo.entropy_coef


def entropy_weights(algo: AlgoOptions, batch: Batch, weights: Tensor) -> Tensor:
    """What the entropy of each token counts in the bonus, [B, T]: of all, or of confidences alone.

    `weights` [B, T]: what each token counts in the loss.
    """
    if algo.entropy_of == "tokens":
        return weights
    return weights * batch.confidence_segments.gather(1, batch.segment_ids)


def _minibatches(
    learner: Learner, batch: Batch, columns: Columns, step: int
) -> Sequence[tuple[Batch, Columns]]:
    """The parts of `batch` that make one update each: whole groups; where there are several parts,
    in a new order every epoch."""
    config = learner.config
    algo = config.algo
    longest = config.model.max_completion_tokens
    shared = {name: column for name, column in columns.items() if "old_logprobs" not in name}
    parts = []
    for epoch in range(algo.epochs):
        of_epoch = dict(shared)
        if "old_logprobs" in columns:
            of_epoch["old_logprobs"] = columns[_old_logprobs_of(epoch, algo)]
        for chosen in minibatch_groups(config, len(batch.groups), step, epoch):
            part, rows = batch.take(chosen)
            own_columns = {name: column[rows] for name, column in of_epoch.items()}
            weights = token_weights(part.loss_mask, algo.aggregation, longest)
            own_columns["weights"] = weights
            own_columns["entropy_weights"] = entropy_weights(algo, part, weights)
            parts.append((part, own_columns))
    return parts


def _policy_gradients(learner: Learner, batch: Batch, columns: Columns, bonus: float) -> Logs:
    """Gradients of one minibatch, in micro-batches that add up to the same however it is cut."""
    config = learner.config
    algo = config.algo
    world = learner.world
    max_tokens = config.train.micro_batch_tokens
    logs: list[Logs] = []
    for micro, factor in world.deal(list(micro_batches(batch, max_tokens, world.size))):
        logprobs, entropy, _ = learner.policy(micro.packed, algo.temperature)
        # Without old log-probabilities they are those of this policy, and the ratio is 1.
        flat = {"old_logprobs": logprobs.detach()}
        flat |= flat_columns(micro, batch, columns, logprobs.dtype)
        loss, logged = policy_loss(algo, logprobs, entropy, flat, bonus)
        (factor * loss).backward()
        if factor:
            logs.append({f"policy/{name}": entry for name, entry in logged.items()})
    return _add_up(world, logs)


def flat_columns(micro: MicroBatch, batch: Batch, columns: Columns, dtype: torch.dtype) -> Columns:
    """The micro-batch's part of every column, [M]; `rows` says which completion a token is of."""
    mask = batch.completion_mask
    sampled = {"sampler_logprobs": batch.sampler_logprobs, "full_logprobs": batch.full_logprobs}
    flat = {}
    for name, column in (columns | sampled).items():
        flat[name] = micro.flat(column, mask).to(dtype)
    own_mask = mask[micro.rows]
    row_of_token = torch.arange(len(own_mask), device=mask.device)[:, None].expand_as(own_mask)
    flat["rows"] = row_of_token[own_mask]
    return flat


def policy_loss(
    algo: AlgoOptions, logprobs: Tensor, entropy: Tensor, columns: Columns, bonus: float
) -> tuple[Tensor, Logs]:
    """The loss of a micro-batch's tokens: the policy gradient, plus KL to the reference, minus the
    entropy bonus; and what is logged of it. All columns are [M]."""
    weights = columns["weights"]
    counted = weights != 0
    inputs = LossInputs(
        logprobs=logprobs,
        advantages=columns["advantages"],
        weights=weights * _trust(algo, columns),
        old_logprobs=columns["old_logprobs"],
        rows=columns["rows"],
        clip_low=algo.clip_low,
        clip_high=algo.clip_high,
        options=loss_options(algo),
        trained=counted,
    )
    loss, logged = LOSSES[algo.loss](inputs)
    if "ref_logprobs" in columns:
        kl = KL_ESTIMATORS[algo.kl](logprobs, columns["ref_logprobs"])
        logged["ref_kl"] = Logged(kl.detach()[counted].sum().item(), TOKEN_MEAN)
        if algo.kl != "k1":
            loss = loss + algo.kl_coef * (weights * kl).sum()
    if bonus:
        loss = loss - bonus * (columns["entropy_weights"] * entropy).sum()
    logged["loss"] = Logged(loss.item(), UPDATE_MEAN)
    logged["entropy"] = Logged(entropy.detach()[counted].sum().item(), TOKEN_MEAN)
    logged |= diagnostics(
        logprobs,
        columns["old_logprobs"],
        columns["sampler_logprobs"],
        columns["full_logprobs"],
        weights,
    )
    return loss, logged


def loss_options(algo: AlgoOptions) -> dict[str, float]:
    """The loss's own hyper-parameters: those of algo.loss_options, else the defaults."""
    defaults = {name: option.default for name, option in options_of(LOSSES[algo.loss]).items()}
    return defaults | algo.loss_options


def _trust(algo: AlgoOptions, columns: Columns) -> Tensor:
    """The importance weight of each token, [M]."""
    inputs = ImportanceInputs(
        old_logprobs=columns["old_logprobs"],
        sampler_logprobs=columns["sampler_logprobs"],
        weights=columns["weights"],
        rows=columns["rows"],
        cap=algo.importance_cap,
        low=algo.importance_low,
        high=algo.importance_high,
        by_sequence=algo.importance_level == "sequence",
    )
    return IMPORTANCE[algo.importance](inputs)


def _critic_gradients(learner: Learner, critic: nn.Module, batch: Batch, columns: Columns) -> Logs:
    config = learner.config
    world = learner.world
    max_tokens = config.train.micro_batch_tokens
    logs: list[Logs] = []
    for micro, factor in world.deal(list(micro_batches(batch, max_tokens, world.size))):
        values = critic(micro.packed)
        flat = flat_columns(micro, batch, columns, values.dtype)
        loss = value_loss(
            values, flat["values"], flat["returns"], flat["weights"], config.algo.value_clip
        )
        (factor * loss).backward()
        if factor:
            logs.append({"value/loss": Logged(loss.item(), UPDATE_MEAN)})
    return _add_up(world, logs)


def _clip_and_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: float, lr: float, max_norm: float
) -> tuple[float, bool]:
    """Clip the gradients and step. A loss or gradient that is not finite leaves everything as it
    is. Returns the gradient norm before clipping, and whether it stepped."""
    norm = clip_gradients(model, max_norm)
    finite = bool(np.isfinite([loss, norm]).all())
    if finite:
        set_learning_rate(optimizer, lr)
        optimizer.step()
    return norm, finite


def _add_up(world: World, logs: list[Logs]) -> Logs:
    """What the micro-batches of all ranks log, as one: sums, or the largest."""
    joined: Logs = {}
    for of_micro_batch in world.gather(logs):
        for name, entry in of_micro_batch.items():
            joined[name] = _both(joined[name], entry) if name in joined else entry
    return joined


def _both(a: Logged, b: Logged) -> Logged:
    value = max(a.value, b.value) if a.adds_up == LARGEST else a.value + b.value
    return Logged(value, a.adds_up)


def _mean_over_updates(logs: Sequence[Logs], num_tokens: int) -> dict[str, Any]:
    """The metrics of all updates of a step. What an update did not log counts as 0.

    num_tokens: trained tokens, counted once for each pass over the batch.
    """
    kinds = {name: entry.adds_up for of_update in logs for name, entry in of_update.items()}
    metrics: dict[str, Any] = {}
    for name, adds_up in kinds.items():
        values = [of_update[name].value for of_update in logs if name in of_update]
        if adds_up == LARGEST:
            metrics[name] = max(values)
        elif adds_up == UPDATE_MEAN:
            metrics[name] = sum(values) / len(logs)
        else:
            metrics[name] = sum(values) / max(num_tokens, 1)
    return metrics

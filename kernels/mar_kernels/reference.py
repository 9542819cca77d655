"""The specification of every kernel, in plain PyTorch and bounded in memory.

Letters: M trained tokens, V vocabulary, D width; B rows, T tokens, C components, S segments; of
decoding, P prompt slots, G members of a prompt, H query heads, KV key heads, d = head_dim.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

# the largest block of logits ever held: 8 MiB in float32, which a cache holds between two passes
BLOCK_ELEMENTS = 1 << 21

# tall blocks read the weight, the largest operand, the fewest times
BLOCK_ROWS = 1 << 12

# A log-probability below this stands for a probability of exactly 0. Its product with that 0 is
# then 0, and not the NaN of 0 * -inf.
LEAST = -1e4


def _blocks(num_rows: int, vocab_size: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each block of the [M, V] logits, row after row of blocks."""
    height = max(1, min(num_rows, BLOCK_ROWS, BLOCK_ELEMENTS))
    width = max(1, BLOCK_ELEMENTS // height)
    for top, left in product(range(0, num_rows, height), range(0, vocab_size, width)):
        rows = slice(top, min(top + height, num_rows))
        columns = slice(left, min(left + width, vocab_size))
        yield rows, columns


def _targets_in_block(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """The column of each target within the block, and whether it lies inside: [M], [M] bool.

    Where it does not, the column is any of the block.
    """
    column = targets - columns.start
    width = columns.stop - columns.start
    inside = (column >= 0) & (column < width)
    return column.clamp(0, width - 1), inside


class _LinearLogprobs(torch.autograd.Function):
    """The logits are computed block by block, once for the outputs and again for the gradients.

    Of each row's logits the forward pass keeps over the blocks so far (online softmax,
    arXiv:1805.02867):

        top     the largest
        total   sum of e = exp(z) with z = logit - top
        moment  sum of e z
        chosen  the target's

    From these:

        lse = top + log(total)
        entropy = log(total) - moment / total
        logprob = chosen - lse
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows = hidden.shape[0]
        vocab_size = weight.shape[0]
        precise = torch.promote_types(hidden.dtype, torch.float32)
        scaled = hidden.to(precise) / temperature
        top = scaled.new_full((num_rows,), torch.finfo(precise).min)
        total = scaled.new_zeros(num_rows)
        moment = scaled.new_zeros(num_rows)
        chosen = scaled.new_zeros(num_rows)

        for rows, columns in _blocks(num_rows, vocab_size):
            logits = scaled[rows] @ weight[columns].to(precise).T
            column, inside = _targets_in_block(targets[rows], columns)
            at_target = logits.gather(1, column[:, None]).squeeze(1)
            chosen[rows] = torch.where(inside, at_target, chosen[rows])

            new_top = torch.maximum(top[rows], logits.amax(1))
            z = logits.sub_(new_top[:, None]).clamp_(min=LEAST)
            e = z.exp()
            # the sums so far, brought from the old top to the new one
            fall = top[rows] - new_top
            old_moment = (moment[rows] + fall * total[rows]) * fall.exp()
            old_total = total[rows] * fall.exp()
            moment[rows] = old_moment + torch.linalg.vecdot(e, z)
            total[rows] = old_total + e.sum(1)
            top[rows] = new_top

        lse = top + total.log()
        entropy = total.log() - moment / total
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature = temperature
        # an output that nobody uses costs nothing in backward
        ctx.set_materialize_grads(False)
        return chosen - lse, entropy, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, None, None]:
        """Through the logits z, with p their softmax and `onehot` that of the target:

        d logprob / dz = onehot - p
        d lse / dz     = p
        d entropy / dz = -p (log p + entropy)
        """
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        scaled = hidden.to(lse.dtype) / ctx.temperature
        grad_hidden = torch.zeros_like(scaled)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=lse.dtype)

        # what multiplies onehot, and what multiplies p
        zero = torch.zeros_like(lse)
        of_target = zero if grad_logprobs is None else grad_logprobs
        of_lse = zero if grad_lse is None else grad_lse
        of_probs = of_lse - of_target

        for rows, columns in _blocks(hidden.shape[0], weight.shape[0]):
            head = weight[columns].to(lse.dtype)
            logprobs = (scaled[rows] @ head.T).sub_(lse[rows, None]).clamp_(min=LEAST)
            # the probabilities, which become the gradient in place
            grad_logits = logprobs.exp()
            if grad_entropy is None:
                grad_logits.mul_(of_probs[rows, None])
            else:
                slope = logprobs.add_(entropy[rows, None]).mul_(-grad_entropy[rows, None])
                grad_logits.mul_(slope.add_(of_probs[rows, None]))
            column, inside = _targets_in_block(targets[rows], columns)
            at_target = torch.where(inside, of_target[rows], 0)
            grad_logits.scatter_add_(1, column[:, None], at_target[:, None])

            grad_hidden[rows].addmm_(grad_logits, head)
            if grad_weight is not None:
                grad_weight[columns].addmm_(grad_logits.T, scaled[rows])

        grad_hidden = grad_hidden.div_(ctx.temperature).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of `targets`, entropy and log-sum-exp, without the logits in memory.

    Of softmax(hidden @ weight.T / temperature): hidden [M, D], weight [V, D], targets [M] int64
    -> three tensors [M] of float32 or wider, in nats, differentiable in hidden and weight.

    The [M, V] logits never exist: forward and backward hold one block of at most `BLOCK_ELEMENTS`,
    and compute 2 M V D and 6 M V D FLOPs. A token of logit -inf has probability 0 and no gradient.
    NaN in an input or in a gradient from above comes out as NaN.
    """
    return _LinearLogprobs.apply(hidden, weight, targets, temperature)


def selected_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log_softmax(logits [M, V]) at targets [M] -> [M], without all the other log-probabilities."""
    return logits.gather(-1, targets[:, None]).squeeze(-1) - torch.logsumexp(logits, dim=-1)


# --- decoding -----------------------------------------------------------------------------------


class LayerCache(NamedTuple):
    """The keys and values of one layer in decoding: each prompt's once, each row's own.

    A row's own tokens are the first `own_lengths` of its slot. It reads the prompt slot
    `row_prompt`, where it is the member `member_index`. A row is free, and reads no
    prompt, if `members[row_prompt, member_index]` is another row. `members` is padded with row 0.
    """

    prompt_keys: Tensor  # [P, KV, tokens, d]
    prompt_values: Tensor
    own_keys: Tensor  # [B, KV, tokens, d]
    own_values: Tensor
    prompt_lengths: Tensor  # [P] int64, and so are the others
    own_lengths: Tensor  # [B]
    row_prompt: Tensor  # [B]
    members: Tensor  # [P, G]
    member_index: Tensor  # [B]


def decode_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    """Attention of one new token per row to its prompt, its own tokens, and itself.

    q [B, H, d]; k, v [B, KV, d] -> [B, H, d], in their type. k and v are stored behind the row's
    own tokens; `own_lengths` stays. Scores are scaled by 1 / sqrt(d), and nothing but weights and
    result is rounded to bfloat16. Without gradients.

    This is what the kernels compute, written down: it repeats each prompt for all its rows. What a
    CPU runs does not (mar.sample.kv_cache).
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    rows = torch.arange(len(q), device=q.device)
    cache.own_keys[rows, :, cache.own_lengths] = k
    cache.own_values[rows, :, cache.own_lengths] = v

    is_member = cache.members[cache.row_prompt, cache.member_index] == rows
    prompt_lengths = cache.prompt_lengths[cache.row_prompt] * is_member
    of_prompt = torch.arange(cache.prompt_keys.shape[2], device=q.device)
    of_row = torch.arange(cache.own_keys.shape[2], device=q.device)
    seen = torch.cat(
        (of_prompt < prompt_lengths[:, None], of_row <= cache.own_lengths[:, None]), 1
    )[:, None, :, None]  # [B, 1, tokens, 1]
    keys = torch.cat((cache.prompt_keys[cache.row_prompt], cache.own_keys), 2).to(precise)
    values = torch.cat((cache.prompt_values[cache.row_prompt], cache.own_values), 2).to(precise)
    # what is not seen may be anything, NaN too
    keys = keys.masked_fill(~seen, 0.0)
    values = values.masked_fill(~seen, 0.0)

    # query heads by the key head that they share
    queries = q.to(precise).unflatten(1, (k.shape[1], -1))
    scores = queries @ keys.mT * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen.mT, -torch.inf).softmax(-1)
    mixed = weights.to(q.dtype).to(precise) @ values
    return mixed.flatten(1, 2).to(q.dtype)


def rotated_heads(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_queries: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Query and key heads [N, H + KV, d] of N tokens with their norm and rotary positions.

    The first `num_queries` heads are the queries. RMSNorm of each head, by q_weight and k_weight
    [d]; None: without. Then channels i and i + d / 2 are turned as a pair (Hugging Face's order):
    cos, sin [N, 1, d], the first half of sin negated. Rounded as the operators round. Without
    gradients.
    """
    if q_weight is not None and k_weight is not None:
        num_keys = heads.shape[1] - num_queries
        gains = torch.cat((q_weight.expand(num_queries, -1), k_weight.expand(num_keys, -1)))
        heads = F.rms_norm(heads, heads.shape[-1:], eps=eps) * gains
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


# --- advantages ---------------------------------------------------------------------------------
#
# Letters: B completions, C components, S segments, T tokens. Components stand in the order in which
# they are decided, the last one at the very end. first_open[b, s] is the first component that is
# still undecided when segment s begins, C where none is.


@dataclass(frozen=True)
class Decided:
    """What a credit rule may look at."""

    components: Tensor  # [B, C], weighted
    first_open: Tensor  # [B, S]
    # [B, C] bool: decided where a confidence closes, and not where an answer does
    confidence_components: Tensor
    # [B, S] bool: the segment writes a confidence, or thinks about them (<analysis>)
    confidence_segments: Tensor


def to_go(decided: Decided) -> Tensor:
    """What is decided in the segment or later. Unbiased."""
    return _sum_from(decided.components).gather(1, decided.first_open)


def whole_set(decided: Decided) -> Tensor:
    """Everything: one number per completion. Unbiased, with more noise."""
    return _sum_from(decided.components)[:, :1].expand(-1, decided.first_open.shape[1])


def own(decided: Decided) -> Tensor:
    """What the segment itself decides, plus the last component.

        a segment that decides components start .. end - 1   their sum, plus the last component
        one that decides none, or only the last component    all that is still to come, as `to_go`

    Biased: it ignores what an answer does to later ones.
    """
    components = decided.components
    first_open = decided.first_open
    num_components = components.shape[1]
    last = torch.full_like(first_open, num_components - 1)
    sum_from = _sum_from(components)
    # What a segment decides ends where the next segment's first open component begins.
    none_open = torch.full_like(first_open[:, :1], num_components)
    end = torch.cat([first_open[:, 1:], none_open], dim=1)
    still_to_go = sum_from.gather(1, first_open)
    last_value = sum_from.gather(1, last)
    this_and_last = components.gather(1, first_open.clamp(max=num_components - 1)) + last_value
    several = still_to_go - sum_from.gather(1, torch.minimum(end, last)) + last_value
    decided_here = torch.where(end == first_open + 1, this_and_last, several)
    decides = (end > first_open) & (first_open < last)
    return torch.where(decides, decided_here, still_to_go)


def decoupled(decided: Decided) -> Tensor:
    """What is still to come of the segment's own kind, plus the last component.

        a segment that writes a confidence   what confidences decide from here on
        any other                            what answers decide from here on

    Biased: an answer is not paid for how well its confidence can be said. The separation of DCPO
    (arXiv:2603.09117): tokens of reasoning and answer have the reward of the answer, tokens of the
    confidence have that of the confidence, each with an advantage of its own, and neither sees the
    other's. The last component, which looks at the whole text, is paid to both.

    `own` differs in two ways. It gives a token the one answer or confidence that it belongs to,
    here an answer has what later answers earn, too. And it gives thoughts, which decide nothing,
    the errors of the confidences, which here only confidences pay for. What else DCPO does is not a
    rule of credit: each of the two rewards is divided by its own spread (`scale_by=term_std`), and
    a confidence is compared with the mean of the verdict and the group's share of right answers.
    """
    of_confidence = decided.confidence_components
    no_reward = torch.zeros_like(decided.components)
    of_answers = torch.where(of_confidence, no_reward, decided.components)
    of_confidences = torch.where(of_confidence, decided.components, no_reward)
    for_answers = _sum_from(of_answers).gather(1, decided.first_open)
    for_confidences = _sum_from(of_confidences).gather(1, decided.first_open)
    for_confidences = for_confidences + of_answers[:, -1:]
    return torch.where(decided.confidence_segments, for_confidences, for_answers)


# name -> what a token of segment s is credited with: Decided -> [B, S]
# A rule must be linear in the components, or its baseline means nothing.
CreditRule = Callable[[Decided], Tensor]
CREDITS: dict[str, CreditRule] = {
    "to_go": to_go,
    "set": whole_set,
    "own": own,
    "decoupled": decoupled,
}


def _sum_from(components: Tensor) -> Tensor:
    """[B, C + 1]: the sum of everything decided from component c on; nothing for c = C."""
    num_rows, num_components = components.shape
    sums = components.new_zeros(num_rows, num_components + 1)
    sums[:, :num_components] = components.flip(1).cumsum(1).flip(1)
    return sums


@dataclass(frozen=True)
class Compared:
    """What a baseline may look at."""

    credit: str  # the name of the credit rule
    credited: Tensor  # [B, S] by that rule
    components: Tensor  # [B, C]
    first_open: Tensor  # [B, S]
    group_ids: Tensor  # [B] which prompt a completion belongs to


def leave_one_out(compared: Compared) -> Tensor:
    """The mean of the other completions of the group; 0 for one that has none."""
    credited = compared.credited
    sums = _group_sums(credited, compared.group_ids)
    counts = _group_sums(credited.new_ones(len(credited), 1), compared.group_ids)
    return (sums - credited) / (counts - 1).clamp(min=1)


def group_mean(compared: Compared) -> Tensor:
    """The mean of the group: (G - 1) / G of the advantage under `leave_one_out`."""
    credited = compared.credited
    counts = _group_sums(credited.new_ones(len(credited), 1), compared.group_ids)
    return _group_sums(credited, compared.group_ids) / counts


def no_baseline(compared: Compared) -> Tensor:
    return torch.zeros_like(compared.credited)


def matched(compared: Compared) -> Tensor:
    """The mean of the other completions of the group that have hit as much so far.

        hit_i[c]  sum of the positive components before c. Costs do not count: a confidence's error
                  is a number of its own in every completion, and nobody would match
        matches   the completions j != i with hit_j[c] = hit_i[c], c the first open component;
                  if nobody matches, all j != i

    With credit `to_go` this is unbiased: what i has hit is its past, and the rewards of the others
    do not depend on i's next token (a reward term that looks at the group breaks that). It takes
    out the noise that the past explains: after a hit on the only label nothing more can be hit, and
    the confidence of a right answer is compared with confidences of right answers.
    """
    if compared.credit == "set":
        # `set` counts from the first token on, before which nobody has hit anything: all match.
        return leave_one_out(compared)
    members, is_member = _rows_of_groups(compared.group_ids)
    hit = F.pad(compared.components.clamp(min=0).cumsum(1), (1, 0))
    # Compared exactly: equal hits are the same numbers, added in the same order.
    past = hit.gather(1, compared.first_open)[members]  # [P, G, S]
    values = compared.credited[members]  # [P, G, S]

    # masks [P, G, G, S] over (group, completion i, completion j, segment)
    is_self = torch.eye(is_member.shape[1], dtype=torch.bool, device=members.device)
    is_other = (is_member[:, None] & ~is_self)[..., None]
    same_past = (past[:, :, None] == past[:, None]) & is_other
    has_match = same_past.any(2, keepdim=True)
    matches = torch.where(has_match, same_past, is_other).to(values)

    means = torch.einsum("pijs,pjs->pis", matches, values) / matches.sum(2).clamp(min=1)
    out = torch.empty_like(compared.credited)
    return out.index_copy_(0, members[is_member], means[is_member])


# name -> what a token is compared with: Compared -> [B, S]
Baseline = Callable[[Compared], Tensor]
BASELINES: dict[str, Baseline] = {
    "leave_one_out": leave_one_out,
    "matched": matched,
    "mean": group_mean,
    "none": no_baseline,
}


def no_scale(totals: Tensor, group_ids: Tensor) -> Tensor:
    return torch.ones_like(totals)


def group_std(totals: Tensor, group_ids: Tensor) -> Tensor:
    """The standard deviation of the group's rewards (GRPO, arXiv:2402.03300). Biased."""
    counts = _group_sums(torch.ones_like(totals), group_ids)
    deviations = totals - _group_sums(totals, group_ids) / counts
    variance = _group_sums(deviations**2, group_ids) / (counts - 1).clamp(min=1)
    return _divisor(variance.sqrt())


def batch_std(totals: Tensor, group_ids: Tensor) -> Tensor:
    """The standard deviation of all rewards."""
    deviations = totals - totals.mean()
    variance = (deviations**2).sum() / max(len(totals) - 1, 1)
    return _divisor(variance.sqrt()).expand(len(totals))


def group_mean_reward(totals: Tensor, group_ids: Tensor) -> Tensor:
    """MaxRL, A = (r - mean) / mean (arXiv:2602.02710), for rewards of 0 and 1: with the group's mean
    as baseline. A group that earned nothing has no gradient, and rewards must not be negative."""
    counts = _group_sums(torch.ones_like(totals), group_ids)
    means = _group_sums(totals, group_ids) / counts
    return torch.where(means > 1e-6, means, torch.full_like(means, torch.inf))


def _divisor(std: Tensor) -> Tensor:
    # Totals can all agree where components do not: then there is nothing to divide by.
    return torch.where(std > 1e-4, std + 1e-4, torch.ones_like(std))


# name -> what the advantages of a completion are divided by: (totals [B], group_ids [B]) -> [B]
Scale = Callable[[Tensor, Tensor], Tensor]
SCALES: dict[str, Scale] = {
    "none": no_scale,
    "group_std": group_std,
    "batch_std": batch_std,
    "group_mean": group_mean_reward,
}


def answer_advantages(
    components: Tensor,
    weights: Tensor,
    first_open: Tensor,
    segment_ids: Tensor,
    group_ids: Tensor,
    credit: str = "to_go",
    baseline: str = "leave_one_out",
    scale: str = "none",
    token_costs: Tensor | None = None,
    confidence_components: Tensor | None = None,
    confidence_segments: Tensor | None = None,
) -> Tensor:
    """One advantage per token [B, T] from the reward components of each completion.

        A_t = (credit_s - cost_t - baseline_s) / scale,   s the segment of token t

    components   [B, C] in the order in which they are decided, the last one at the very end
    weights      [C]
    first_open   [B, S] the first component that is still undecided when segment s begins
    segment_ids  [B, T] the segment of each token
    group_ids    [B] which prompt a completion belongs to
    token_costs  [B, T] what single tokens cost beside the components, or None

    credit is a name of CREDITS, baseline of BASELINES, scale of SCALES. Raises ValueError for any
    other, and for a rule whose shape is not [B, S]. confidence_components [B, C] and
    confidence_segments [B, S] are those of `Decided`; where they are left out, nothing is of a
    confidence.

    cost_t is what token t and those after it cost, with every credit: a token cannot change what
    earlier ones have cost. A baseline compares what a segment is credited with, less what it and
    those after it cost, and a scale looks at what is earned in all, less all costs.
    """
    weighted = components * weights
    if confidence_components is None:
        confidence_components = torch.zeros_like(components, dtype=torch.bool)
    if confidence_segments is None:
        confidence_segments = torch.zeros_like(first_open, dtype=torch.bool)
    decided = Decided(weighted, first_open, confidence_components, confidence_segments)
    credited = _named(CREDITS, "credit", credit)(decided)
    _require_shape(credited, first_open, "credit", credit)
    totals = weighted.sum(1)
    if token_costs is not None:
        of_segment, before_token = _costs_to_go(token_costs, segment_ids, first_open.shape[1])
        credited = credited - of_segment
        totals = totals - token_costs.sum(1)
    compared = Compared(credit, credited, weighted, first_open, group_ids)
    expected = _named(BASELINES, "baseline", baseline)(compared)
    _require_shape(expected, first_open, "baseline", baseline)
    advantages = (credited - expected).gather(1, segment_ids)
    if token_costs is not None:
        advantages = advantages + before_token
    if scale != "none":
        advantages = advantages / _named(SCALES, "scale", scale)(totals, group_ids)[:, None]
    return advantages


def _costs_to_go(
    token_costs: Tensor, segment_ids: Tensor, num_segments: int
) -> tuple[Tensor, Tensor]:
    """What the tokens of each segment and of all later ones cost [B, S]; and of the segment of each
    token what the tokens before it have cost [B, T].

    What token t and those after it cost is the first, at its segment, less the second.
    """
    of_each = token_costs.new_zeros(len(token_costs), num_segments)
    of_each = of_each.scatter_add(1, segment_ids, token_costs)
    of_segment = of_each.flip(1).cumsum(1).flip(1)
    to_go = token_costs.flip(1).cumsum(1).flip(1)
    return of_segment, of_segment.gather(1, segment_ids) - to_go


Rule = TypeVar("Rule")


def _named(rules: Mapping[str, Rule], kind: str, name: str) -> Rule:
    if name not in rules:
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(rules)}")
    return rules[name]


def _require_shape(found: Tensor, segments: Tensor, kind: str, name: str) -> None:
    """A rule has one number for each segment: another shape would be read as if it had."""
    if found.shape != segments.shape:
        raise ValueError(
            f"{kind} {name!r} gives {list(found.shape)}: it must give one number for each segment, "
            f"[B, S] = {list(segments.shape)}"
        )


def _group_sums(values: Tensor, group_ids: Tensor) -> Tensor:
    """For each row of values [B, ...], the sum over the rows of its group."""
    num_groups = 0
    if len(group_ids) > 0:
        num_groups = int(group_ids.max()) + 1
    sums = values.new_zeros(num_groups, *values.shape[1:]).index_add_(0, group_ids, values)
    return sums[group_ids]


def _rows_of_groups(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each group [P, G], G the size of the largest, and which entries are rows.

    A smaller group is padded with row 0.
    """
    order = group_ids.argsort(stable=True)
    sizes = group_ids.bincount()
    sizes = sizes[sizes > 0]
    is_member = torch.arange(int(sizes.max()), device=group_ids.device) < sizes[:, None]
    members = torch.zeros_like(is_member, dtype=torch.int64).masked_scatter(is_member, order)
    return members, is_member

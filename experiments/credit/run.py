"""Every gradient estimator against the exact policy gradient, without sampling.

    python experiments/credit/run.py [--quick] [--answers 4]

A tabular softmax policy writes two answers with confidences, one token a step. All of its
completions are enumerated, also malformed, truncated, repeating and shorter ones, and with them
all ordered groups of G. Rewards, credit, advantages, weights and losses are the project's own
functions; only the probability of each group, a factor on its weights, comes from here. The last
line of stdout is one JSON document.

Shapes: n completions, S states of the policy, A actions of a state, T tokens, G completions of a
group, n^G groups.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.common.tables import markdown_table
from mar.answers.grammar import Grammar
from mar.answers.rewards import (
    RewardSpec,
    confidence_components,
    confidence_segments,
    first_open,
)
from mar.learn.advantages import (
    best_of_k_advantages,
    token_advantages,
    with_kl_cost,
    with_truncation_rule,
)
from mar.learn.batch import Batch, make_batch
from mar.learn.losses import LOSSES, LossInputs, kl_k1, token_weights
from mar.policy.sources import environment
from mar.records import Completion, Example, Gold, Prompt, Rollout
from mar.sample.rollout import Scorer, judge_groups

MAX_TOKENS = 5
RESULTS = Path(__file__).with_name("results.json")
GATED = RewardSpec(sum_rule=True, duplicates="gate")
UNGATED = RewardSpec(gate=False)
FORMAT_GATED = RewardSpec()
KL_COEF = 0.1

# An em space, cut between its bytes.
HALVES = (b"\xe2\x80", b"\x83")


@dataclass(frozen=True)
class Estimator:
    """One row of the table.

    An estimator that is not `biased` is compared after its stated scale: (G - 1)/G for the mean
    baseline and 1 for the others, over the longest completion. A biased one is compared after its
    best factor.
    """

    credit: str = "to_go"
    baseline: str = "leave_one_out"
    scale_by: str = "none"
    aggregation: str = "constant"
    loss: str = "reinforce"
    # The mean reward (`mean`), with a KL cost (`kl`), or the best of two (`best`).
    target: str = "mean"
    truncated: str = "keep"
    resample: bool = False
    biased: bool = False


ESTIMATORS = {
    "to_go": Estimator(),
    "set": Estimator("set"),
    "to_go, matched baseline": Estimator(baseline="matched"),
    "to_go, ppo loss": Estimator(loss="ppo"),
    "to_go, gspo loss": Estimator(loss="gspo"),
    "to_go, cispo loss": Estimator(loss="cispo"),
    "to_go, mean baseline": Estimator(baseline="mean"),
    "set, mean baseline": Estimator("set", "mean"),
    "to_go, no baseline": Estimator(baseline="none"),
    "set, no baseline": Estimator("set", "none"),
    "to_go, overlong penalised": Estimator(truncated="penalise"),
    "to_go, KL k1 in the reward": Estimator(target="kl"),
    "to_go, matched baseline, KL k1": Estimator(baseline="matched", target="kl"),
    "set, KL k1 in the reward": Estimator("set", target="kl"),
    "set, no baseline, KL k1": Estimator("set", "none", target="kl"),
    "set, mean baseline, KL k1": Estimator("set", "mean", target="kl"),
    "set, best of 2": Estimator("set", target="best"),
    "own": Estimator("own", biased=True),
    "own, matched baseline": Estimator("own", "matched", biased=True),
    "decoupled": Estimator("decoupled", biased=True),
    "to_go, token_mean": Estimator(aggregation="token_mean", biased=True),
    "to_go, sequence_mean": Estimator(aggregation="sequence_mean", biased=True),
    "set, token_mean": Estimator("set", aggregation="token_mean", biased=True),
    "to_go, group_std": Estimator(scale_by="group_std", biased=True),
    "set, group_std": Estimator("set", "mean", "group_std", biased=True),
    "set, overlong masked": Estimator("set", truncated="mask", biased=True),
    "to_go, dynamic sampling": Estimator(resample=True, biased=True),
}


class Toy:
    """The policy and all n completions.

    `answers` x `confidences` choices in each of two slots; `well_formed` is the log-odds against a
    break of the form. With `halves` (interleaved) some tokens end inside a character, which is a
    space where the next token completes it, and a breach of the form where none does.
    """

    def __init__(
        self,
        layout: str,
        spec: RewardSpec,
        answers: int = 4,
        confidences: int = 3,
        well_formed: float = 1.0,
        halves: bool = False,
    ):
        self.grammar = Grammar("rlcr_multi", 2, layout, thinking=False)
        self.spec = spec
        names = [chr(ord("a") + i) for i in range(answers)]
        levels = (0.5, 0.9, 0.1)[:confidences]
        # What may stand in each slot; the last choice is not well-formed.
        answer1 = [f"<answer1>{name}</answer1>".encode() for name in names]
        answer1.append(b"so: ")  # a break that ends the completion
        confidence1 = [f"<confidence1>{q}</confidence1>".encode() for q in levels]
        confidence1.append(b"<confidence1>50%</confidence1>")  # a break after which it goes on
        answer2 = [f"<answer2>{name}</answer2>".encode() for name in names]
        answer2.append(b"")  # stops early
        confidence2 = [f"<confidence2>{q}</confidence2>".encode() for q in levels]
        confidence2.append(b"<confidence2>0.")  # runs into the length limit
        end = [b"", b"bye"]  # the stop token, or text that trails
        if halves:
            first, second = HALVES
            confidence1.insert(0, confidence1[0] + first)
            answer2.insert(0, second + answer2[0])
            confidence2.insert(0, confidence2[0] + first)
            end.append(second)
        if layout == "interleaved":
            self.steps = [answer1, confidence1, answer2, confidence2, end]
        else:
            self.steps = [answer1, answer2, confidence1, confidence2, end]
        self.ends = {b"so: ", b"", b"<confidence2>0.", b"bye", HALVES[1]}
        self.texts = [text for step in self.steps for text in step]
        self.offsets = np.cumsum([0, *map(len, self.steps)])
        self._enumerate()
        self._draw_logits(well_formed)
        self._index()

    def _enumerate(self) -> None:
        """Every prefix, each a state of the policy, and every completion as its actions."""
        self.prefixes: dict[tuple[int, ...], int] = {}
        self.sequences: list[tuple[int, ...]] = []
        frontier: list[tuple[int, ...]] = [()]
        for step in self.steps:
            longer = []
            for prefix in frontier:
                self.prefixes[prefix] = len(self.prefixes)
                for action, text in enumerate(step):
                    if text in self.ends:
                        self.sequences.append((*prefix, action))
                    else:
                        longer.append((*prefix, action))
            frontier = longer

    def _draw_logits(self, well_formed: float) -> None:
        """Random logits [S, A]; `well_formed` is added to all choices of a state but the last."""
        rng = np.random.default_rng(0)
        width = max(map(len, self.steps))
        logits = np.full((len(self.prefixes), width), -np.inf)
        for prefix, state in self.prefixes.items():
            size = len(self.steps[len(prefix)])
            keeps_form = np.arange(size) < size - 1
            logits[state, :size] = rng.normal(size=size) + well_formed * keeps_form
        last_step = len(self.steps) - 1
        last = [state for prefix, state in self.prefixes.items() if len(prefix) == last_step]
        # At the end the stop token stands first.
        logits[last, 0] += well_formed
        logits[last, 1] -= well_formed
        self.logits = torch.from_numpy(logits).requires_grad_()

    def _index(self) -> None:
        """The state before each token and the action that it is, both [n, T], 0 where padded."""
        shape = len(self.sequences), len(self.steps)
        self.states = torch.zeros(shape, dtype=torch.int64)
        self.actions = torch.zeros(shape, dtype=torch.int64)
        for i, actions in enumerate(self.sequences):
            states = [self.prefixes[actions[:t]] for t in range(len(actions))]
            self.states[i, : len(actions)] = torch.tensor(states)
            self.actions[i, : len(actions)] = torch.tensor(actions)

    def rollouts(self) -> list[Rollout]:
        golds = (Gold("a"), Gold("b"))
        prompt = Prompt(Example("toy", "toy", "?", golds, multi_label=True), "?", np.array([0]))
        with torch.no_grad():
            columns = self.logprobs().numpy()
        done = []
        for i, actions in enumerate(self.sequences):
            ids = np.array([self.offsets[t] + a for t, a in enumerate(actions)])
            reason = {b"": "stop", b"<confidence2>0.": "length"}.get(
                self.texts[ids[-1]], "stop_string"
            )
            drawn = columns[i, : len(ids)].copy()
            done.append(Completion(i, ids, drawn, drawn, reason))
        return judge_groups(
            [prompt], [done], Scorer(self.grammar, self.spec, "text", self._decode)
        )[0]

    def _decode(self, ids: tuple[int, ...]) -> str:
        return b"".join(self.texts[i] for i in ids).decode("utf-8", "replace")

    def logprobs(self) -> Tensor:
        """[n, T], of the padding too."""
        return self.logits.log_softmax(-1)[self.states, self.actions]

    @cached_property
    def batch(self) -> Batch:
        """All completions, each as a group of its own."""
        of_confidence = (
            confidence_components(self.grammar, self.spec),
            confidence_segments(self.grammar),
        )
        return make_batch(
            [[r] for r in self.rollouts()],
            first_open(self.grammar, self.spec),
            of_confidence=of_confidence,
        )

    @cached_property
    def reference(self) -> Tensor:
        """Log-probabilities of another policy [n, T]."""
        noise = torch.from_numpy(np.random.default_rng(1).normal(size=self.logits.shape))
        return (0.5 * self.logits.detach() + 0.5 * noise).log_softmax(-1)[self.states, self.actions]

    def exact(self, estimator: Estimator) -> Tensor:
        """The gradient of the expected objective in the logits [S, A].

        By differentiating the enumerated expectation.
        """
        rule = "keep" if estimator.biased else estimator.truncated
        kept = with_truncation_rule(self.batch, rule, MAX_TOKENS, 0)
        mask = kept.completion_mask
        rewards = kept.totals
        logprobs = self.logprobs()
        # The probability of each completion [n].
        chance = torch.where(mask, logprobs, 0.0).sum(1).exp()
        if estimator.target == "best":
            # The expected maximum of two, whatever G is.
            best = torch.maximum(rewards[:, None], rewards)
            value = (chance[:, None] * chance * best).sum()
        elif estimator.target == "kl":
            cost = torch.where(mask, logprobs - self.reference, 0.0).sum(1)
            value = (chance * (rewards - KL_COEF * cost)).sum()
        else:
            value = (chance * rewards).sum()
        return torch.autograd.grad(value, self.logits)[0]


@dataclass(frozen=True)
class Groups:
    """All ordered groups of G completions as one batch: rows [n^G * G], and the probability of each
    group.
    """

    rows: Tensor
    batch: Batch
    chance: Tensor

    @classmethod
    def of(cls, toy: Toy, size: int) -> "Groups":
        choices = torch.arange(len(toy.sequences))
        rows = torch.cartesian_prod(*[choices] * size).reshape(-1)
        batch, _ = toy.batch.take(rows.tolist())
        group_ids = torch.arange(len(rows) // size).repeat_interleave(size)
        with torch.no_grad():
            of_completion = torch.where(toy.batch.completion_mask, toy.logprobs(), 0.0).sum(1).exp()
        of_group = of_completion[rows].reshape(-1, size).prod(1)
        return cls(rows, replace(batch, group_ids=group_ids), of_group)


def weights_of(mask: Tensor, aggregation: str, size: int) -> Tensor:
    """token_weights of every group as its own step.

    With `token_mean`, groups with as many tokens have the same denominator, so they are weighted
    together.
    """
    if aggregation != "token_mean":
        num_groups = len(mask) // size
        return token_weights(mask, aggregation, MAX_TOKENS).double() * num_groups
    num_tokens = mask.reshape(-1, size * mask.shape[1]).sum(1).repeat_interleave(size)
    weights = torch.zeros(mask.shape, dtype=torch.float64)
    for count in num_tokens.unique():
        rows = num_tokens == count
        num_groups = len(mask[rows]) // size
        weights[rows] = token_weights(mask[rows], aggregation, MAX_TOKENS) * num_groups
    return weights


def best_of_two_advantages(batch: Batch, size: int) -> Tensor:
    """Advantages of the best of two [rows, T], computed once for each different tuple of rewards."""
    of_groups = batch.totals.reshape(-1, size)
    values, index = torch.unique(of_groups, dim=0, return_inverse=True)
    one_each, _ = batch.take(range(len(values) * size))
    one_each = replace(
        one_each,
        components=values.reshape(-1, 1),
        group_ids=torch.arange(len(values)).repeat_interleave(size),
        completion_mask=torch.ones_like(one_each.completion_mask),
    )
    scalars = best_of_k_advantages(one_each, 2)[:, 0].reshape(-1, size)[index]
    return scalars.reshape(-1, 1) * batch.completion_mask


def advantages_of(e: Estimator, toy: Toy, groups: Groups, batch: Batch, size: int) -> Tensor:
    if e.target == "best":
        return best_of_two_advantages(batch, size)
    if e.target == "kl":
        cost = kl_k1(batch.full_logprobs, toy.reference[groups.rows])
        batch = with_kl_cost(batch, cost, KL_COEF)
    return token_advantages(batch, e.credit, e.baseline, e.scale_by)


def measure(e: Estimator, toy: Toy, groups: Groups, size: int) -> dict[str, float | bool]:
    """Cosine and relative error of the expected estimate, and the variance of one group's.

    Error and variance are in units of the exact gradient.
    """
    batch = with_truncation_rule(groups.batch, e.truncated, MAX_TOKENS, 0)
    advantages = advantages_of(e, toy, groups, batch, size)
    chance = groups.chance
    if e.resample:
        totals = batch.totals.reshape(-1, size)
        chance = chance * (totals != totals[:, :1]).any(1)
        chance = chance / chance.sum()
    mask = batch.completion_mask
    weights = weights_of(batch.loss_mask, e.aggregation, size)
    with torch.no_grad():
        old = toy.logprobs()[groups.rows][mask]
    leaf = old.clone().requires_grad_()
    row_ids = torch.arange(len(mask))[:, None].expand_as(mask)[mask]
    loss, _ = LOSSES[e.loss](LossInputs(leaf, advantages[mask], weights[mask], old, row_ids))
    (slope,) = torch.autograd.grad(loss, leaf)
    # What the estimate multiplies each token's score with, [rows, T].
    coefficients = torch.zeros(mask.shape, dtype=torch.float64)
    coefficients = coefficients.masked_scatter(mask, -slope)

    # The expected estimate: over all groups with their probabilities, added up per completion.
    weighted = coefficients * chance.repeat_interleave(size)[:, None]
    per_completion = torch.zeros(len(toy.sequences), mask.shape[1], dtype=torch.float64)
    per_completion.index_add_(0, groups.rows, weighted)
    surrogate = (per_completion * toy.logprobs() * toy.batch.completion_mask).sum()
    (mean,) = torch.autograd.grad(surrogate, toy.logits)

    exact = toy.exact(e)
    product = (mean * exact).sum()
    cosine = (product / (mean.norm() * exact.norm())).item()
    if e.biased:
        scale = (product / exact.square().sum()).item()
    elif e.baseline == "mean":
        scale = (size - 1) / size / MAX_TOKENS
    else:
        scale = 1 / MAX_TOKENS
    second_moment = (chance * squared_norms(coefficients, toy, groups, size)).sum().item()
    variance = second_moment - mean.square().sum().item()
    return {
        "biased": e.biased,
        "cosine": cosine,
        "relative_error": ((mean / scale - exact).norm() / exact.norm()).item(),
        "variance": variance / scale**2,
    }


def squared_norms(coefficients: Tensor, toy: Toy, groups: Groups, size: int) -> Tensor:
    """|gradient|^2 of each group [n^G].

    The gradient of log pi(a|s) in the logits of state s is e_a - pi, so this is the sum of
    c c' (e_a - pi) (e_a' - pi) over pairs of tokens in the same state, with
    (e_a - pi) (e_a' - pi) = [a = a'] - pi_a - pi_a' + |pi|^2.
    """
    T = coefficients.shape[1]
    # All [n^G, G, T].
    states = toy.states[groups.rows].reshape(-1, size, T)
    actions = toy.actions[groups.rows].reshape(-1, size, T)
    mask = groups.batch.completion_mask.reshape(-1, size, T)
    c = coefficients.reshape(-1, size, T)

    policy = toy.logits.detach().softmax(-1)
    chosen = policy[states, actions]
    square = policy.square().sum(-1)[states]
    total = torch.zeros(len(c), dtype=torch.float64)
    for i, j in itertools.product(range(size), repeat=2):
        same_state = (states[:, i] == states[:, j]) & mask[:, i] & mask[:, j]
        same_action = (actions[:, i] == actions[:, j]).double()
        product = same_action - chosen[:, i] - chosen[:, j] + square[:, i]
        total += (same_state * c[:, i] * c[:, j] * product).sum(1)
    return total


def report(
    toy: Toy, size: int, chosen: Sequence[str] = tuple(ESTIMATORS)
) -> dict[str, dict[str, float | bool]]:
    """What `measure` says of the chosen estimators."""
    groups = Groups.of(toy, size)
    assert math.isclose(groups.chance.sum().item(), 1.0, rel_tol=1e-12)
    return {name: measure(ESTIMATORS[name], toy, groups, size) for name in chosen}


def facts(toy: Toy) -> dict[str, float]:
    """How much of the policy's mass is of each kind."""
    with torch.no_grad():
        chance = torch.where(toy.batch.completion_mask, toy.logprobs(), 0.0).sum(1).exp().tolist()
    rows = [group[0] for group in toy.batch.groups]

    def mass(kind: Callable[[Rollout], bool]) -> float:
        return sum(p for p, r in zip(chance, rows, strict=True) if kind(r))

    return {
        "num_completions": len(rows),
        "well_formed": mass(lambda r: r.reason is None),
        "truncated": mass(lambda r: r.completion.finish_reason == "length"),
        "repeating": mass(lambda r: any(r.repeated)),
    }


def cases(quick: bool, answers: int) -> list[tuple[str, Toy, int]]:
    """Name, policy and group size of each case."""

    def toy(layout: str, spec: RewardSpec, well_formed: float = 1.0) -> Toy:
        return Toy(layout, spec, answers, well_formed=well_formed)

    found = [
        ("interleaved, all gates", toy("interleaved", GATED), 2),
        ("interleaved, no gate", toy("interleaved", UNGATED), 2),
        (
            "interleaved, all gates, characters cut in two",
            Toy("interleaved", GATED, 2, 1, halves=True),
            2,
        ),
        (
            "interleaved, no gate, characters cut in two",
            Toy("interleaved", UNGATED, 2, 1, halves=True),
            2,
        ),
    ]
    if quick:
        return found
    mostly = ", mostly well-formed"
    return [
        *found,
        ("interleaved, format gate only", toy("interleaved", FORMAT_GATED), 2),
        (f"interleaved, format gate only{mostly}", toy("interleaved", FORMAT_GATED, 4.0), 2),
        ("split, all gates", toy("split", GATED), 2),
        ("split, no gate", toy("split", UNGATED), 2),
        (f"interleaved, all gates{mostly}", toy("interleaved", GATED, 4.0), 2),
        (f"interleaved, no gate{mostly}", toy("interleaved", UNGATED, 4.0), 2),
        ("interleaved, all gates, G=3", Toy("interleaved", GATED, 2, 1), 3),
    ]


def expectation() -> str:
    """README's first table: cosine / relative error / variance; biased estimators in italics."""
    cases = json.loads(RESULTS.read_text())["cases"]
    names = [
        "interleaved, all gates",
        "interleaved, no gate",
        "split, all gates",
        "split, no gate",
    ]
    rows = []
    for estimator, first in cases[names[0]]["estimators"].items():
        cells = []
        for name in names:
            row = cases[name]["estimators"][estimator]
            cosine, error, variance = row["cosine"], row["relative_error"], row["variance"]
            cells.append(f"{cosine:.4f} / {error:.0e} / {variance:.2f}")
        shown = f"*{estimator}*" if first["biased"] else estimator
        rows.append([shown, *cells])
    return markdown_table(["estimator", *names], rows)


def variances() -> str:
    """README's second table."""
    header = ["case", "well-formed", "truncated", "repeating", "completions"]
    rows = []
    for name, case in json.loads(RESULTS.read_text())["cases"].items():
        shares = [f"{case[share]:.3f}" for share in ("well_formed", "truncated", "repeating")]
        num_completions = str(case["num_completions"])
        rows.append([name, *shares, num_completions, f"{case['variance_ratio']:.3f}"])
    return markdown_table([*header, "variance to_go / set"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="the two interleaved cases only, at most 60 s"
    )
    parser.add_argument("--answers", type=int, default=4, help="different answers of a slot")
    args = parser.parse_args()
    began = time.perf_counter()
    document = {}
    for name, toy, size in cases(args.quick, args.answers):
        # Of these only the variance of two estimators is wanted.
        few = "only" in name or (args.quick and name == "interleaved, no gate")
        chosen = ("to_go", "set") if few else tuple(ESTIMATORS)
        rows = report(toy, size, chosen)
        ratio = rows["to_go"]["variance"] / rows["set"]["variance"]
        seen = facts(toy)
        document[name] = {
            "group_size": size,
            **seen,
            "variance_ratio": ratio,
            "estimators": rows,
        }
        about = ", ".join(f"{key} {value:.3g}" for key, value in seen.items())
        print(f"\n{name} (G={size}; {about}; variance to_go/set {ratio:.3f})\n")
        print(table(rows))
    whole = {
        "commit": environment()["commit"],
        "seconds": round(time.perf_counter() - began, 1),
        "cases": document,
    }
    if not args.quick and args.answers == 4:
        RESULTS.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


def table(rows: dict[str, dict[str, float | bool]]) -> str:
    """The estimators of one case."""
    lines = []
    for estimator, row in rows.items():
        kind = "biased" if row["biased"] else "exact"
        lines.append(
            [
                estimator,
                kind,
                f"{row['cosine']:.6f}",
                f"{row['relative_error']:.1e}",
                f"{row['variance']:.4f}",
            ]
        )
    return markdown_table(["estimator", "expected", "cosine", "relative_error", "variance"], lines)


if __name__ == "__main__":
    main()

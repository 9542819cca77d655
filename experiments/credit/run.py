"""Every gradient estimator against the exact policy gradient, without sampling:  python experiments/credit/run.py [--quick] [--answers 4]

A tabular softmax policy writes two answers with confidences, one token a step. All of its completions are enumerated, also malformed, truncated,
repeating and shorter ones, and with them all ordered groups of G. Rewards, credit, advantages, weights and losses are the project's own functions;
only the probability of each group, a factor on its weights, is put in here. The last line of stdout is one JSON document.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.claims.summary import grid
from mar.answers.grammar import Grammar
from mar.answers.rewards import RewardSpec, first_open
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
KL_COEF = 0.1


@dataclass(frozen=True)
class Estimator:
    """One row of the table. An estimator that is not `biased` has a stated scale, (G - 1)/G for the mean baseline and 1 for the others, over the
    longest completion; a biased one is compared after its best factor."""

    credit: str = "to_go"
    baseline: str = "leave_one_out"
    scale_by: str = "none"
    aggregation: str = "constant"
    loss: str = "reinforce"
    target: str = "mean"  # of rewards, with a KL cost, or the best of two: `mean`, `kl`, `best`
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
    "set, best of 2": Estimator("set", target="best"),
    "own": Estimator("own", biased=True),
    "own, matched baseline": Estimator("own", "matched", biased=True),
    "to_go, token_mean": Estimator(aggregation="token_mean", biased=True),
    "to_go, sequence_mean": Estimator(aggregation="sequence_mean", biased=True),
    "set, token_mean": Estimator("set", aggregation="token_mean", biased=True),
    "to_go, group_std": Estimator(scale_by="group_std", biased=True),
    "set, group_std": Estimator("set", "mean", "group_std", biased=True),
    "set, overlong masked": Estimator("set", truncated="mask", biased=True),
    "to_go, dynamic sampling": Estimator(resample=True, biased=True),
}


class Toy:
    """The policy and all n completions. `answers` x `confidences` choices in each of two slots; `well_formed` is the log-odds against a break."""

    def __init__(
        self,
        layout: str,
        spec: RewardSpec,
        answers: int = 4,
        confidences: int = 3,
        well_formed: float = 1.0,
    ):
        self.grammar, self.spec = Grammar("rlcr_multi", 2, layout, thinking=False), spec
        written = [
            [f"<answer{k}>{chr(97 + i)}</answer{k}>" for i in range(answers)] for k in (1, 2)
        ]
        levels = (0.5, 0.9, 0.1)[:confidences]
        said = [[f"<confidence{k}>{q}</confidence{k}>" for q in levels] for k in (1, 2)]
        a, b, c, d = (
            [*written[0], "so: "],  # a break that ends the completion
            [*said[0], "<confidence1>50%</confidence1>"],  # a break after which it goes on
            [*written[1], ""],  # stops early
            [*said[1], "<confidence2>0."],  # runs into the length limit
        )
        self.steps = [a, b, c, d] if layout == "interleaved" else [a, c, b, d]
        self.steps.append(["", "bye"])  # the stop token, or text that trails
        self.ends = {"so: ", "", "<confidence2>0.", "bye"}
        self.texts = [text for step in self.steps for text in step]
        self.offsets = np.cumsum([0, *map(len, self.steps)])
        self._enumerate(well_formed)

    def _enumerate(self, well_formed: float) -> None:
        rng, width = np.random.default_rng(0), max(map(len, self.steps))
        self.prefixes: dict[tuple[int, ...], int] = {}
        self.sequences: list[tuple[int, ...]] = []
        frontier: list[tuple[int, ...]] = [()]
        for step in self.steps:
            grown = []
            for prefix in frontier:
                self.prefixes[prefix] = len(self.prefixes)
                for action, text in enumerate(step):
                    (self.sequences if text in self.ends else grown).append((*prefix, action))
            frontier = grown
        logits = np.full((len(self.prefixes), width), -np.inf)
        for prefix, state in self.prefixes.items():
            size = len(self.steps[len(prefix)])
            logits[state, :size] = rng.normal(size=size) + well_formed * (
                np.arange(size) < size - 1
            )
        last = [
            state for prefix, state in self.prefixes.items() if len(prefix) == len(self.steps) - 1
        ]
        logits[last, 0] += well_formed  # the stop token stands first
        logits[last, 1] -= well_formed
        self.logits = torch.from_numpy(logits).requires_grad_()
        T = len(self.steps)
        self.states, self.actions = (
            torch.zeros(len(self.sequences), T, dtype=torch.int64) for _ in range(2)
        )
        for i, actions in enumerate(self.sequences):
            self.states[i, : len(actions)] = torch.tensor(
                [self.prefixes[actions[:t]] for t in range(len(actions))]
            )
            self.actions[i, : len(actions)] = torch.tensor(actions)

    def rollouts(self) -> list[Rollout]:
        golds = (Gold("a"), Gold("b"))
        prompt = Prompt(Example("toy", "toy", "?", golds, multi_label=True), "?", (0,))
        with torch.no_grad():
            columns = self.logprobs().numpy()
        done = []
        for i, actions in enumerate(self.sequences):
            ids = np.array([self.offsets[t] + a for t, a in enumerate(actions)])
            reason = {"": "stop", "<confidence2>0.": "length"}.get(
                self.texts[ids[-1]], "stop_string"
            )
            drawn = columns[i, : len(ids)].copy()
            done.append(Completion(i, ids, drawn, drawn, reason))
        return judge_groups(
            [prompt], [done], Scorer(self.grammar, self.spec, "text", self._decode)
        )[0]

    def _decode(self, ids: tuple[int, ...]) -> str:
        return "".join(self.texts[i] for i in ids)

    def logprobs(self) -> Tensor:
        """[n, T], of the padding too."""
        return self.logits.log_softmax(-1)[self.states, self.actions]

    @cached_property
    def batch(self) -> Batch:
        """All completions, each as a group of its own."""
        return make_batch([[r] for r in self.rollouts()], first_open(self.grammar, self.spec))

    @cached_property
    def reference(self) -> Tensor:
        """Log-probabilities of another policy [n, T]."""
        noise = torch.from_numpy(np.random.default_rng(1).normal(size=self.logits.shape))
        return (0.5 * self.logits.detach() + 0.5 * noise).log_softmax(-1)[self.states, self.actions]

    def exact(self, estimator: Estimator) -> Tensor:
        """The gradient of the expected objective in the logits [S, A], by differentiating the enumerated expectation."""
        kept = with_truncation_rule(
            self.batch, estimator.truncated if not estimator.biased else "keep", MAX_TOKENS, 0
        )
        mask, rewards = kept.completion_mask, kept.totals
        logprobs = self.logprobs()
        chance = torch.where(mask, logprobs, 0.0).sum(1).exp()  # [n]
        if estimator.target == "best":
            value = (
                chance[:, None] * chance * torch.maximum(rewards[:, None], rewards)
            ).sum()  # E[max of 2], any G
        elif estimator.target == "kl":
            cost = (torch.where(mask, logprobs - self.reference, 0.0)).sum(1)
            value = (chance * (rewards - KL_COEF * cost)).sum()
        else:
            value = (chance * rewards).sum()
        return torch.autograd.grad(value, self.logits)[0]


@dataclass(frozen=True)
class Groups:
    """All ordered groups of G completions as one batch: rows [n^G * G], and the probability of each group."""

    rows: Tensor
    batch: Batch
    chance: Tensor

    @classmethod
    def of(cls, toy: Toy, size: int) -> "Groups":
        n = len(toy.sequences)
        rows = torch.cartesian_prod(*[torch.arange(n)] * size).reshape(-1)
        every = range(n)
        batch, _ = toy.batch.take([every[i] for i in rows.tolist()])
        group_ids = torch.arange(len(rows) // size).repeat_interleave(size)
        with torch.no_grad():
            own = torch.where(toy.batch.completion_mask, toy.logprobs(), 0.0).sum(1).exp()
        return cls(rows, replace(batch, group_ids=group_ids), own[rows].reshape(-1, size).prod(1))


def weights_of(mask: Tensor, aggregation: str, size: int) -> Tensor:
    """token_weights of every group as its own step: groups with as many tokens have the same denominator, so they are weighted together."""
    totals = mask.reshape(-1, size * mask.shape[1]).sum(1).repeat_interleave(size)
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for count in totals.unique() if aggregation == "token_mean" else [None]:
        rows = slice(None) if count is None else totals == count
        out[rows] = token_weights(mask[rows], aggregation, MAX_TOKENS) * (len(mask[rows]) // size)
    return out


def advantages_of(e: Estimator, toy: Toy, groups: Groups, batch: Batch, size: int) -> Tensor:
    if e.target == "best":
        pairs = batch.totals.reshape(-1, size)  # once for each different tuple of rewards
        values, index = torch.unique(pairs, dim=0, return_inverse=True)
        few = replace(
            batch.take(range(len(values) * size))[0],
            components=values.reshape(-1, 1),
            group_ids=torch.arange(len(values)).repeat_interleave(size),
        )
        few = replace(few, completion_mask=torch.ones_like(few.completion_mask))
        scalars = best_of_k_advantages(few, 2)[:, 0].reshape(-1, size)[index]
        return scalars.reshape(-1, 1) * batch.completion_mask
    if e.target == "kl":
        batch = with_kl_cost(batch, kl_k1(batch.full_logprobs, toy.reference[groups.rows]), KL_COEF)
    return token_advantages(batch, e.credit, e.baseline, e.scale_by)


def measure(e: Estimator, toy: Toy, groups: Groups, size: int) -> dict[str, float | bool]:
    """Cosine and relative error of the expectation, and the variance of one group's estimate, both in units of the exact gradient."""
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
    coefficients = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(
        mask, -slope
    )  # [rows, T]
    weighted = coefficients * chance.repeat_interleave(size)[:, None]
    per_completion = torch.zeros(len(toy.sequences), mask.shape[1], dtype=torch.float64)
    per_completion.index_add_(0, groups.rows, weighted)
    (mean,) = torch.autograd.grad(
        (per_completion * toy.logprobs() * toy.batch.completion_mask).sum(), toy.logits
    )
    exact = toy.exact(e)
    cosine = ((mean * exact).sum() / (mean.norm() * exact.norm())).item()
    best = ((mean * exact).sum() / exact.square().sum()).item()
    stated = (1 if e.baseline != "mean" else (size - 1) / size) / MAX_TOKENS
    scale = best if e.biased else stated
    second = (chance * squared_norms(coefficients, toy, groups, size)).sum().item()
    return {
        "biased": e.biased,
        "cosine": cosine,
        "relative_error": ((mean / scale - exact).norm() / exact.norm()).item(),
        "variance": (second - mean.square().sum().item()) / scale**2,
    }


def squared_norms(coefficients: Tensor, toy: Toy, groups: Groups, size: int) -> Tensor:
    """|gradient|^2 of each group: the sum over pairs of tokens in the same state of c c' (e_a - pi) (e_a' - pi)."""
    probs = toy.logits.detach().softmax(-1)
    T = coefficients.shape[1]
    states, actions = (x[groups.rows].reshape(-1, size, T) for x in (toy.states, toy.actions))
    mask = groups.batch.completion_mask.reshape(-1, size, T)
    c = coefficients.reshape(-1, size, T)
    own, square = probs[states, actions], probs.square().sum(-1)[states]
    total = torch.zeros(len(c), dtype=torch.float64)
    for i, j in itertools.product(range(size), repeat=2):
        same = (states[:, i] == states[:, j]) & mask[:, i] & mask[:, j]
        product = (actions[:, i] == actions[:, j]).double() - own[:, i] - own[:, j] + square[:, i]
        total += (same * c[:, i] * c[:, j] * product).sum(1)
    return total


def report(
    toy: Toy, size: int, chosen: Callable[[str], bool] = lambda _: True
) -> dict[str, dict[str, float | bool]]:
    groups = Groups.of(toy, size)
    assert math.isclose(groups.chance.sum().item(), 1.0, rel_tol=1e-12)
    return {name: measure(e, toy, groups, size) for name, e in ESTIMATORS.items() if chosen(name)}


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
    out = [
        ("interleaved, all gates", Toy("interleaved", GATED, answers), 2),
        ("interleaved, no gate", Toy("interleaved", UNGATED, answers), 2),
    ]
    if not quick:
        out += [
            ("interleaved, format gate only", Toy("interleaved", RewardSpec(), answers), 2),
            (
                "interleaved, format gate only, mostly well-formed",
                Toy("interleaved", RewardSpec(), answers, well_formed=4.0),
                2,
            ),
            ("split, all gates", Toy("split", GATED, answers), 2),
            ("split, no gate", Toy("split", UNGATED, answers), 2),
            (
                "interleaved, all gates, mostly well-formed",
                Toy("interleaved", GATED, answers, well_formed=4.0),
                2,
            ),
            (
                "interleaved, no gate, mostly well-formed",
                Toy("interleaved", UNGATED, answers, well_formed=4.0),
                2,
            ),
            ("interleaved, all gates, G=3", Toy("interleaved", GATED, 2, 1), 3),
        ]
    return out


def expectation() -> str:
    """README's first table: cosine / relative error / variance of each estimator, those that are biased in italics."""
    cases = json.loads(RESULTS.read_text())["cases"]
    names = [
        f"{layout}, {gates}"
        for layout in ("interleaved", "split")
        for gates in ("all gates", "no gate")
    ]
    rows = []
    for estimator, row in cases[names[0]]["estimators"].items():
        found = [cases[name]["estimators"][estimator] for name in names]
        cells = [
            f"{f['cosine']:.4f} / {f['relative_error']:.0e} / {f['variance']:.2f}" for f in found
        ]
        rows.append([f"*{estimator}*" if row["biased"] else estimator, *cells])
    return grid(["estimator", *names], rows)


def variances() -> str:
    """README's second table."""
    facts = ("well_formed", "truncated", "repeating")
    cases = json.loads(RESULTS.read_text())["cases"].items()
    rows = [
        [
            n,
            *(f"{c[f]:.3f}" for f in facts),
            str(c["num_completions"]),
            f"{c['variance_ratio']:.3f}",
        ]
        for n, c in cases
    ]
    return grid(
        ["case", "well-formed", "truncated", "repeating", "completions", "variance to_go / set"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="the two interleaved cases only, at most 60 s"
    )
    parser.add_argument("--answers", type=int, default=4, help="different answers of a slot")
    args = parser.parse_args()
    began, document = time.perf_counter(), {}
    for name, toy, size in cases(args.quick, args.answers):
        few = "only" in name or (args.quick and "no gate" in name)
        rows = report(
            toy, size, lambda estimator, few=few: not few or estimator in ("to_go", "set")
        )
        ratio = rows["to_go"]["variance"] / rows["set"]["variance"]
        document[name] = {
            "group_size": size,
            **facts(toy),
            "variance_ratio": ratio,
            "estimators": rows,
        }
        about = ", ".join(f"{k} {v:.3g}" for k, v in facts(toy).items())
        print(f"\n{name} (G={size}; {about}; variance to_go/set {ratio:.3f})\n")
        print(
            "| estimator | expected | cosine | relative_error | variance |\n|---|---|---|---|---|"
        )
        for estimator, row in rows.items():
            kind = "biased" if row["biased"] else "exact"
            print(
                f"| {estimator} | {kind} | {row['cosine']:.6f} | {row['relative_error']:.1e} | {row['variance']:.4f} |"
            )
    whole = {
        "commit": environment()["commit"],
        "seconds": round(time.perf_counter() - began, 1),
        "cases": document,
    }
    if not args.quick and args.answers == 4:
        RESULTS.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


if __name__ == "__main__":
    main()

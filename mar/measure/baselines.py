"""What `mar.evaluate` asks of whom (an arm), and the document that its answers make."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mar.answers.grammar import Grammar
from mar.measure.answer_sets import Item, curves, statistics
from mar.measure.bootstrap import Statistic, difference, estimate, mean_of, ratio, resamples
from mar.measure.bounds import NUM_BINS, bars
from mar.records import Example


@dataclass(frozen=True)
class Arm:
    """One way of asking: which weights (`trained` or not), which form and words, how many sets per item. `says` defines it in one sentence."""

    name: str
    says: str
    grammar: Grammar
    num_sets: int
    style: str = "ranked"
    trained: bool = True


def arms_of(grammar: Grammar, k: int, sizes: Sequence[int], trained: bool) -> list[Arm]:
    """The policy as it was trained to answer, the baselines of the same model untrained, and sets of other sizes.

    k answers per question: a policy of K answers gives k // K sets, a single one k completions.
    """
    K, confident = grammar.num_answers, grammar.confident
    single = Grammar("rlcr_single" if confident else "rlvr_single", 1, thinking=grammar.thinking)
    asked = (
        grammar
        if grammar.multi
        else Grammar("rlcr_multi" if confident else "rlvr_multi", 3, thinking=grammar.thinking)
    )
    sets, untrained = max(1, k // K), "the untrained model" if trained else "the same weights"
    arms = [
        Arm("policy", f"{sets} sets of {K}, asked as in training", grammar, sets, trained=trained)
    ]
    if trained:
        arms.append(
            Arm("base", f"{untrained}, asked as the policy is, once", grammar, 1, trained=False)
        )
    if grammar.multi:
        arms.append(
            Arm("single", f"{untrained}, asked for one answer, {k} times", single, k, trained=False)
        )
    for style, says in (
        ("prompted_k", "prompted for K: asked only to list"),
        ("verbalized", "verbalised sampling: asked to draw at random"),
    ):
        arms.append(
            Arm(style, f"{untrained}, {says} {asked.num_answers} answers", asked, 1, style, False)
        )
    for size in sizes if grammar.multi else ():
        if size != K:
            arms.append(
                Arm(
                    f"K={size}",
                    f"the policy, asked for {size}",
                    replace(grammar, num_answers=size),
                    1,
                    trained=trained,
                )
            )
    return arms


def _curve(
    items: Sequence[Item], each: Mapping[str, np.ndarray], weights: np.ndarray
) -> dict[str, Any]:
    """Coverage, unique answers and tokens against the number of answers k, each [value, low, high]."""
    K, steps = len(items[0].sets[0].answers), range(len(items[0].sets))
    tokens = np.mean([[s.tokens for s in i.sets] for i in items])
    out: dict[str, Any] = {
        "k": [K * (m + 1) for m in steps],
        "tokens": [float(tokens * (m + 1)) for m in steps],
    }
    return out | {
        name: [estimate(mean_of(each[name][:, m]), weights) for m in steps]
        for name in ("coverage", "unique", "pass")
    }


def _reliability(ece: Statistic, weights: np.ndarray) -> list[dict[str, Any]]:
    """Of each confidence bin with answers in it: their number, mean confidence, and the share that is right [value, low, high]."""
    out = []
    for count, q, y in ece.columns.reshape(len(ece.columns), 3, NUM_BINS).transpose(2, 1, 0):
        if total := count.sum():
            right = estimate(Statistic(np.stack([y, count], 1), ratio), weights)
            out.append({"count": int(total), "said": q.sum() / total, "right": right})
    return out


def measured(arm: Arm, items: Sequence[Item]) -> dict[str, Any]:
    """Everything that is said of one arm."""
    weights, sets, each = resamples(len(items)), [s for i in items for s in i.sets], curves(items)
    all_statistics = statistics(items, arm.grammar.confident, each)
    return {
        "says": arm.says,
        "num_answers": arm.grammar.num_answers,
        "num_sets": len(items[0].sets),
        "metrics": {
            name: estimate(statistic, weights) for name, statistic in all_statistics.items()
        },
        "curve": _curve(items, each, weights),
        "reliability": _reliability(all_statistics["ece"], weights)
        if arm.grammar.confident
        else [],
        "unique_histogram": dict(
            sorted(
                Counter(
                    len({key for s in i.sets for key in s.keys} - {None}) for i in items
                ).items()
            )
        ),
        "tokens": [s.tokens for s in sets][:5000],
        "format_failures": dict(Counter(s.reason for s in sets if s.reason)),
    }


def at_tokens(curve: Mapping[str, Any], budget: float) -> float | None:
    """Coverage that a policy reaches with `budget` tokens, between two of its points; None outside of them."""
    tokens, coverage = curve["tokens"], [value for value, *_ in curve["coverage"]]
    return float(np.interp(budget, tokens, coverage)) if tokens[0] <= budget <= tokens[-1] else None


def compared(a: Sequence[Item], b: Sequence[Item], confident: bool) -> dict[str, Any]:
    """a - b of every metric that both have, on the items that both answered: {metric: [difference, low, high]}, and the number of items."""
    ids = {i.id for i in a} & {i.id for i in b}
    mine, theirs = (
        [i for i in sorted(items, key=lambda i: i.id) if i.id in ids] for items in (a, b)
    )
    first, second = statistics(mine, confident), statistics(theirs, confident)
    weights = resamples(len(ids))
    return {"num_items": len(ids)} | {
        n: difference(first[n], second[n], weights) for n in first if n in second
    }


def document_of(
    arms: Sequence[Arm], items: Mapping[str, Sequence[Item]], examples: Sequence[Example], k: int
) -> dict[str, Any]:
    """What `evaluation.json` says of all arms, at equal answers, at equal tokens, and item by item."""
    ids = {i.id for i in items["policy"]}
    found = {a.name: measured(a, items[a.name]) for a in arms}
    per_set = found["policy"]["curve"]["tokens"]
    budgets = sorted({per_set[0], per_set[len(per_set) // 2], per_set[-1]})
    K, most = arms[0].grammar.num_answers, arms[0].grammar.num_answers * arms[0].num_sets
    same = [
        a
        for a in arms[1:]
        if a.grammar.num_answers == K or a.grammar.num_answers * a.num_sets == most
    ]
    return {
        "num_items": len(ids),
        "k": k,
        "bars": bars([e for e in examples if e.id in ids], k),
        "arms": found,
        "equal_tokens": [
            {"tokens": b} | {n: at_tokens(a["curve"], b) for n, a in found.items()} for b in budgets
        ],
        "paired": {
            f"policy - {a.name}": compared(items["policy"], items[a.name], a.grammar.confident)
            for a in same
        },
    }

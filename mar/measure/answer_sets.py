"""Answer sets, several to an item, and every metric as a function of sums over items: a bootstrap over items is then one matrix product.

Where the task knows the probability of each gold, a slot is worth that exact mass instead of a drawn 0 or 1: same expectation, no label noise.
A metric that an answer form cannot have (a calibration without confidences) is left out, never 0.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mar.answers.grammar import RESERVED_TAG, Grammar, Parsed, parse
from mar.errors import UserError
from mar.measure.bootstrap import Statistic, _value, divided, mean_of
from mar.measure.bounds import NUM_BINS, ceiling_value, posteriors
from mar.measure.metrics import brier_loss, set_value, tv_distance, union_curve
from mar.records import Gold, Prompt, Rollout
from mar.verify.judge import Judge
from mar.verify.matching import matching_increments, normalise, repeats
from mar.verify.verifiers import AnswerChecker, verifier_for


@dataclass(frozen=True)
class AnswerSet:
    """One completion, read and judged. [K] each: the answers (None: not written), confidences, `hits` against the targets, `mass` (exact
    probability, else the hit), `keys` (what makes two answers the same), `repeated`. A format failure has a `reason` and no mass, hits or keys."""

    text: str
    answers: tuple[str | None, ...]
    confidences: tuple[float | None, ...]
    hits: tuple[float, ...]
    mass: tuple[float, ...]
    keys: tuple[str | None, ...]
    repeated: tuple[bool, ...]
    reason: str | None
    tokens: int


@dataclass(frozen=True)
class Item:
    """One question and the sets that a policy wrote for it. `best_value`: the Bayes-optimal value of K answers where the posterior is known."""

    id: str
    num_golds: int
    multi_label: bool
    best_value: float | None
    prompt_tokens: int
    sets: tuple[AnswerSet, ...]

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "Item":
        """The item that `asdict` made a row of."""
        plain: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in s.items()} for s in row["sets"]
        ]
        sets = [AnswerSet(**one) for one in plain]
        return Item(**{**row, "sets": tuple(sets)})


def item_of(
    prompt: Prompt, written: Sequence[tuple[Parsed | Rollout, str, int]], verifier: AnswerChecker
) -> Item:
    """Completions of one prompt, (as read, its text, number of tokens) each, judged against this item's own golds."""
    example, K = prompt.example, len(written[0][0].answers)
    golds, targets, known = (
        example.golds,
        example.targets(),
        dict[tuple[str, int], tuple[int, ...]](),
    )
    match = verifier_for(verifier, example)

    def verify(
        answer: str, among: Sequence[Gold]
    ) -> tuple[int, ...]:  # the same few answers come again and again
        if (answer, len(among)) not in known:
            known[answer, len(among)] = match(answer, among)
        return known[answer, len(among)]

    def judged(said: Parsed | Rollout, text: str, tokens: int) -> AnswerSet:
        hits, mass, keys = (0.0,) * K, (0.0,) * K, tuple[str | None, ...]((None,) * K)
        if said.reason is None:
            hits = (
                said.hits
                if isinstance(said, Rollout)
                else matching_increments(said.answers, targets, verify)[0]
            )
            _, taken = matching_increments(said.answers, golds, verify)
            mass = (
                hits
                if p is None
                else tuple(0.0 if g is None else golds[g].probability or 0.0 for g in taken)
            )
            meant = [(answer, verify(answer, golds)) for answer in map(str, said.answers)]
            keys = tuple(
                normalise(golds[among[0]].name if len(among) == 1 else a) for a, among in meant
            )
            keys = (isinstance(said, Rollout) and said.keys) or keys
        repeated = (
            said.repeated if isinstance(said, Rollout) else repeats(said.answers, golds, verify)
        )
        return AnswerSet(
            text, said.answers, said.confidences, hits, mass, keys, repeated, said.reason, tokens
        )

    p = posteriors([example], K)
    best = None if p is None else ceiling_value(p, K).item()
    num_golds = K if example.tests else 1 if example.truth in ("exact", "survey") else len(targets)
    return Item(
        example.id,
        num_golds,
        example.multi_label,
        best,
        len(prompt.ids),
        tuple(judged(*one) for one in written),
    )


def read_item(
    prompt: Prompt, texts: Sequence[tuple[str, int]], grammar: Grammar, verifier: AnswerChecker
) -> Item:
    """The same of texts that nobody has read yet, (text, number of tokens) each."""
    written = [(parse(text, grammar, prompt.think_open), text, n) for text, n in texts]
    if isinstance(verifier, Judge):
        said = [
            (prompt.example, a) for parsed, *_ in written for a in parsed.answers if a is not None
        ]
        verifier.submit(said)
        if not all(verifier.has_verdict(*pair) for pair in said):
            raise UserError(
                f"{prompt.id}: the judge gives no verdict on all of its answers; the same command goes on"
            )
    return item_of(prompt, written, verifier)


def ece_of(expected: np.ndarray, said: np.ndarray) -> Statistic:
    """Expected calibration error over slots with a confidence: 10 equal bins, sum of |mean q - mean y| weighted by count (Naeini et al. 2015).
    Its columns, as [n, 3, bins], are the number of slots in each bin, their sum of confidences, and that of hits (or masses)."""
    columns, seen = np.zeros((len(said), 3, NUM_BINS)), ~np.isnan(said)
    q, y = said[seen], expected[seen]
    at = np.minimum((q * NUM_BINS).astype(int), NUM_BINS - 1)
    for row, values in enumerate((np.ones_like(q), q, y)):
        np.add.at(columns[:, row], (np.nonzero(seen)[0], at), values)

    def value(sums: np.ndarray) -> np.ndarray:
        count, q, y = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, NUM_BINS), -2, 0)
        return divided(np.abs(q - y).sum(-1), count.sum(-1))

    return Statistic(columns.reshape(len(said), -1), value)


def auroc_of(expected: np.ndarray, said: np.ndarray) -> Statistic:
    """P(a right answer has the higher confidence than a wrong one), ties one half, over slots with a confidence; an exact mass counts as that share
    of a right answer; nan where all are right or all wrong."""
    seen = ~np.isnan(said)
    levels, at = np.unique(said[seen], return_inverse=True)
    columns = np.zeros((len(said), 2, len(levels)))
    for side, weights in enumerate((expected[seen], 1 - expected[seen])):
        np.add.at(columns[:, side], (np.nonzero(seen)[0], at), weights)

    def value(sums: np.ndarray) -> np.ndarray:
        right, wrong = np.split(
            sums, 2, axis=-1
        )  # [..., L]: how many of each confidence, in rising order
        below = wrong.cumsum(-1) - wrong / 2
        return divided((right * below).sum(-1), right.sum(-1) * wrong.sum(-1))

    return Statistic(columns.reshape(len(said), -1), value)


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a completion without its tags, as rouge-score cuts them."""
    return re.findall("[a-z0-9]+", RESERVED_TAG.sub(" ", text).lower())


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """F1 of the longest common subsequence (Lin 2004); 0 where either is empty."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0


def shared(a: Sequence[str], b: Sequence[str], n: int = 1) -> float:
    """Jaccard index of the sets of n-grams; nan where neither has any."""
    x, y = ({tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in (a, b))
    return len(x & y) / len(x | y) if x | y else np.nan


OVERLAPS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "overlap_3gram": lambda a, b: shared(a, b, 3),
    "overlap_4gram": lambda a, b: shared(a, b, 4),
    "overlap_jaccard": shared,
    "overlap_rouge_l": rouge_l,
}


def _union(item: Item, what: Callable[[AnswerSet], Mapping[str, float]]) -> np.ndarray:
    """The union curve [S] of outcomes, each with its worth, that `what` reads off a set."""
    shown = [what(s) for s in item.sets]
    worth = {key: value for outcomes in shown for key, value in outcomes.items()}
    seen = np.array([[key in outcomes for key in worth] for outcomes in shown]).reshape(
        len(shown), len(worth)
    )
    return union_curve(seen, np.array(list(worth.values())))


def _covered(s: AnswerSet) -> dict[str, float]:
    return {str(key): mass for key, mass in zip(s.keys, s.mass, strict=True) if mass > 0}


def curves(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """[n, S] each, against the number m of sets: `coverage` of their union, `unique` answers in it, `pass` (is any right)."""
    return {
        "coverage": np.array([_union(i, _covered) for i in items]),
        "unique": np.array(
            [_union(i, lambda s: {key: 1.0 for key in s.keys if key is not None}) for i in items]
        ),
        "pass": np.array(
            [
                _union(i, lambda s: {"hit": min(1.0, sum(s.hits))} if any(s.hits) else {})
                for i in items
            ]
        ),
    }


def statistics(
    items: Sequence[Item], confident: bool, curve: Mapping[str, np.ndarray] | None = None
) -> dict[str, Statistic]:
    """Every metric that these sets allow, by name. K answers a set, S sets an item, k = S K answers in all. `curve`: `curves`, if at hand."""
    sets = [i.sets for i in items]
    K, S = len(sets[0][0].answers), len(sets[0])
    mass, hits, repeated = (
        np.array([[getattr(s, a) for s in i] for i in sets], float)
        for a in ("mass", "hits", "repeated")
    )
    readable = np.array([[s.reason is None for s in i] for i in sets])
    said = np.array(
        [[[np.nan if q is None else q for q in s.confidences] for s in i] for i in sets], float
    )
    said[~readable] = np.nan
    exact, curve = items[0].best_value is not None, curve or curves(items)
    num_golds, multi_label = (
        np.array([i.num_golds for i in items]),
        any(i.multi_label for i in items),
    )
    out = {
        f"coverage@{K}": mean_of(mass.sum(-1)),
        "top1": mean_of(mass[..., 0]),
        f"recall@{K}": mean_of(hits.sum(-1) / num_golds[:, None]),
        "precision": mean_of(mass),
        f"pass@{K}": mean_of(curve["pass"][:, 0]),
    }
    if S > 1:
        out |= {
            f"coverage@{S * K}": mean_of(curve["coverage"][:, -1]),
            f"pass@{S * K}": mean_of(curve["pass"][:, -1]),
            f"unique@{S * K}": mean_of(curve["unique"][:, -1]),
        }
        pairs = [[(words(a.text), words(b.text)) for a, b in pairwise(i)] for i in sets]
        out |= {
            name: mean_of(np.array([[f(a, b) for a, b in p] for p in pairs]))
            for name, f in OVERLAPS.items()
        }
    if confident:
        chosen = np.nan_to_num(said, nan=-1.0).argmax(-1)[..., None]
        total, any_hit = said.sum(-1), np.minimum(mass.sum(-1), 1.0)
        of_set = (mass.sum(-1) / K, total / K) if multi_label else (any_hit, np.minimum(total, 1.0))
        out |= {
            "top1_conf": mean_of(np.take_along_axis(mass, chosen, -1)),
            "brier": mean_of(brier_loss(mass, said)),
            "ece": ece_of(mass, said),
            "auroc": auroc_of(mass, said),
            "ece_top1": ece_of(mass[..., 0], said[..., 0]),
            "set_ece": ece_of(*of_set),
        }
    if exact and confident:
        best = np.array([i.best_value for i in items], float)[:, None]
        value = set_value(mass, said)
        out |= {
            "q_mse": mean_of((said - mass) ** 2),
            "tv_distance": mean_of(tv_distance(mass, said)),
            "value": mean_of(value),
            "regret": mean_of(best - value),
        }
    return out | {
        "format_rate": mean_of(readable),
        "repeats_per_set": mean_of(repeated.sum(-1)),
        "tokens_per_set": mean_of(np.array([[s.tokens for s in i] for i in sets])),
        "prompt_tokens": mean_of(np.array([i.prompt_tokens for i in items])),
    }


def set_metrics(
    rollouts: Sequence[Rollout], verifier: AnswerChecker, confident: bool
) -> tuple[dict[str, float | None], dict[str, Statistic]]:
    """Every metric of one set each, None where it is undefined, and the statistics behind them."""
    found = statistics(
        [item_of(r.prompt, [(r, r.text, len(r.completion.ids))], verifier) for r in rollouts],
        confident,
    )
    return {name: _value(statistic) for name, statistic in found.items()}, found

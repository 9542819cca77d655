"""What single answers cover, out of their whole distribution: no answer is drawn.

`p` [B, C] are the probabilities of each question's golds, `q` [B, C] those that a model gives them.
Every value is [B], one number a question.
"""

from collections.abc import Sequence

import numpy as np

from mar.measure.bounds import best_masses, floor_coverage, inclusion_probabilities
from mar.records import Example

# Probabilities below this count as this in logarithms.
LEAST = 1e-30
# The answers of a set, beside single ones.
SEVERAL = 3


def gold_probabilities(examples: Sequence[Example]) -> np.ndarray:
    """[B, C] probabilities of each example's golds; 0 where an example has fewer than C."""
    p = np.zeros((len(examples), max(len(example.golds) for example in examples)))
    for row, example in zip(p, examples, strict=True):
        row[: len(example.golds)] = [gold.probability or 0.0 for gold in example.golds]
    return p


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """[B] KL(p | q) in nats."""
    return (p * np.log(np.maximum(p, LEAST) / np.maximum(q, LEAST))).sum(axis=-1)


def any_of_draws(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """[B] what SEVERAL draws from `q`, which may repeat, cover under `p`."""
    return (p * (1 - (1 - q) ** SEVERAL)).sum(axis=1)


def coverage_of(q: np.ndarray, p: np.ndarray, closed: bool) -> dict[str, np.ndarray]:
    """What answers by `q` cover under `p`: one draw, and three draws that may repeat.

    Where the golds are all that can be said (`closed`) also three different draws, and the most
    probable one and three. `named`: the mass of all golds. `kl`: of `q` to the posterior.
    """
    named = q.sum(axis=1)
    values = {
        "named": named,
        "kl": divergence(p, q),
        "drawn@1": (q * p).sum(axis=1),
        "drawn@3": any_of_draws(q, p),
    }
    if closed:
        best = np.take_along_axis(p, np.argsort(-q, axis=1), axis=1)
        different = (p * inclusion_probabilities(q, SEVERAL)).sum(axis=1)
        # A draw that names no gold covers nothing.
        values["different@3"] = different * np.minimum(named, 1.0)
        values["best@1"] = best[:, 0]
        values["best@3"] = best[:, :SEVERAL].sum(axis=1)
    return values


def bars_of(p: np.ndarray, prior: np.ndarray | None) -> dict[str, np.ndarray]:
    """What needs no model: draws from the posterior and its most probable answers.

    With the `prior` [C] of golds that all questions share, also the constant answers that are best
    under it.
    """
    # Of fewer golds than answers all are named.
    num_named = min(SEVERAL, p.shape[1])
    values = {
        "posterior_drawn@1": (p * p).sum(axis=1),
        "posterior_drawn@3": any_of_draws(p, p),
        "posterior_best@1": best_masses(p, 1)[:, 0],
        "posterior_best@3": best_masses(p, num_named).sum(axis=1),
    }
    if prior is not None:
        constant = np.argsort(-prior)
        values["constant@1"] = p[:, constant[0]]
        values["constant@3"] = p[:, constant[:SEVERAL]].sum(axis=1)
        values["posterior_different@3"] = floor_coverage(p, SEVERAL)
        values["kl_of_prior"] = divergence(p, prior)
    return values


def means(values: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean of each over questions, to four decimals."""
    return {name: round(float(np.mean(value)), 4) for name, value in values.items() if len(value)}

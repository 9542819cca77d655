"""What single answers cover: the posterior itself covers what its bars say."""

import numpy as np
import pytest

from mar.measure.single_answers import bars_of, coverage_of, gold_probabilities, means
from mar.tasks import clinic


def test_the_posterior_itself_covers_what_its_bars_say():
    p = gold_probabilities(clinic.load("validation", 50, 0))
    measured, bars = means(coverage_of(p, p, closed=True)), means(bars_of(p, p.mean(axis=0)))
    assert measured["kl"] == 0 and measured["named"] == 1
    assert measured["different@3"] == pytest.approx(bars["posterior_different@3"], abs=1e-3)
    for name in ("drawn@1", "drawn@3", "best@1", "best@3"):
        assert measured[name] == bars[f"posterior_{name}"]
    assert measured["best@3"] > measured["different@3"] > measured["drawn@3"] > bars["constant@3"]


def test_by_hand():
    q = np.array([[0.5, 0.25, 0.0, 0.0]])
    p = np.array([[0.1, 0.6, 0.2, 0.1]])
    measured = coverage_of(q, p, closed=True)
    assert measured["named"] == pytest.approx(0.75)
    assert measured["drawn@1"] == pytest.approx(0.05 + 0.15)
    assert measured["drawn@3"] == pytest.approx(0.1 * 0.875 + 0.6 * (1 - 0.75**3))
    assert measured["best@1"] == pytest.approx(0.1)
    bars = bars_of(p, np.array([0.4, 0.1, 0.3, 0.2]))
    assert bars["constant@1"] == pytest.approx(0.1) and bars["constant@3"] == pytest.approx(0.4)
    assert "constant@1" not in bars_of(p, None)
    assert "best@1" not in coverage_of(q, p, closed=False)


def test_fewer_golds_than_answers_are_all_named():
    """A coin has two sides, and three answers cover both."""
    bars = bars_of(np.array([[0.7, 0.3], [0.5, 0.5]]), prior=None)
    assert bars["posterior_best@3"] == pytest.approx([1, 1])
    assert bars["posterior_best@1"] == pytest.approx([0.7, 0.5])

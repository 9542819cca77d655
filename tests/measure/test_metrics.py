"""Metrics against their definitions: by hand, by scikit-learn, and by enumeration of the labels
that could have been drawn. Floor and ceiling: by enumeration of the draws."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from mar.measure.bootstrap import student_t_95
from mar.measure.bounds import gap_closed, known_bounds
from mar.measure.metrics import calibration_error, set_metrics
from mar.records import Completion, Example, Gold, Prompt, Rollout
from mar.verify.matching import exact_masses, matching_increments, meanings, repeats
from mar.verify.verifiers import VERIFIERS

NAN = float("nan")


def example(p=(0.5, 0.3, 0.2), drawn=0, truth="exact"):
    golds = tuple(
        Gold(name, (f"alias of {name}",), x) for name, x in zip("abcdefgh", p, strict=False)
    )
    return Example("e", "test", "?", golds, truth, label=drawn)


def rollout(asked, answers, confidences, reason=None, num_tokens=4):
    """A rollout with these answers; hits and repeats are worked out, rewards are not."""
    ids = np.zeros(num_tokens, np.int64)
    hits, _ = matching_increments(answers, asked.targets(), VERIFIERS["text"])
    done = Completion(0, ids, ids, ids, "stop")
    again = repeats(answers, asked.golds)
    mass = exact_masses(answers, asked.golds) if asked.truth == "exact" else hits
    return Rollout(
        prompt=Prompt(asked, "?", (1,) * 6),
        completion=done,
        text="",
        answers=tuple(answers),
        confidences=tuple(confidences),
        hits=hits,
        repeated=again,
        reason=reason,
        components=np.zeros(1),
        segment_ids=ids,
        total=0.0,
        mass=mass,
        keys=meanings(answers, asked.golds),
    )


def broken(asked, answers=("a", None, None), confidences=(0.9, None, None)):
    return rollout(asked, answers, confidences, "unfinished", num_tokens=1)


def measured(rollouts, confident=True):
    return set_metrics(rollouts, confident)[0]


def ece(mass, confidence):
    statistic = calibration_error(mass, confidence)
    return statistic.value(statistic.columns.sum(0)).item()


def random_slots(n=400):
    """Hits and confidences [n, 3], and the rollouts that say so. Each answer has its own gold."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=(n, 3))
    right = rng.uniform(size=(n, 3)) < confidence**1.5
    asked = example((None,) * 3, None, "uniform")
    said = [["abc"[k] if y else f"no {k}" for k, y in enumerate(row)] for row in right]
    rollouts = [rollout(asked, *one) for one in zip(said, confidence.tolist(), strict=True)]
    return right.astype(float), confidence, rollouts


def test_metrics_by_hand():
    slots = [(0.3, 0.6, 0.1), (0.3, 0.6, 0.1)]
    sets = [
        rollout(example(slots[0]), ("c", "x", "b"), (0.9, 0.25, None)),
        rollout(example(slots[1]), ("a", "b", "x"), (None, 0.95, 1.0)),
    ]
    found = measured(sets)
    # A missing confidence is charged 1. First set: 0.1 (0.1)^2 + 0.9 (0.9)^2, (0.25)^2, 1.
    # Second set: 1, 0.6 (0.05)^2 + 0.4 (0.95)^2, 1.
    losses = (0.001 + 0.729, 0.0625, 1, 1, 0.0015 + 0.361, 1)
    assert found["brier"] == pytest.approx(sum(losses) / 6)
    assert found["q_mse"] == pytest.approx((0.8**2 + 0.25**2 + 0.35**2 + 1) / 4)
    # 0.9, 0.95 and 1 share the last bin: their errors add up.
    assert found["ece"] == pytest.approx((abs(0.9 + 0.95 + 1.0 - 0.7) + 0.25) / 4)
    assert ece(np.array([[0.0, 1.0]]), np.array([[1.0, 0.95]])) == pytest.approx(0.95 / 2)
    assert math.isnan(ece(np.ones((2, 2)), np.full((2, 2), NAN)))


def test_brier_and_ece_agree_with_scikit_learn():
    y, q, rollouts = random_slots()
    found = measured(rollouts)
    assert found["brier"] == pytest.approx(brier_score_loss(y.ravel(), q.ravel()), rel=1e-12)
    share, mean = calibration_curve(y.ravel(), q.ravel(), n_bins=10, strategy="uniform")
    counts = np.histogram(q, np.linspace(0, 1, 11))[0]
    assert found["ece"] == pytest.approx((np.abs(share - mean) * counts).sum() / y.size, rel=1e-12)
    q[:, 1] = NAN
    assert ece(y, q) == pytest.approx(ece(y[:, [0, 2]], q[:, [0, 2]]), rel=1e-12)


def test_exact_masses_are_the_expectation_over_drawn_labels():
    p = (0.5, 0.3, 0.15, 0.05)
    sets = [(("b", "alias of B", "x"), (0.4, 0.9, 0.1)), (("d", "a", "c"), (0.2, 0.7, 0.6))]
    expected = dict.fromkeys(("recall@3", "brier"), 0.0)
    for labels in itertools.product(range(4), repeat=2):
        weight = math.prod(p[label] for label in labels)
        rollouts = [
            rollout(example(p, label), *given) for label, given in zip(labels, sets, strict=True)
        ]
        exact = measured(rollouts)
        expected["recall@3"] += weight * exact["recall@3"]
        for (_, said), one in zip(sets, rollouts, strict=True):
            expected["brier"] += weight * np.mean((np.array(said) - one.hits) ** 2) / 2
        # Whatever was drawn; a repeat has no mass.
        assert exact["coverage@3"] == pytest.approx((0.3 + 0.7) / 2)
        assert exact["top1"] == pytest.approx((0.3 + 0.05) / 2)
        errors = np.array([0.1, 0.9, 0.1, 0.15, 0.2, 0.45])
        assert exact["q_mse"] == pytest.approx((errors**2).mean())
    assert expected == pytest.approx({"recall@3": exact["coverage@3"], "brier": exact["brier"]})


def test_sets_by_hand():
    asked = example((1.0,), None, "single")
    rollouts = [
        rollout(asked, ("b", "a", "A."), (0.5, 0.5, 0.0), num_tokens=10),
        rollout(asked, ("a", "b", "c"), (1.0, 0.0, 0.0), num_tokens=5),
    ]
    expected = {
        "coverage@3": 1.0,
        "top1": 0.5,
        "brier": 0.5 / 6,
        "ece": 0.0,
        "format_rate": 1.0,
        "repeats_per_set": 0.5,
        "tokens_per_set": 7.5,
        "prompt_tokens": 6.0,
    }
    found = measured(rollouts)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert "q_mse" not in found


def test_a_format_failure_is_wrong_and_charged_one():
    asked = example(drawn=0)
    both = measured([broken(asked), rollout(asked, ("a", "b", "c"), (0.5, 0.3, 0.2))])
    assert both["coverage@3"] == pytest.approx(0.5)
    assert both["recall@3"] == 0.5
    assert both["format_rate"] == 0.5
    assert both["brier"] == pytest.approx((3 + 0.25 + 0.21 + 0.16) / 6)
    # These look at what can be read alone; format_rate stands beside them.
    assert both["q_mse"] == pytest.approx(0)
    assert both["ece"] == pytest.approx(0)


@pytest.mark.parametrize("truth", ["exact", "single"])
def test_garbage_is_no_perfect_brier(truth):
    asked = example(truth=truth)
    metrics = measured([broken(asked), broken(asked, (None,) * 3, (None,) * 3)])
    assert metrics["brier"] == 1.0
    assert metrics["format_rate"] == 0.0
    assert metrics["coverage@3"] == 0.0
    assert metrics["ece"] is None
    assert metrics.get("q_mse") is None
    assert not any(isinstance(value, float) and math.isnan(value) for value in metrics.values())


def test_a_grammar_without_confidences_has_no_brier():
    metrics = measured([rollout(example(), ("a", "b", "c"), (None,) * 3)], confident=False)
    assert not {"brier", "ece"} & set(metrics)
    assert metrics["coverage@3"] == pytest.approx(1.0)


def brute_floor(p, k):
    """Expected mass of k draws without replacement, over all ordered draws."""
    total = 0.0
    for order in itertools.permutations(range(len(p)), k):
        left, chance = 1.0, 1.0
        for i in order:
            chance, left = chance * p[i] / left, left - p[i]
        total += chance * sum(p[i] for i in order)
    return total


def test_floor_and_ceiling_of_a_known_posterior():
    first, second = (0.6, 0.2, 0.1, 0.06, 0.04), (0.3, 0.3, 0.2, 0.1, 0.1)
    bounds = known_bounds([example(first), example(second)], 2)
    floor, ceiling = bounds["floor"], bounds["ceiling"]
    mean_floor = (brute_floor(first, 2) + brute_floor(second, 2)) / 2
    assert floor["coverage@2"] == pytest.approx(mean_floor, abs=1e-8)
    assert floor["top1"] == pytest.approx(sum(x * x for x in (*first, *second)) / 2)
    assert ceiling["coverage@2"] == pytest.approx((0.8 + 0.6) / 2)
    assert ceiling["top1"] == pytest.approx(0.45)
    assert ceiling["brier"] == pytest.approx((0.24 + 0.16 + 0.21 + 0.21) / 4)
    assert ceiling["value"] == pytest.approx((0.8 + 0.6) / 2 - (0.24 + 0.16 + 0.21 + 0.21) / 4)
    # The best answers with honest confidences measure as the ceiling says.
    best = measured([rollout(example(p), ("a", "b"), p[:2]) for p in (first, second)])
    for name in ("coverage@2", "top1", "brier", "ece", "q_mse"):
        assert best[name] == pytest.approx(ceiling[name], abs=1e-12), name
    assert known_bounds([example(first), example(truth="single")], 2) is None


def test_bounds_of_items_with_few_or_unequal_golds():
    few, unequal = (0.5, 0.5), (0.7, 0.1, 0.1, 0.1)
    bounds = known_bounds([example(few), example(unequal)], 3)
    floor = (1 + brute_floor(unequal, 3)) / 2
    assert bounds["floor"]["coverage@3"] == pytest.approx(floor, abs=1e-8)
    assert bounds["ceiling"]["coverage@3"] == pytest.approx((1 + 0.9) / 2)


def test_gap_closed():
    assert gap_closed(0.6, 0.5, 0.7) == pytest.approx(0.5)
    assert gap_closed(0.5, 0.5, 0.7) == 0.0
    assert gap_closed(0.4, 0.5, 0.7) == pytest.approx(-0.5)
    assert gap_closed(1.0, 1.0, 1.0) is None  # K answers name all there is


def test_slots_are_judged_against_their_own_item():
    first = rollout(example((0.9, 0.1)), ("a", "b"), (0, 0))
    second = rollout(example((0.2, 0.8)), ("b", "a"), (0, 0))
    found = measured([first, second])
    assert found["top1"] == pytest.approx((0.9 + 0.8) / 2)


def test_students_point_is_right_to_two_hundredths():
    assert max(abs(student_t_95(n) - stats.t.ppf(0.975, n)) for n in range(1, 200)) < 0.02

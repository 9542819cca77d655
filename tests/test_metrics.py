"""Every metric against its definition: by hand, by scikit-learn, and by enumeration of the labels that could have been drawn."""

import itertools
import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from mar.metrics import SlotTable, brier, ece, gap_closed, known_bounds, q_mse, set_metrics, slot_table
from mar.records import Completion, Example, Gold, Prompt, Rollout
from mar.verify import VERIFIERS, matching_increments, repeats

NAN = float("nan")


def example(p=(0.5, 0.3, 0.2), drawn=0, truth="exact"):
    return Example(
        "e", "test", "?", tuple(Gold("abcdefgh"[i], (f"alias of {'abcdefgh'[i]}",), x) for i, x in enumerate(p)), truth, drawn=drawn
    )


def rollout(asked, answers, confidences, reason=None, num_tokens=4):
    """A rollout with these answers; hits and repeats are worked out, rewards are not."""
    ids = np.zeros(num_tokens, np.int64)
    hits, _ = matching_increments(answers, asked.targets(), VERIFIERS["text"])
    done = Completion(0, ids, ids, ids, "stop")
    again = repeats(answers, asked.golds)
    return Rollout(Prompt(asked, "?", (1,) * 6), done, "", tuple(answers), tuple(confidences), hits, again, reason, np.zeros(1), ids, 0.0)


def broken(asked, answers=("a", None, None), confidences=(0.9, None, None)):
    return rollout(asked, answers, confidences, "unfinished", num_tokens=1)


def random_slots(n=400):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=(n, 3))
    return (rng.uniform(size=(n, 3)) < confidence**1.5).astype(float), confidence


def test_brier_ece_and_q_mse_by_hand():
    mass = np.array([[1.0, 0.0], [0.3, 0.6]])
    confidence = np.array([[0.9, 0.25], [NAN, 0.95]])
    # (.1)^2, (.25)^2, a missing one is charged 1, .6 (.05)^2 + .4 (.95)^2
    assert brier(mass, confidence) == pytest.approx((0.01 + 0.0625 + 1 + 0.0015 + 0.361) / 4)
    assert ece(mass, confidence) == pytest.approx((abs(0.9 + 0.95 - 1.6) + 0.25) / 3)  # .9 and .95 share a bin, so their errors may cancel
    assert q_mse(mass, confidence) == pytest.approx((0.01 + 0.0625 + 0.35**2) / 3)
    assert ece(np.array([0.0, 1.0]), np.array([1.0, 0.95])) == pytest.approx(0.95 / 2)  # 1 belongs to the last bin
    nothing = np.full((2, 2), NAN)
    assert (brier(mass, nothing), ece(mass, nothing), q_mse(mass, nothing)) == (1.0, None, None)


def test_brier_and_ece_agree_with_scikit_learn():
    y, q = random_slots()
    assert brier(y, q) == pytest.approx(brier_score_loss(y.ravel(), q.ravel()), rel=1e-12)
    share, mean = calibration_curve(y.ravel(), q.ravel(), n_bins=10, strategy="uniform")
    counts = np.histogram(q, np.linspace(0, 1, 11))[0]
    assert ece(y, q) == pytest.approx((np.abs(share - mean) * counts).sum() / y.size, rel=1e-12)
    q[:, 1] = NAN
    assert ece(y, q) == pytest.approx(ece(y[:, [0, 2]], q[:, [0, 2]]), rel=1e-12)


def test_exact_masses_are_the_expectation_over_drawn_labels():
    p = (0.5, 0.3, 0.15, 0.05)
    sets = [(("b", "alias of B", "x"), (0.4, 0.9, 0.1)), (("d", "a", "c"), (0.2, 0.7, 0.6))]
    expected = dict.fromkeys(("coverage@3_drawn", "top1_drawn", "brier"), 0.0)
    for labels in itertools.product(range(4), repeat=2):
        weight = math.prod(p[label] for label in labels)
        rollouts = [rollout(example(p, label), *given) for label, given in zip(labels, sets, strict=True)]
        exact = set_metrics(rollouts)
        drawn = slot_table(rollouts, "text", exact=False)
        assert exact["top1_drawn"] == ((labels[0] == 1) + (labels[1] == 3)) / 2
        for key in ("coverage@3_drawn", "top1_drawn"):
            expected[key] += weight * exact[key]
        expected["brier"] += weight * brier(drawn.mass, drawn.confidence)
        assert exact["coverage@3"] == pytest.approx((0.3 + 0.7) / 2)  # a repeat has no mass; whatever was drawn
        assert exact["top1"] == pytest.approx((0.3 + 0.05) / 2)
        assert exact["q_mse"] == pytest.approx((0.1**2 + 0.9**2 + 0.1**2 + 0.15**2 + 0.2**2 + 0.45**2) / 6)
    assert expected == pytest.approx({"coverage@3_drawn": exact["coverage@3"], "top1_drawn": exact["top1"], "brier": exact["brier"]})


def test_sets_by_hand():
    asked = example((1.0,), None, "single")
    rollouts = [
        rollout(asked, ("b", "a", "A."), (0.5, 0.5, 0.0), num_tokens=10),
        rollout(asked, ("a", "b", "c"), (1.0, 0.0, 0.0), num_tokens=5),
    ]
    assert set_metrics(rollouts) == pytest.approx(
        {"coverage@3": 1.0, "top1": 0.5, "brier": 0.5 / 6, "ece": 0.0, "q_mse": None, "format_rate": 1.0, "repeats_per_set": 0.5,
         "tokens_per_set": 7.5, "prompt_tokens": 6.0}
    )  # fmt: skip


def test_a_format_failure_is_wrong_and_charged_one():
    asked = example(drawn=0)
    table = slot_table([broken(asked), rollout(asked, ("a", "b", "c"), (0.5, 0.3, 0.2))], "text", exact=True)
    np.testing.assert_array_equal(table.mass, [[0, 0, 0], [0.5, 0.3, 0.2]])
    np.testing.assert_array_equal(table.confidence, [[NAN] * 3, [0.5, 0.3, 0.2]])
    np.testing.assert_array_equal(table.well_formed, [False, True])
    both = set_metrics([broken(asked), rollout(asked, ("a", "b", "c"), (0.5, 0.3, 0.2))])
    assert both["coverage@3"] == pytest.approx(0.5) and both["coverage@3_drawn"] == 0.5 and both["format_rate"] == 0.5
    assert both["brier"] == pytest.approx((3 + 0.25 + 0.21 + 0.16) / 6)
    assert both["q_mse"] == pytest.approx(0) and both["ece"] == pytest.approx(0)  # of what can be read; format_rate stands beside them


@pytest.mark.parametrize("truth", ["exact", "single"])
def test_garbage_is_no_perfect_brier(truth):
    metrics = set_metrics([broken(example(truth=truth)), broken(example(truth=truth), (None,) * 3, (None,) * 3)])
    assert metrics["brier"] == 1.0 and metrics["format_rate"] == 0.0
    assert metrics["coverage@3"] == 0.0 and metrics["ece"] is None and metrics["q_mse"] is None
    assert not any(isinstance(value, float) and math.isnan(value) for value in metrics.values())


def test_a_grammar_without_confidences_has_no_brier():
    metrics = set_metrics([rollout(example(), ("a", "b", "c"), (None,) * 3)], confident=False)
    assert metrics["brier"] is None and metrics["ece"] is None and metrics["coverage@3"] == pytest.approx(1.0)


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
    assert floor["coverage@2"] == pytest.approx((brute_floor(first, 2) + brute_floor(second, 2)) / 2, abs=1e-8)
    assert floor["top1"] == pytest.approx((sum(x * x for x in first) + sum(x * x for x in second)) / 2)
    assert ceiling["coverage@2"] == pytest.approx((0.8 + 0.6) / 2) and ceiling["top1"] == pytest.approx(0.45)
    assert ceiling["brier"] == pytest.approx((0.24 + 0.16 + 0.21 + 0.21) / 4)
    assert ceiling["value"] == pytest.approx((0.8 + 0.6) / 2 - (0.24 + 0.16 + 0.21 + 0.21) / 4)
    honest = set_metrics([rollout(example(p), ("a", "b"), p[:2]) for p in (first, second)])  # who answers so, measures so
    assert {k: honest[k] for k in ("coverage@2", "top1", "brier", "ece", "q_mse")} == pytest.approx(
        {k: ceiling[k] for k in ("coverage@2", "top1", "brier", "ece", "q_mse")}, abs=1e-12
    )
    assert known_bounds([example(first), example(truth="single")], 2) is None


def test_bounds_of_items_with_few_or_unequal_golds():
    bounds = known_bounds([example((0.5, 0.5)), example((0.7, 0.1, 0.1, 0.1))], 3)
    assert bounds["floor"]["coverage@3"] == pytest.approx((1 + brute_floor((0.7, 0.1, 0.1, 0.1), 3)) / 2, abs=1e-8)
    assert bounds["ceiling"]["coverage@3"] == pytest.approx((1 + 0.9) / 2)


def test_gap_closed():
    assert gap_closed(0.6, 0.5, 0.7) == pytest.approx(0.5)
    assert gap_closed(0.5, 0.5, 0.7) == 0.0 and gap_closed(0.4, 0.5, 0.7) == pytest.approx(-0.5)
    assert gap_closed(1.0, 1.0, 1.0) is None  # K answers name all there is


def test_slots_are_judged_against_their_own_item():
    table = slot_table(
        [rollout(example((0.9, 0.1)), ("a", "b"), (0, 0)), rollout(example((0.2, 0.8)), ("b", "a"), (0, 0))], "text", exact=True
    )
    assert isinstance(table, SlotTable)
    np.testing.assert_allclose(table.mass, [[0.9, 0.1], [0.8, 0.2]])

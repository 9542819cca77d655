"""Metrics of several sets per item, against enumeration, scikit-learn and rouge-score; and the bootstrap against resampling by hand."""

import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score

from mar.answers.grammar import Grammar, render
from mar.answers.rewards import RewardSpec
from mar.measure.answer_sets import (
    Item,
    auroc_of,
    curves,
    read_item,
    rouge_l,
    set_metrics,
    shared,
    statistics,
    words,
)
from mar.measure.baselines import Arm, measured
from mar.measure.bootstrap import difference, estimate, mean_of, resamples
from mar.measure.bounds import bars, ceiling_value, floor_coverage
from mar.measure.metrics import set_value, tv_distance, union_curve
from mar.records import Completion, Example, Gold, Prompt
from mar.sample.rollout import Scorer, judge_groups

GRAMMAR = Grammar("rlcr_multi", 2, thinking=False)
NAMES = ("asthma", "flu", "gout", "migraine", "anaemia")


def prompts(num=40, seed=0, truth="exact"):
    rng = np.random.default_rng(seed)
    for i in range(num):
        p = rng.dirichlet(np.ones(len(NAMES)))
        golds = tuple(Gold(name, (f"{name} disease",), x) for name, x in zip(NAMES, p, strict=True))
        drawn = int(rng.choice(len(NAMES), p=p)) if truth == "exact" else None
        yield Prompt(
            Example(f"e{i:02}", "test", "?", golds, truth, truth == "uniform", drawn),
            "?",
            (1,) * (5 + i % 3),
        )


def texts(rng, num=4, grammar=GRAMMAR):
    """Sets with repeats, aliases, wrong answers, tied confidences and format failures."""
    for _ in range(num):
        answers = rng.choice([*NAMES, "flu disease", "nothing"], size=grammar.num_answers)
        text = render(grammar, list(answers), list(rng.integers(0, 21, grammar.num_answers) / 20))
        yield (text[:-7] if rng.random() < 0.15 else text), int(rng.integers(5, 30))


def items(seed=0, num=40, truth="exact", sets=4):
    rng = np.random.default_rng(seed + 1)
    return [
        read_item(p, list(texts(rng, sets)), GRAMMAR, "text") for p in prompts(num, truth=truth)
    ]


def value(statistic):
    return statistic.value(statistic.columns.sum(0)).item()


def test_union_curve_is_the_mean_over_all_choices():
    rng = np.random.default_rng(1)
    seen, worth = rng.random((5, 7)) < 0.3, rng.random(7)
    for m in range(1, 6):
        chosen = [worth @ seen[list(c)].any(0) for c in itertools.combinations(range(5), m)]
        assert union_curve(seen, worth)[m - 1] == pytest.approx(np.mean(chosen), abs=1e-12)
    one = union_curve(seen[:, :1], np.ones(1))  # pass@k: 1 - C(n - c, k) / C(n, k)
    c = seen[:, 0].sum()
    assert one == pytest.approx([1 - math.comb(5 - c, k) / math.comb(5, k) for k in range(1, 6)])


def auroc(mass, q):
    return value(auroc_of(mass, q))


def test_auroc_agrees_with_scikit_learn():
    rng = np.random.default_rng(2)
    q, y = rng.integers(0, 11, (300, 1)) / 10, (rng.random((300, 1)) < 0.4).astype(float)
    assert auroc(y, q) == pytest.approx(roc_auc_score(y, q), abs=1e-12)
    mass = rng.random(
        (300, 1)
    )  # a mass is that share of a right answer and the rest of a wrong one
    both = np.concatenate([np.ones(300), np.zeros(300)])
    weighted = roc_auc_score(
        both, np.tile(q[:, 0], 2), sample_weight=np.concatenate([mass, 1 - mass])[:, 0]
    )
    assert auroc(mass, q) == pytest.approx(weighted, abs=1e-12)
    assert math.isnan(auroc(np.ones((4, 1)), q[:4])) and math.isnan(
        auroc(np.ones((2, 1)), np.full((2, 1), np.nan))
    )
    assert auroc(np.array([[1.0], [0.0], [0.0]]), np.array([[0.2], [0.9], [np.nan]])) == 0.0


def test_rouge_l_agrees_with_rouge_score():
    rng, scorer = np.random.default_rng(3), RougeScorer(["rougeL"], use_stemmer=False)
    for _ in range(50):
        a, b = (
            " ".join(rng.choice(["the", "Flu,", "gout", "0.35", "x-ray"], size=rng.integers(0, 12)))
            for _ in range(2)
        )
        assert rouge_l(words(a), words(b)) == pytest.approx(
            scorer.score(a, b)["rougeL"].fmeasure, abs=1e-12
        )


def test_overlap_by_hand():
    assert shared("a b c d".split(), "b c d e".split()) == 3 / 5
    assert shared("a b c d".split(), "b c d e".split(), 3) == 1 / 3
    assert math.isnan(shared(["a"], ["b"], 3))
    assert words("<think>No!</think><answer1>Gout</answer1><confidence1>0.5</confidence1>") == [
        "no",
        "gout",
        "0",
        "5",
    ]


def test_tv_distance_is_that_of_the_outcomes():
    mass, q = np.array([[0.5, 0.2]]), np.array([[0.3, 0.6]])
    said, true = (
        np.array([0.3, 0.6, 0.1]),
        np.array([0.5, 0.2, 0.3]),
    )  # the third outcome: none of these
    assert tv_distance(mass, q) == pytest.approx([np.abs(said - true).sum() / 2])
    assert tv_distance(mass, mass) == 0 and np.isnan(tv_distance(mass, np.array([[0.1, np.nan]])))


def test_regret_is_zero_for_the_best_set_alone():
    found = []
    for p in prompts(20):
        best = sorted(p.example.golds, key=lambda g: -g.probability)[:2]
        exact = np.array([[g.probability for g in best]])
        item = read_item(
            p, [(render(GRAMMAR, [g.name for g in best], [0.5, 0.5]), 9)], GRAMMAR, "text"
        )
        all_masses = np.array([[g.probability for g in p.example.golds]])
        assert (
            item.best_value
            == pytest.approx(set_value(exact, exact).item())
            == ceiling_value(all_masses, 2).item()
        )
        found.append(item)
    assert value(statistics(found, True)["regret"]) > 0  # right answers, dishonest confidences
    assert set_value(np.array([[0.5, 0.0]]), np.array([[0.5, np.nan]])) == pytest.approx(
        [0.5 - (0.25 + 1) / 2]
    )


@pytest.mark.parametrize("truth", ["exact", "uniform"])
def test_one_set_an_item_measures_what_training_measures(truth):
    rng, rollouts, found = np.random.default_rng(4), [], []
    for p in prompts(30, truth=truth):
        text, _ = next(texts(rng, 1))
        ids = np.array([ord(c) for c in text], np.int64)  # one character a token
        done = Completion(0, ids, ids * 0.0, ids * 0.0, "length")
        rollouts.append(
            judge_groups(
                [p], [[done]], Scorer(GRAMMAR, RewardSpec(), "text", lambda i: "".join(map(chr, i)))
            )[0][0]
        )
        found.append(read_item(p, [(text, len(text))], GRAMMAR, "text"))
    new = {name: value(s) for name, s in statistics(found, True).items()}
    assert set_metrics(rollouts, "text", True)[0] == pytest.approx(new, abs=1e-12)
    assert ("q_mse" in new) == (truth == "exact")
    assert new["format_rate"] < 1


def test_a_format_failure_is_wrong_in_every_metric():
    p = next(iter(prompts(1)))
    target = p.example.targets()[0].name
    good = render(GRAMMAR, [target, "x"], [0.9, 0.1])
    item = read_item(p, [(good + " trailing", 9), (good, 9)], GRAMMAR, "text")
    assert (
        item.sets[0].reason == "trailing_text"
        and item.sets[0].hits == (0, 0)
        and item.sets[0].mass == (0, 0)
    )
    found = {n: value(s) for n, s in statistics([item], True).items()}
    assert (
        found["format_rate"] == 0.5
        and found["recall@2"] == 0.5
        and found["pass@2"] == 0.5
        and found["pass@4"] == 1
    )
    q, mass = np.array([0.9, 0.1]), np.array(item.sets[1].mass)
    honest = (mass * (q - 1) ** 2 + (1 - mass) * q**2).sum()
    assert found["brier"] == pytest.approx(
        (2 + honest) / 4
    )  # the two unreadable slots are charged 1


def test_coverage_and_unique_answers_of_several_sets():
    p = Prompt(
        Example("e", "t", "?", (Gold("flu", ("grippe",)), Gold("gout")), "uniform", True), "?", (1,)
    )
    sets = [("flu", "x"), ("Grippe!", "gout"), ("x", "the X")]
    item = read_item(p, [(render(GRAMMAR, s, (0.5, 0.5)), 3) for s in sets], GRAMMAR, "text")
    each = curves([item])
    assert each["coverage"][0] == pytest.approx(
        [(1 + 2 + 0) / 3, (2 + 1 + 2) / 3, 2]
    )  # aliases are one gold
    assert each["unique"][0] == pytest.approx([(2 + 2 + 1) / 3, (3 + 2 + 3) / 3, 3])
    assert each["pass"][0] == pytest.approx([2 / 3, 1, 1])
    assert [s.repeated for s in item.sets] == [(False, False), (False, False), (False, True)]
    found = {n: value(s) for n, s in statistics([item], True).items()}
    assert (
        found["recall@2"] == pytest.approx(0.5)
        and found["precision"] == pytest.approx(3 / 6)
        and found["unique@6"] == 3
    )


def test_set_ece_and_top1_conf():
    p = Prompt(Example("e", "t", "?", (Gold("flu"),), "single"), "?", (1,))
    item = read_item(p, [(render(GRAMMAR, ("x", "flu"), (0.15, 0.8)), 3)], GRAMMAR, "text")
    found = {n: value(s) for n, s in statistics([item], True).items()}
    assert (
        found["top1"] == 0 and found["top1_conf"] == 1 and found["ece_top1"] == pytest.approx(0.15)
    )
    assert found["set_ece"] == pytest.approx(0.05)  # says .95 that one of them is right
    assert not {"brier", "ece", "auroc", "value"} & set(statistics([item], False))


def test_a_resample_is_the_metric_of_the_resampled_items():
    found = items()
    counts = resamples(len(found))[:5]
    again = [
        [item for item, n in zip(found, row, strict=True) for _ in range(int(n))] for row in counts
    ]
    original = statistics(found, True)
    for row, repeated in zip(counts, again, strict=True):
        for name, statistic in statistics(repeated, True).items():
            assert original[name].value(row @ original[name].columns).item() == pytest.approx(
                value(statistic), nan_ok=True
            ), name
    assert {"auroc", "ece", "set_ece", "overlap_rouge_l", "unique@8", "coverage@8"} <= set(original)


def test_intervals_cover_and_pairing_narrows_them():
    rng = np.random.default_rng(5)
    x, noise = rng.normal(size=500), rng.normal(size=500) * 0.1
    weights, a, b = resamples(500), mean_of(x), mean_of(x + 0.05 + noise)
    middle, low, high = estimate(a, weights)
    assert middle == pytest.approx(x.mean()) and (high - low) / 2 == pytest.approx(
        1.96 / math.sqrt(500), rel=0.1
    )
    gap, low, high = difference(b, a, weights)
    assert 0 < low < gap < high < 0.1 and gap == pytest.approx(0.05 + noise.mean())
    np.testing.assert_array_equal(weights, resamples(500))
    assert (
        weights.sum(1) == pytest.approx(500)
        and estimate(mean_of(np.full(3, np.nan)), resamples(3)) == [None] * 3
    )


def test_rows_come_back():
    import json

    for item in items(num=3):
        assert Item.from_row(json.loads(json.dumps(asdict(item)))) == item


def test_what_is_said_of_an_arm_by_hand():
    found = items(num=60)
    said = measured(Arm("policy", "", GRAMMAR, 4), found)
    slots = [
        pair
        for i in found
        for s in i.sets
        if s.reason is None
        for pair in zip(s.confidences, s.mass, strict=True)
    ]
    q, mass = np.array(slots).T
    at = np.minimum((q * 10).astype(int), 9)
    for b, told in zip(np.unique(at), said["reliability"], strict=True):
        assert told["count"] == (at == b).sum() and told["said"] == pytest.approx(q[at == b].mean())
        assert (
            told["right"][0] == pytest.approx(mass[at == b].mean())
            and told["right"][1] <= told["right"][0] <= told["right"][2]
        )
    unique = [len({key for s in i.sets for key in s.keys if key is not None}) for i in found]
    assert said["unique_histogram"] == {n: unique.count(n) for n in unique}
    assert (
        sum(said["format_failures"].values())
        == sum(s.reason is not None for i in found for s in i.sets)
        > 0
    )


def test_bars_agree_with_the_exact_floor():
    examples = [p.example for p in prompts(300)]
    p = np.array([[g.probability for g in e.golds] for e in examples])
    found = bars(examples, 7)
    exact = [floor_coverage(p, k).mean() for k in range(1, 6)]
    assert found["floor"][:5] == pytest.approx(exact, abs=0.003) and found["floor"][
        4:
    ] == pytest.approx([1] * 3)
    assert found["ceiling"][1] == pytest.approx(np.sort(p)[:, -2:].sum(1).mean())
    assert bars([next(iter(prompts(1, truth="uniform"))).example], 3) is None

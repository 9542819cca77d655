"""Metrics of several sets an item: against enumeration, scikit-learn and rouge-score. The
bootstrap: against resampling by hand."""

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score

from mar.answers.grammar import Grammar, render
from mar.answers.rewards import RewardSpec
from mar.measure.answer_sets import Item, item_of_texts
from mar.measure.baselines import Arm
from mar.measure.bootstrap import mean_of, paired_difference, resample_weights, with_interval
from mar.measure.bounds import ceiling_value, coverage_bounds, floor_coverage
from mar.measure.comparison import summarise_arm
from mar.measure.metrics import (
    METRICS,
    AnswerArrays,
    Metric,
    compute_metrics,
    ngram_jaccard,
    plain_words,
    ranking_quality,
    rouge_l,
    set_metrics,
    set_value,
    tv_distance,
    union_curve,
)
from mar.records import Completion, Example, Gold, Prompt
from mar.sample.rollout import Scorer, judge_groups

GRAMMAR = Grammar("rlcr_multi", 2, thinking=False)
NAMES = ("asthma", "flu", "gout", "migraine", "anaemia")


def prompts(num=40, seed=0, truth="exact"):
    """Questions with a random posterior over NAMES; each disease has an alias."""
    rng = np.random.default_rng(seed)
    for i in range(num):
        p = rng.dirichlet(np.ones(len(NAMES)))
        golds = tuple(Gold(name, (f"{name} disease",), x) for name, x in zip(NAMES, p, strict=True))
        drawn = int(rng.choice(len(NAMES), p=p)) if truth == "exact" else None
        example = Example(
            id=f"e{i:02}",
            task="test",
            question="?",
            golds=golds,
            truth=truth,
            multi_label=truth == "uniform",
            label=drawn,
        )
        yield Prompt(example, "?", (1,) * (5 + i % 3))


def texts(rng, num=4, grammar=GRAMMAR):
    """Sets with repeats, aliases, wrong answers, tied confidences and format failures."""
    for _ in range(num):
        answers = rng.choice([*NAMES, "flu disease", "nothing"], size=grammar.num_answers)
        text = render(grammar, list(answers), list(rng.integers(0, 21, grammar.num_answers) / 20))
        yield (text[:-7] if rng.random() < 0.15 else text), int(rng.integers(5, 30))


def items(seed=0, num=40, truth="exact", sets=4):
    rng = np.random.default_rng(seed + 1)
    return [
        item_of_texts(p, list(texts(rng, sets)), GRAMMAR, "text") for p in prompts(num, truth=truth)
    ]


def value(statistic):
    return statistic.value(statistic.columns.sum(0)).item()


def statistics(items, confident=True):
    return compute_metrics(AnswerArrays(items, confident))


def metrics(items):
    return {name: value(statistic) for name, statistic in statistics(items).items()}


# ---- Single metrics ----


def test_union_curve_is_the_mean_over_all_choices():
    rng = np.random.default_rng(1)
    seen = rng.random((5, 7)) < 0.3
    worth = rng.random(7)
    for m in range(1, 6):
        chosen = [worth @ seen[list(c)].any(0) for c in itertools.combinations(range(5), m)]
        assert union_curve(seen, worth)[m - 1] == pytest.approx(np.mean(chosen), abs=1e-12)


def test_union_curve_of_one_outcome_is_the_pass_at_k_estimator():
    seen = np.array([[1], [0], [1], [0], [0]], bool)
    expected = [1 - math.comb(3, k) / math.comb(5, k) for k in range(1, 6)]
    assert union_curve(seen, np.ones(1)) == pytest.approx(expected)


def auroc(mass, q):
    return value(ranking_quality(mass, q))


def test_auroc_agrees_with_scikit_learn():
    rng = np.random.default_rng(2)
    q = rng.integers(0, 11, (300, 1)) / 10
    y = (rng.random((300, 1)) < 0.4).astype(float)
    assert auroc(y, q) == pytest.approx(roc_auc_score(y, q), abs=1e-12)
    # A mass is that share of a right answer, and the rest of a wrong one.
    mass = rng.random((300, 1))
    labels = np.concatenate([np.ones(300), np.zeros(300)])
    weights = np.concatenate([mass, 1 - mass])[:, 0]
    weighted = roc_auc_score(labels, np.tile(q[:, 0], 2), sample_weight=weights)
    assert auroc(mass, q) == pytest.approx(weighted, abs=1e-12)


def test_auroc_without_a_pair_is_undefined():
    q = np.array([[0.1], [0.5], [0.5], [0.9]])
    assert math.isnan(auroc(np.ones((4, 1)), q))
    assert math.isnan(auroc(np.ones((2, 1)), np.full((2, 1), np.nan)))
    y = np.array([[1.0], [0.0], [0.0]])
    assert auroc(y, np.array([[0.2], [0.9], [np.nan]])) == 0.0


def test_rouge_l_agrees_with_rouge_score():
    rng = np.random.default_rng(3)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    vocabulary = ["the", "Flu,", "gout", "0.35", "x-ray"]
    for _ in range(50):
        a = " ".join(rng.choice(vocabulary, size=rng.integers(0, 12)))
        b = " ".join(rng.choice(vocabulary, size=rng.integers(0, 12)))
        expected = scorer.score(a, b)["rougeL"].fmeasure
        assert rouge_l(plain_words(a), plain_words(b)) == pytest.approx(expected, abs=1e-12)


def test_overlap_by_hand():
    assert ngram_jaccard("a b c d".split(), "b c d e".split()) == 3 / 5
    assert ngram_jaccard("a b c d".split(), "b c d e".split(), 3) == 1 / 3
    assert math.isnan(ngram_jaccard(["a"], ["b"], 3))
    text = "<think>No!</think><answer1>Gout</answer1><confidence1>0.5</confidence1>"
    assert plain_words(text) == ["no", "gout", "0", "5"]


def test_tv_distance_is_that_of_the_outcomes():
    mass = np.array([[0.5, 0.2]])
    q = np.array([[0.3, 0.6]])
    # The third outcome: none of these.
    said = np.array([0.3, 0.6, 0.1])
    true = np.array([0.5, 0.2, 0.3])
    assert tv_distance(mass, q) == pytest.approx([np.abs(said - true).sum() / 2])
    assert tv_distance(mass, mass) == 0
    assert np.isnan(tv_distance(mass, np.array([[0.1, np.nan]])))


def test_regret_is_zero_for_the_best_set_alone():
    found = []
    for p in prompts(20):
        golds = p.example.golds
        best = sorted(golds, key=lambda gold: -gold.probability)[:2]
        right_but_dishonest = render(GRAMMAR, [gold.name for gold in best], [0.5, 0.5])
        item = item_of_texts(p, [(right_but_dishonest, 9)], GRAMMAR, "text")
        exact = np.array([[gold.probability for gold in best]])
        all_masses = np.array([[gold.probability for gold in golds]])
        assert item.best_value == ceiling_value(all_masses, 2).item()
        assert item.best_value == pytest.approx(set_value(exact, exact).item())
        found.append(item)
    assert metrics(found)["regret"] > 0


def test_a_slot_without_a_confidence_costs_one_in_the_value():
    mass = np.array([[0.5, 0.0]])
    q = np.array([[0.5, np.nan]])
    assert set_value(mass, q) == pytest.approx([0.5 - (0.25 + 1) / 2])


# ---- Items ----


@pytest.mark.parametrize("truth", ["exact", "uniform"])
def test_one_set_an_item_measures_what_training_measures(truth):
    rng = np.random.default_rng(4)
    scorer = Scorer(GRAMMAR, RewardSpec(), "text", lambda ids: "".join(map(chr, ids)))
    rollouts = []
    found = []
    for p in prompts(30, truth=truth):
        text, _ = next(texts(rng, 1))
        ids = np.array([ord(c) for c in text], np.int64)  # one character a token
        done = Completion(0, ids, ids * 0.0, ids * 0.0, "length")
        rollouts.append(judge_groups([p], [[done]], scorer)[0][0])
        found.append(item_of_texts(p, [(text, len(text))], GRAMMAR, "text"))
    of_texts = metrics(found)
    of_rollouts, _ = set_metrics(rollouts, True)
    assert of_rollouts == pytest.approx(of_texts, abs=1e-12)
    assert ("q_mse" in of_texts) == (truth == "exact")
    assert of_texts["format_rate"] < 1


def test_a_format_failure_is_wrong_in_every_metric():
    p = next(iter(prompts(1)))
    target = p.example.targets()[0].name
    good = render(GRAMMAR, [target, "x"], [0.9, 0.1])
    item = item_of_texts(p, [(good + " trailing", 9), (good, 9)], GRAMMAR, "text")
    failed, right = item.sets
    assert failed.reason == "trailing_text"
    assert failed.hits == (0, 0)
    assert failed.mass == (0, 0)
    found = metrics([item])
    assert found["format_rate"] == 0.5
    assert found["recall@2"] == 0.5
    assert found["pass@2"] == 0.5
    assert found["pass@4"] == 1
    # The two unreadable slots are charged 1.
    q = np.array([0.9, 0.1])
    mass = np.array(right.mass)
    expected_loss = (mass * (q - 1) ** 2 + (1 - mass) * q**2).sum()
    assert found["brier"] == pytest.approx((2 + expected_loss) / 4)


def test_coverage_and_unique_answers_of_several_sets():
    golds = (Gold("flu", ("grippe",)), Gold("gout"))
    p = Prompt(Example("e", "t", "?", golds, "uniform", True), "?", (1,))
    sets = [("flu", "x"), ("Grippe!", "gout"), ("x", "the X")]
    written = [(render(GRAMMAR, answers, (0.5, 0.5)), 3) for answers in sets]
    item = item_of_texts(p, written, GRAMMAR, "text")
    arrays = AnswerArrays([item], True)
    # Two aliases are one gold.
    assert arrays.coverage_curve[0] == pytest.approx([(1 + 2 + 0) / 3, (2 + 1 + 2) / 3, 2])
    assert arrays.unique_curve[0] == pytest.approx([(2 + 2 + 1) / 3, (3 + 2 + 3) / 3, 3])
    assert arrays.pass_curve[0] == pytest.approx([2 / 3, 1, 1])
    assert [s.repeated for s in item.sets] == [(False, False), (False, False), (False, True)]
    found = metrics([item])
    assert found["recall@2"] == pytest.approx(0.5)
    assert found["precision"] == pytest.approx(3 / 6)
    assert found["unique@6"] == 3


def test_sets_together_cover_no_more_golds_than_there_are():
    """Two clusters share an alias: the curve of three sets was 1, 2, 3 of two golds."""
    golds = (Gold("cat", ("pet",)), Gold("dog", ("pet",)))
    asked = Prompt(Example("e", "t", "?", golds, "uniform", True), "?", (1,))
    sets = [("pet", "x"), ("cat", "x"), ("dog", "x")]
    written = [(render(GRAMMAR, answers, (0.5, 0.5)), 3) for answers in sets]
    item = item_of_texts(asked, written, GRAMMAR, "text")
    assert AnswerArrays([item], True).coverage_curve[0] == pytest.approx([1, 2, 2])
    assert Item.from_row(json.loads(json.dumps(asdict(item)))) == item
    # where no answer is ambiguous nothing is matched, and nothing more is stored
    plain = item_of_texts(asked, written[1:], GRAMMAR, "text")
    assert plain.gold_worth == () and plain.sets[0].fits == ()


def test_an_exact_mass_is_counted_once():
    golds = (Gold("cat", ("pet",), 0.7), Gold("dog", ("pet",), 0.3))
    asked = Prompt(Example("e", "t", "?", golds, "exact", label=0), "?", (1,))
    written = [(render(GRAMMAR, (answer, "x"), (0.5, 0.5)), 3) for answer in ("pet", "cat")]
    item = item_of_texts(asked, written, GRAMMAR, "text")
    assert AnswerArrays([item], True).coverage_curve[0] == pytest.approx([0.7, 1.0])


def test_precision_is_of_the_answers_written():
    asked = Prompt(Example("e", "t", "?", (Gold("flu"), Gold("gout")), "uniform", True), "?", (1,))
    texts = [(render(GRAMMAR, ("flu", "x"), (0.5, 0.5)), 3), ("<answer1>flu</answer1>", 2)]
    item = item_of_texts(asked, texts, GRAMMAR, "text")
    # three answers were written; the one of the set without the right form counts as wrong
    assert metrics([item])["precision"] == pytest.approx(1 / 3)


def test_items_with_and_without_a_posterior_give_the_same_in_any_order():
    known = Example("k", "t", "?", (Gold("flu", (), 0.8), Gold("cold", (), 0.2)), "exact", label=0)
    unknown = Example("u", "t", "?", (Gold("gout"),), "single")
    items = []
    for asked in (known, unknown):
        text = render(GRAMMAR, (asked.golds[0].name, "x"), (0.5, 0.1))
        items.append(item_of_texts(Prompt(asked, "?", (1,)), [(text, 3)], GRAMMAR, "text"))
    found = metrics(items)
    assert found == metrics(items[::-1])
    alone = metrics(items[:1])
    for name in ("q_mse", "tv_distance", "value", "regret"):
        assert found[name] == alone[name]
    assert "q_mse" not in metrics(items[1:])


def test_set_ece_and_top1_conf():
    p = Prompt(Example("e", "t", "?", (Gold("flu"),), "single"), "?", (1,))
    item = item_of_texts(p, [(render(GRAMMAR, ("x", "flu"), (0.15, 0.8)), 3)], GRAMMAR, "text")
    found = metrics([item])
    assert found["top1"] == 0
    assert found["top1_conf"] == 1
    assert found["ece_top1"] == pytest.approx(0.15)
    assert found["set_ece"] == pytest.approx(0.05)  # it says 0.95 that one of them is right
    assert not {"brier", "ece", "auroc", "value"} & set(statistics([item], confident=False))


def test_rows_come_back():
    for item in items(num=3):
        assert Item.from_row(json.loads(json.dumps(asdict(item)))) == item


def test_a_metric_is_a_function_and_an_entry(monkeypatch):
    """What the docstring of metrics.py promises."""

    def longest_answer(arrays):
        lengths = [[len(s.answers[0]) for s in item.sets] for item in arrays.items]
        return mean_of(np.array(lengths))

    several = Metric(longest_answer, applies=lambda arrays: arrays.num_sets > 1)
    monkeypatch.setitem(METRICS, "length_of_first@{all}", several)
    found = metrics(items(num=3, sets=4))
    assert 3 <= found["length_of_first@8"] <= len("flu disease")
    assert "length_of_first@2" not in metrics(items(num=3, sets=1))


# ---- Intervals ----


def test_a_resample_is_the_metric_of_the_resampled_items():
    found = items()
    original = statistics(found)
    assert {"auroc", "ece", "set_ece", "overlap_rouge_l", "unique@8", "coverage@8"} <= set(original)
    for weights in resample_weights(len(found))[:5]:
        repeated = []
        for item, times in zip(found, weights, strict=True):
            repeated += [item] * int(times)
        for name, expected in metrics(repeated).items():
            statistic = original[name]
            resampled = statistic.value(weights @ statistic.columns).item()
            assert resampled == pytest.approx(expected, nan_ok=True), name


def test_intervals_cover_and_pairing_narrows_them():
    rng = np.random.default_rng(5)
    x = rng.normal(size=500)
    noise = rng.normal(size=500) * 0.1
    weights = resample_weights(500)
    a = mean_of(x)
    b = mean_of(x + 0.05 + noise)
    middle, low, high = with_interval(a, weights)
    assert middle == pytest.approx(x.mean())
    assert (high - low) / 2 == pytest.approx(1.96 / math.sqrt(500), rel=0.1)
    gap, low, high = paired_difference(b, a, weights)
    assert 0 < low < gap < high < 0.1
    assert gap == pytest.approx(0.05 + noise.mean())


def test_resampling_is_the_same_each_time():
    weights = resample_weights(500)
    np.testing.assert_array_equal(weights, resample_weights(500))
    assert weights.sum(1) == pytest.approx(500)


def test_an_undefined_metric_has_no_interval():
    assert with_interval(mean_of(np.full(3, np.nan)), resample_weights(3)) == [None] * 3


# ---- Arms and bounds ----


def test_what_is_said_of_an_arm_by_hand():
    found = items(num=60)
    summary = summarise_arm(Arm("policy", "", GRAMMAR, 4), found)
    sets = [s for item in found for s in item.sets]

    readable = [s for s in sets if s.reason is None]
    q = np.array([s.confidences for s in readable]).ravel()
    mass = np.array([s.mass for s in readable]).ravel()
    bin_of_slot = np.minimum((q * 10).astype(int), 9)
    for number, said in zip(np.unique(bin_of_slot), summary["reliability"], strict=True):
        inside = bin_of_slot == number
        right, low, high = said["right"]
        assert said["count"] == inside.sum()
        assert said["said"] == pytest.approx(q[inside].mean())
        assert right == pytest.approx(mass[inside].mean())
        assert low <= right <= high

    unique = [len({key for s in item.sets for key in s.keys if key is not None}) for item in found]
    assert summary["unique_histogram"] == {n: unique.count(n) for n in unique}
    num_failed = sum(s.reason is not None for s in sets)
    assert sum(summary["format_failures"].values()) == num_failed > 0


def test_coverage_bounds_agree_with_the_exact_floor():
    examples = [p.example for p in prompts(300)]
    p = np.array([[gold.probability for gold in e.golds] for e in examples])
    bounds = coverage_bounds(examples, 7)
    exact = [floor_coverage(p, k).mean() for k in range(1, 6)]
    assert bounds["floor"][:5] == pytest.approx(exact, abs=0.003)
    assert bounds["floor"][4:] == pytest.approx([1] * 3)  # five golds in all
    assert bounds["ceiling"][1] == pytest.approx(np.sort(p)[:, -2:].sum(1).mean())


def test_without_a_known_posterior_there_are_no_coverage_bounds():
    assert coverage_bounds([next(iter(prompts(1, truth="uniform"))).example], 3) is None

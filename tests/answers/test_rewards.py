"""Rewards: hand-computed values, every switch, stopping times, and what an honest policy gains."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mar.answers.grammar import Grammar, parse, render
from mar.answers.reward_spec import BRIERS, COVERAGES, DUPLICATES, RewardSpec
from mar.answers.rewards import (
    component_layout,
    confidence_components,
    confidence_segments,
    first_open,
    reward,
    reward_of,
)
from mar.errors import UserError
from mar.records import Gold
from mar.run.compose import compose
from mar.verify.matching import matching_increments, repeats

GOLDS = (Gold("flu", ("influenza",)), Gold("cold"), Gold("gout"), Gold("mumps"))


def earn(text, grammar, spec, golds=GOLDS):
    parsed = parse(text, grammar)
    hits, _ = matching_increments(parsed.answers, golds)
    return reward(parsed, hits, repeats(parsed.answers, golds), len(golds), grammar, spec)


def objective(name, num_answers=1, **changes):
    r = compose([f"reward={name}", f"reward.num_answers={num_answers}"]).reward
    return Grammar(r.form, num_answers), dataclasses.replace(reward_of(r), **changes)


def of(grammar, answers, confidences=(), other=0.0):
    return render(grammar, answers, confidences, thinking="hm", other=other)


# --- the four objectives -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answers", "confidences", "total"),
    [
        ("rlvr_single", ["flu"], [], 0.5 + 1),
        ("rlvr_single", ["lupus"], [], 0.5),
        ("rlcr_single", ["flu"], [0.7], 0.5 + 1 - 0.09),
        ("rlcr_single", ["lupus"], [0.7], 0.5 - 0.49),
        ("multi_rlvr", ["flu", "lupus", "cold"], [], 0.5 + 2),
        (
            "multi_rlcr",
            ["flu", "lupus", "cold"],
            [0.8, 0.3, 0.5],
            0.5 + 2 - (0.04 + 0.09 + 0.25) / 3,
        ),
        (
            "multi_rlcr",
            ["flu", "Influenza", "cold"],
            [0.8, 0.3, 0.5],
            0.5 + 2 - (0.04 + 0.09 + 0.25) / 3,
        ),
    ],
)
def test_objectives_by_hand(name, answers, confidences, total):
    grammar, spec = objective(name, len(answers))
    earned = earn(of(grammar, answers, confidences), grammar, spec)
    assert earned.total == pytest.approx(total)
    assert earned.components.sum() == pytest.approx(total)


@pytest.mark.parametrize(
    ("name", "total"),
    [("rlvr_single", 0), ("rlcr_single", -1), ("multi_rlvr", 0), ("multi_rlcr", -1)],
)
def test_unreadable_text_earns_nothing_and_is_charged_the_whole_brier_term(name, total):
    grammar, spec = objective(name, 3 if "multi" in name else 1)
    assert earn("what?", grammar, spec).total == total


# hits 1 0 1
ANSWERS = ["flu", "lupus", "cold"]
CONFIDENCES = [0.8, 0.3, 0.4]
BRIER = (0.04 + 0.09 + 0.36) / 3


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({}, 0.5 + 2 - BRIER),
        ({"coverage": "any"}, 0.5 + 1 - BRIER),
        ({"coverage": "fraction_golds"}, 0.5 + 2 / 4 - BRIER),
        ({"coverage": "fraction_answers"}, 0.5 + 2 / 3 - BRIER),
        ({"brier": "none"}, 0.5 + 2),
        (
            {"brier": "released", "coverage_weight": 0.5, "brier_weight": 0.5},
            0.5 + 1 + 0.5 * (1 - BRIER),
        ),
        ({"rank_weights": (1.0, 0.5, 0.25)}, 0.5 + 1.25 - BRIER),
        ({"rank_weights": (1.0, 0.5, 0.25), "coverage": "any"}, 0.5 + 1 - BRIER),
        ({"format_weight": 2.0, "coverage_weight": 3.0, "brier_weight": 0.1}, 2 + 6 - 0.1 * BRIER),
        ({"sum_rule": True}, -1),  # 0.8 + 0.3 + 0.4 > 1
        ({"sum_rule": True, "gate": False}, 2 - BRIER),
        ({"sum_rule": True, "brier": "released"}, 0.5 + 2),  # its bracket alone
        ({"duplicates": "gate"}, 0.5 + 2 - BRIER),
        ({"gate": False}, 0.5 + 2 - BRIER),
    ],
)
def test_switches_by_hand(changes, total):
    grammar, spec = objective("multi_rlcr", 3, **changes)
    earned = earn(of(grammar, ANSWERS, CONFIDENCES), grammar, spec)
    assert earned.total == pytest.approx(total)
    assert earned.components.sum() == pytest.approx(total)
    assert earned.parts["sum_rule_breach"] == float("sum_rule" in changes)


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({}, -1),  # gate: no format, no coverage, Brier charged in full
        ({"gate": False}, 1 - (0.04 + 0.09 + 1) / 3),  # the missing third slot is charged 1
        ({"gate": False, "coverage": "any"}, 1 - (0.04 + 0.09 + 1) / 3),
        ({"brier": "released"}, 0),
        ({"brier": "released", "gate": False}, 1),  # its bracket is always gated by the format
        ({"brier": "none"}, 0),
        ({"brier": "none", "gate": False}, 1),
    ],
)
def test_a_format_failure_by_hand(changes, total):
    grammar, spec = objective("multi_rlcr", 3, **changes)
    text = of(grammar, ANSWERS, CONFIDENCES).split("<answer3>")[0]
    assert earn(text, grammar, spec).total == pytest.approx(total)


def test_a_repeat_under_both_rules():
    grammar, spec = objective("multi_rlcr", 3)
    text = of(grammar, ["flu", "the Flu", "cold"], CONFIDENCES)
    assert earn(text, grammar, spec).total == pytest.approx(0.5 + 2 - BRIER)
    gated = earn(text, grammar, dataclasses.replace(spec, duplicates="gate"))
    # the Brier term stays: repeating is no way out of it
    assert gated.total == pytest.approx(0.5 - BRIER)
    assert gated.parts["repeats"] == 1
    released = dataclasses.replace(spec, brier="released")
    assert earn(text, grammar, released).total == pytest.approx(0.5 + 2 + 1 - BRIER)
    # the bracket goes with the coverage
    gated = earn(text, grammar, dataclasses.replace(released, duplicates="gate"))
    assert gated.total == pytest.approx(0.5)
    assert gated.components.sum() == pytest.approx(0.5)


def test_other_is_charged_against_no_answer_hit():
    grammar, spec = Grammar("rlcr_multi", 2, other=True), RewardSpec()
    hit, miss = (of(grammar, [a, "lupus"], [0.6, 0.1], other=0.3) for a in ("flu", "rabies"))
    assert earn(hit, grammar, spec).total == pytest.approx(0.5 + 1 - (0.16 + 0.01 + 0.09) / 2)
    assert earn(miss, grammar, spec).total == pytest.approx(0.5 - (0.36 + 0.01 + 0.49) / 2)
    assert earn("", grammar, spec).total == pytest.approx(-3 / 2)
    ruled = dataclasses.replace(spec, sum_rule=True)
    for other, breach in [(0.3, 0), (0.31, 1)]:
        text = of(grammar, ["flu", "cold"], [0.6, 0.1], other)
        assert earn(text, grammar, ruled).parts["sum_rule_breach"] == breach


def test_confidences_that_add_up_to_one_pass_the_sum_rule():
    grammar, spec = objective("multi_rlcr", 3, sum_rule=True)
    for confidences, breach in [
        ([0.33, 0.33, 0.34], 0),
        ([0.7, 0.2, 0.1], 0),
        ([0.34, 0.33, 0.34], 1),
    ]:
        earned = earn(of(grammar, ANSWERS, confidences), grammar, spec)
        assert earned.parts["sum_rule_breach"] == breach
    twenty = Grammar("rlcr_multi", 20)
    earned = earn(of(twenty, [f"x{k}" for k in range(20)], [0.05] * 20), twenty, spec)
    assert earned.parts["sum_rule_breach"] == 0


# --- components ----------------------------------------------------------------------------------


def test_what_belongs_to_confidences_follows_the_elements():
    """Also `<other>`, and the thoughts about them; the last component and segment never do."""
    spec = RewardSpec()
    grammar = Grammar("rlcr_multi", 2, thinking=True, other=True)
    # think, answer 1, confidence 1, answer 2, confidence 2, other, what follows
    assert confidence_components(grammar, spec).tolist() == [False, True, False, True, True, False]
    assert confidence_segments(grammar).tolist() == [False, False, True, False, True, True, False]
    split = Grammar("rlcr_multi", 2, "split", thinking=False, analysis=True)
    assert confidence_components(split, spec).tolist() == [False, False, True, True, False]
    assert confidence_segments(split).tolist() == [False, False, True, True, True, False]
    plain = Grammar("rlvr_single", 1, thinking=False)
    without = RewardSpec(brier="none")
    assert not confidence_components(plain, without).any() and not confidence_segments(plain).any()


@pytest.mark.parametrize("text", ["<answer1>flu</answer1><confidence1>0.5</confidence1>", "so"])
def test_the_components_of_the_terms_add_up_to_those_of_the_reward(text):
    """Per unit of weight: the same components with other weights, and nothing for a weight of 0."""
    grammar = Grammar("rlcr_multi", 2, thinking=False)

    def earned(**weights):
        return reward(
            parse(text, grammar), [1.0, 0.0], [False] * 2, 1, grammar, RewardSpec(**weights)
        )

    one = earned(brier_weight=0.25, coverage_weight=2.0)
    np.testing.assert_allclose(one.term_weights @ one.terms, one.components, atol=1e-15)
    np.testing.assert_allclose(one.terms, earned().terms, atol=1e-15)
    np.testing.assert_allclose(one.terms.sum(1) * one.term_weights, list(one.parts.values())[:3])
    assert one.terms.shape == (3, 5) and one.term_weights.tolist() == [0.5, 2.0, 0.25]
    assert earned(brier_weight=0.0).terms[2].tolist() == [0.0] * 5


def test_layout_and_first_open_follow_the_elements():
    grammar, spec = objective("multi_rlcr", 2)
    names = [name for name, _ in component_layout(grammar, spec)]
    assert names == ["coverage1", "brier1", "coverage2", "brier2", "end"]
    #                 think a1 c1 a2 c2 after
    assert first_open(grammar, spec).tolist() == [0, 0, 1, 2, 3, 4]
    split = Grammar("rlcr_multi", 2, layout="split", analysis=True, other=True)
    names = [name for name, _ in component_layout(split, spec)]
    assert names == ["coverage1", "coverage2", "brier1", "brier2", "other", "end"]
    #                think a1 a2 analysis c1 c2 other after
    assert first_open(split, spec).tolist() == [0, 0, 1, 2, 2, 3, 4, 5]
    without_brier = dataclasses.replace(spec, brier="none")
    assert first_open(grammar, without_brier).tolist() == [0, 0, 1, 1, 2, 2]


def test_components_by_hand():
    grammar, spec = objective("multi_rlcr", 2)
    text = of(grammar, ["flu", "lupus"], [0.8, 0.4])
    earned = earn(text, grammar, spec)
    np.testing.assert_allclose(earned.components, [1, -0.02, 0, -0.08, 0.5])
    cut = earn(text.removesuffix("</confidence2>"), grammar, spec)
    # the last component takes back what the prefixes were paid
    np.testing.assert_allclose(cut.components, [1, -0.02, 0, 0, -1 - 0.98])
    released = earn(text, grammar, dataclasses.replace(spec, brier="released"))
    np.testing.assert_allclose(released.components, [1, -0.02, 0, -0.08, 1.5])


SPECS = st.builds(
    RewardSpec,
    coverage=st.sampled_from(sorted(COVERAGES)),
    brier=st.sampled_from(BRIERS),
    sum_rule=st.booleans(),
    duplicates=st.sampled_from(DUPLICATES),
    rank_weights=st.sampled_from([(), (2.0, 0.5)]),
    format_weight=st.sampled_from([0.5, 0.0]),
    coverage_weight=st.sampled_from([1.0, 0.3]),
    brier_weight=st.sampled_from([1.0, 0.7]),
)


@st.composite
def texts(draw):
    """(grammar of two answers, a text that is right, or nearly)."""
    split = draw(st.booleans())
    grammar = Grammar(
        form="rlcr_multi",
        num_answers=2,
        layout="split" if split else "interleaved",
        thinking=draw(st.booleans()),
        analysis=split,
        other=draw(st.booleans()),
    )
    names = st.sampled_from(["flu", "The flu", "influenza", "cold", "lupus"])
    levels = st.sampled_from([0.0, 0.3, 0.7, 1.0])
    text = render(
        grammar, [draw(names), draw(names)], [draw(levels), draw(levels)], other=draw(levels)
    )
    if draw(st.booleans()):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.sampled_from([0, 0, 1, 3, 20, 200])))
        scrap = draw(st.sampled_from(["", "x", "</think>", "<answer1>cold</answer1>", "9"]))
        text = text[:start] + scrap + text[stop:]
    return grammar, text


@settings(max_examples=150, deadline=None)
@given(texts(), SPECS, st.booleans())
def test_a_component_is_settled_when_its_element_closes(case, spec, gate):
    grammar, text = case
    spec = dataclasses.replace(spec, gate=gate)
    full = earn(text, grammar, spec)
    ends = parse(text, grammar).ends
    terms = [full.parts[name] for name in ("format", "coverage", "brier")]
    assert full.components.sum() == pytest.approx(full.total, abs=1e-12)
    assert sum(terms) == pytest.approx(full.total, abs=1e-12)
    layout = component_layout(grammar, spec)
    for length in {0, len(text), *ends, *(end - 1 for end in ends), *range(0, len(text), 17)}:
        prefix = earn(text[:length], grammar, spec)
        assert prefix.components.sum() == pytest.approx(prefix.total, abs=1e-12)
        for c, (_, element) in enumerate(layout[:-1]):
            decided = element < len(ends) and ends[element] <= length
            assert prefix.components[c] == (full.components[c] if decided else 0.0)


# --- incentives ----------------------------------------------------------------------------------


def value(confidences, probabilities, spec):
    """E[total] - format of a completion whose answers hit independently, over every outcome."""
    K = len(confidences)
    grammar = Grammar("rlcr_multi", K)
    parsed = parse(of(grammar, [f"x{k}" for k in range(K)], confidences), grammar)
    worth = 0.0
    for hits in itertools.product([0.0, 1.0], repeat=K):
        chance = math.prod(p if y else 1 - p for p, y in zip(probabilities, hits, strict=True))
        worth += chance * reward(parsed, hits, (False,) * K, K, grammar, spec).total
    return worth - spec.format_weight


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("p", [0.05, 0.35, 0.8])
def test_an_honest_confidence_is_best_and_the_slot_is_worth_p_less_its_variance_over_K(K, p):
    spec, rest = RewardSpec(), [0.5] * (K - 1)
    levels = [n / 100 for n in range(0, 101, 5)]
    values = [value([q, *rest], [p, *rest], spec) for q in levels]
    assert levels[int(np.argmax(values))] == p
    others = (K - 1) * (0.5 - 0.25 / K)
    assert max(values) == pytest.approx(p - p * (1 - p) / K + others)


def test_the_trap_of_any_hit_with_brier_and_why_the_sum_is_the_default():
    p = (0.8, 0.7, 0.3)
    trap = RewardSpec(coverage="any")
    junk = (0.8, 0.7, 0.0)  # a third answer that cannot be right, and says so
    gain = value(p, p, trap) - value(junk, junk, trap)
    # an honest third guess adds 0.018 coverage and costs 0.07 Brier
    assert gain == pytest.approx(0.2 * 0.3 * 0.3 - 0.3 * 0.7 / 3)
    assert gain < 0
    spec = RewardSpec()
    gain = value(p, p, spec) - value(junk, junk, spec)
    assert gain == pytest.approx(0.3 - 0.07)


@settings(max_examples=60, deadline=None)
@given(texts(), st.booleans())
def test_malformed_text_never_beats_the_same_values_written_properly(case, gate):
    grammar, text = case
    spec = RewardSpec(gate=gate, format_weight=0.0)
    parsed = parse(text, grammar)
    said = [q for q in (*parsed.confidences, parsed.other) if q is not None]
    assume(all(q == round(q, 2) for q in said))  # `render` writes two digits
    proper = render(
        grammar,
        [answer or f"unknown {k}" for k, answer in enumerate(parsed.answers)],
        [0.0 if q is None else q for q in parsed.confidences],
        other=parsed.other or 0.0,
    )
    nothing = earn("", grammar, spec).total
    malformed = earn(text, grammar, spec).total
    assert nothing <= malformed <= earn(proper, grammar, spec).total + 1e-12


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{"coverage": "most"}, {"brier": "log"}, {"duplicates": "ban"}])
def test_unknown_names_are_refused(choice):
    with pytest.raises(UserError, match="coverage is one of sum, any"):
        RewardSpec(**choice)


@pytest.mark.parametrize(
    ("form", "spec"),
    [
        ("rlvr_multi", RewardSpec(brier="paper")),
        ("rlvr_multi", RewardSpec(brier="none", sum_rule=True)),
        ("rlcr_multi", RewardSpec(rank_weights=(1.0, 0.5))),
    ],
)
def test_a_reward_that_the_grammar_cannot_feed_is_refused(form, spec):
    with pytest.raises(UserError, match=r"reward\."):
        component_layout(Grammar(form, 3), spec)


def test_a_coverage_of_ones_own_is_one_function_and_one_entry(monkeypatch):
    def second_answer_only(hits, num_golds):
        return [hit * (k == 1) / num_golds for k, hit in enumerate(hits)]

    monkeypatch.setitem(COVERAGES, "second", second_answer_only)
    grammar = Grammar("rlvr_multi", 2)
    spec = RewardSpec(coverage="second", brier="none", format_weight=0.0)
    earned = earn(of(grammar, ["flu", "cold"]), grammar, spec)
    assert earned.total == earned.parts["coverage"] == 1 / len(GOLDS)


def test_every_objective_fits_its_form():
    for name in ("rlvr_single", "rlcr_single", "multi_rlvr", "multi_rlcr"):
        assert component_layout(*objective(name))[-1][0] == "end", name

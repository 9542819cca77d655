"""One test for each mistake of the paper's released code in reading, verifying or rewarding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mar.answers.grammar import Grammar, parse, render
from mar.answers.rewards import RewardSpec, reward
from mar.records import Gold
from mar.verify.matching import matching_increments, repeats, text_verifier
from mar.verify.normaliser import normalise
from mar.verify.verifiers import VERIFIERS
from mar_kernels import answer_advantages

GRAMMAR, SPEC = Grammar("rlcr_multi", 3), RewardSpec()
FLU = (Gold("influenza", ("flu", "grippe")),)


def earn(text, golds, grammar=GRAMMAR, spec=SPEC, verifier="text"):
    parsed = parse(text, grammar)
    hits, _ = matching_increments(parsed.answers, golds, VERIFIERS[verifier])
    return reward(parsed, hits, repeats(parsed.answers, golds), len(golds), grammar, spec)


def text(answers, confidences=(0.5, 0.5, 0.0)):
    return render(GRAMMAR, answers, confidences, thinking="hm")


def test_golds_of_one_item_are_not_accepted_for_the_next():
    items = [(("Paris",), "paris"), (("Rome",), "rome"), (("Paris", "Rome"), "oslo")]
    for names, own in items:
        golds = tuple(Gold(name) for name in names)
        accepted = [
            city for city in ("paris", "rome", "oslo") if any(matching_increments([city], golds)[0])
        ]
        assert accepted == [name.lower() for name in names], own


def test_spellings_of_one_answer_count_once():
    # two golds, so that only the wording stops a second hit
    golds = (*FLU, Gold("flu season", ("Flu.", "the flu")))
    earned = earn(text(["flu", "Flu.", "the flu"]), golds)
    assert (earned.parts["coverage"], earned.parts["repeats"]) == (1, 2)


def test_aliases_of_one_gold_count_once():
    earned = earn(text(["flu", "influenza", "grippe"]), (*FLU, Gold("gout")))
    assert (earned.parts["coverage"], earned.parts["repeats"]) == (1, 2)


def test_answers_inside_the_thinking_are_not_read():
    inside = "<think><answer1>flu</answer1><confidence1>1.0</confidence1></think>"
    assert parse(inside, GRAMMAR).answers == (None, None, None)
    assert earn(inside, FLU).parts["coverage"] == 0
    after = text(["lupus", "gout", "mumps"]).replace("hm", "<answer1>flu</answer1>")
    assert parse(after, GRAMMAR).answers == ("lupus", "gout", "mumps")


def test_a_tag_that_occurs_twice_has_one_reading():
    """The one parser reads neither the first nor the last of two: it stops at the second."""
    twice = text(["lupus", "gout", "mumps"]) + "<answer1>flu</answer1>"
    assert parse(twice, GRAMMAR).answers[0] == "lupus"
    assert parse(twice, GRAMMAR).reason == "trailing_text"
    early = text(["lupus", "gout", "mumps"]).replace("<answer2>", "<answer1>flu</answer1><answer2>")
    assert parse(early, GRAMMAR).answers == ("lupus", None, None)


def test_answers_out_of_order_fail_the_format():
    def reason(*order):
        answers = [f"<answer{k}>x{k}</answer{k}><confidence{k}>0.1</confidence{k}>" for k in order]
        return parse("<think></think>" + "".join(answers), GRAMMAR).reason

    assert reason(1, 2, 3) is None
    for order in [(2, 1, 3), (1, 3, 2), (3, 2, 1)]:
        assert reason(*order) == "text_outside_tags"


def test_float_noise_does_not_break_the_sum_rule():
    noisy = [(0.33, 0.56, 0.11), (0.55, 0.34, 0.11), (0.34, 0.56, 0.1)]
    assert all(sum(confidences) > 1 for confidences in noisy)
    for confidences in [*noisy, (0.33, 0.33, 0.34)]:
        earned = earn(
            text(["flu", "gout", "mumps"], confidences), FLU, spec=RewardSpec(sum_rule=True)
        )
        assert earned.parts["sum_rule_breach"] == 0


def test_every_item_is_graded_by_its_own_verifier(monkeypatch):
    monkeypatch.setitem(VERIFIERS, "length", lambda answer, golds: (0,) if len(answer) == 4 else ())
    items = [("text", FLU, 1.0), ("length", (Gold("four"),), 0.0)]
    for batch in (items, items[::-1]):
        for verifier, golds, expected in batch:
            earned = earn(text(["flu", "gou", "x"]), golds, verifier=verifier)
            assert earned.parts["coverage"] == expected


def test_a_repeat_costs_nothing_unless_asked_for():
    golds = (*FLU, Gold("gout"))
    repeated = text(["flu", "flu", "gout"])
    assert earn(repeated, golds).parts["coverage"] == 2
    assert earn(repeated, golds, spec=RewardSpec(duplicates="gate")).parts["coverage"] == 0


def test_what_is_logged_as_coverage_is_what_was_paid():
    """The log has the value after the gates: its terms add up to the reward."""
    right = text(["flu", "gout", "x"])
    for written in (right, right + " bye", text(["flu", "flu", "x"])):
        for spec in (SPEC, RewardSpec(duplicates="gate"), RewardSpec(gate=False)):
            earned = earn(written, FLU, spec=spec)
            terms = [earned.parts[name] for name in ("format", "coverage", "brier")]
            assert earned.total == pytest.approx(sum(terms))
    assert earn(text(["flu", "gout", "x"]) + " bye", FLU).parts["coverage"] == 0


def test_garbage_is_not_a_perfect_brier():
    worst_calibrated = text(["lupus", "gout", "mumps"], (1.0, 1.0, 1.0))
    for brier in ("paper", "released"):
        spec = RewardSpec(brier=brier)
        garbage = earn("garbage", FLU, spec=spec)
        worst = earn(worst_calibrated, FLU, spec=spec)
        honest = earn(text(["a1", "b1", "c1"], (0, 0, 0)), FLU, spec=spec)
        assert garbage.parts["brier"] <= worst.parts["brier"]
        assert garbage.total < honest.total


def test_one_per_cent_is_not_certainty():
    parsed = parse(text(["flu", "gout", "x"]).replace("0.50", "1%"), GRAMMAR)
    assert parsed.confidences[0] is None
    assert parsed.reason == "bad_confidence"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=8), st.text(max_size=8))
def test_repeats_and_hits_have_one_normaliser(a, b):
    if normalise(a) == normalise(b):
        assert repeats([a, b]) == (False, True)
        same = text_verifier(a, [Gold(a)])
        assert text_verifier(a, [Gold(b)]) == same
        assert text_verifier(b, [Gold(a)]) == same
    else:
        assert repeats([a, b]) == (False, False)
        assert text_verifier(a, [Gold(b)]) == ()


def advantages(totals, groups, **options):
    components = torch.tensor(totals, dtype=torch.float64)[:, None]
    zeros = torch.zeros(len(totals), 1, dtype=torch.int64)
    weights = torch.ones(1, dtype=torch.float64)
    found = answer_advantages(components, weights, zeros, zeros, torch.tensor(groups), **options)
    return found[:, 0].numpy()


@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "mean", "none"])
def test_a_group_of_one_has_finite_advantages(scale, baseline):
    alone = advantages([0.7], [0], baseline=baseline, scale=scale)
    assert np.isfinite(alone).all()
    assert abs(alone).max() <= 0.7


def test_equal_totals_are_not_blown_up_by_their_standard_deviation():
    components = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    ids = torch.tensor([[0, 1]] * 2)
    weights = torch.ones(2, dtype=torch.float64)
    got = answer_advantages(
        components, weights, ids, ids, torch.zeros(2, dtype=torch.int64), scale="group_std"
    )
    np.testing.assert_allclose(got, [[0, -1], [0, 1]])


def test_a_group_is_one_prompt_wherever_its_rows_stand():
    got = advantages([1.0, 10.0, 0.0, 30.0], [0, 1, 0, 1])
    np.testing.assert_allclose(got, [1.0, -20.0, -1.0, 20.0])

"""Every reward term: by hand, by its definition, on random prefixes, and in the exact gradient."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.credit.run import GATED, UNGATED, Toy, facts, report
from mar.answers.grammar import Grammar, parse, render
from mar.answers.reward_spec import COVERAGES, RewardSpec
from mar.answers.reward_terms import REWARD_TERMS, Judged, Term, TermValue
from mar.answers.rewards import PAPER_TERMS, component_layout, first_open, pay_terms
from mar.answers.term_check import check_terms, prefix_fault
from mar.errors import UserError
from mar.learn.advantages import token_advantages
from mar.learn.batch import make_batch
from mar.records import Completion, Example, Gold, Prompt
from mar.run.compose import compose
from mar.sample.rollout import Scorer, judge_groups
from mar.verify.matching import matching_increments, repeats

GOLDS = (Gold("flu", ("influenza",)), Gold("cold"))
MULTI = Grammar("rlcr_multi", 2, thinking=False, other=True)
FURTHER = [name for name in REWARD_TERMS if name not in PAPER_TERMS]
EXACT = [name for name in REWARD_TERMS if "group" not in REWARD_TERMS[name].needs]


def judged(text, grammar=MULTI, golds=GOLDS, **more):
    """What a term sees of a text, its answers compared with golds by their words."""
    parsed = parse(text, grammar)
    hits, _ = matching_increments(parsed.answers, golds)
    spec = more.pop("spec", RewardSpec())
    repeated = repeats(parsed.answers, golds)
    words = [None if answer is None else answer.lower() for answer in parsed.answers]
    return Judged(
        parsed, hits, repeated, len(golds), grammar, spec, text=text, meanings=tuple(words), **more
    )


def write(answers, confidences, other=0.0, grammar=MULTI):
    return render(grammar, answers, confidences, other=other)


def pay(name, one, weight=1.0):
    return REWARD_TERMS[name].pay(one, weight)


# --- by hand -------------------------------------------------------------------------------------


def test_length_by_hand():
    one = judged(write(["flu", "gout"], [0.5, 0.5]), num_tokens=250)
    assert pay("length", one, 0.1).total == pytest.approx(-0.25)


def test_repetition_by_hand():
    again = judged(write(["flu", "influenza"], [0.5, 0.5]))
    value = pay("repetition", again, 0.3)
    assert value.answers == [0.0, -0.3]
    assert value.total == -0.3
    assert pay("repetition", judged(write(["flu", "gout"], [0.5, 0.5])), 0.3).total == 0.0
    # What failed is charged for both slots; without a gate only for what is missing.
    one_answer = "<answer1>flu</answer1>"
    assert pay("repetition", judged(one_answer), 0.3).total == -0.6
    ungated = judged(one_answer, spec=RewardSpec(gate=False))
    assert pay("repetition", ungated, 0.3).total == -0.3


def test_batch_exploration_by_hand_with_one_answer_as_in_the_paper():
    single = Grammar("rlvr_single", 1, thinking=False)
    spec = RewardSpec(brier="none")
    group = [
        judged(write([a], [], grammar=single), single, spec=spec) for a in ("a", "a", "b", "a")
    ]
    # -(1/n) sum over the others of 1[a_i = a_j], n = 4
    for i, expected in enumerate([-0.5, -0.5, 0.0, -0.5]):
        one = replace(group[i], others=(*group[:i], *group[i + 1 :]))
        assert pay("batch_exploration", one).total == expected
        assert pay("batch_exploration", one).answers == [expected]


def test_batch_exploration_by_hand_with_sets():
    first = judged(write(["flu", "gout"], [0.5, 0.5]))
    others = (judged(write(["gout", "flu"], [0.5, 0.5])), judged(write(["x", "gout"], [0.5, 0.5])))
    value = pay("batch_exploration", replace(first, others=others), 0.6)
    # flu is said by one of two others, gout by both: 0.6 / K / G = 0.1 each time
    assert value.answers == pytest.approx([-0.1, -0.2])
    assert value.total == pytest.approx(-0.3)
    # what failed is charged as if both had said everything
    broken = judged(write(["y", "z"], [0.5, 0.5]) + "bye")
    assert pay("batch_exploration", replace(broken, others=others), 0.6).total == pytest.approx(
        -0.4
    )
    ungated = replace(broken, others=others, spec=RewardSpec(gate=False))
    assert pay("batch_exploration", ungated, 0.6).total == 0


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_leave_one_out_baseline_takes_back_a_part_of_batch_exploration(size):
    """Every group of a policy over three answers: its estimate is (G - 2)/(G - 1) of the gradient
    of what a completion earns, in its own answer."""
    single = Grammar("rlvr_single", 1, thinking=False)
    spec = RewardSpec(brier="none")
    chances = np.array([0.5, 0.3, 0.2])
    said = [judged(write([a], [], grammar=single), single, spec=spec) for a in "abc"]
    exact = np.zeros(3)
    estimate = np.zeros(3)
    for drawn in itertools.product(range(3), repeat=size):
        group = [said[i] for i in drawn]
        rewards = [
            pay("batch_exploration", replace(one, others=(*group[:i], *group[i + 1 :]))).total
            for i, one in enumerate(group)
        ]
        score = np.eye(3)[drawn[0]] - chances
        weight = chances[list(drawn)].prod()
        exact += weight * rewards[0] * score
        estimate += weight * (rewards[0] - np.mean(rewards[1:])) * score
    assert np.abs(exact).max() > 0.01
    np.testing.assert_allclose(estimate, exact * (size - 2) / (size - 1), atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_scores_of_the_distribution_by_hand(scale):
    """The scale of the confidences does not count: p = (0.6, 0.2, 0.2)."""
    said = [0.6 * scale, 0.2 * scale]
    hit = judged(write(["flu", "gout"], said, 0.2 * scale))
    miss = judged(write(["gout", "lupus"], said, 0.2 * scale))
    norm = math.sqrt(0.36 + 0.04 + 0.04)
    assert pay("simplex_brier", hit).total == pytest.approx(-(0.16 + 0.04 + 0.04))
    assert pay("simplex_brier", miss).total == pytest.approx(-(0.36 + 0.04 + 0.64))
    assert pay("spherical", hit).total == pytest.approx(0.6 / norm)
    assert pay("spherical", miss).total == pytest.approx(0.2 / norm)


def test_scores_of_the_distribution_where_it_is_not_said():
    nothing = judged(write(["flu", "gout"], [0.0, 0.0], 0.0))  # three equal classes
    assert pay("simplex_brier", nothing).total == pytest.approx(-(4 / 9 + 2 / 9))
    assert pay("spherical", nothing).total == pytest.approx(1 / math.sqrt(3))
    text = write(["flu", "gout"], [1.0, 0.0], 0.0)
    for broken in (text.split("<other>")[0], text + "bye", ""):
        assert pay("simplex_brier", judged(broken), 0.5).total == -1.0
        assert pay("spherical", judged(broken), 0.5).total == 0.0
    ungated = judged(text + "bye", spec=RewardSpec(gate=False))
    assert pay("simplex_brier", ungated).total == pytest.approx(0.0)
    assert pay("spherical", ungated).total == 1.0


@pytest.mark.parametrize("name", ["simplex_brier", "spherical"])
def test_the_truth_is_the_best_distribution_to_say(name):
    truth = (0.5, 0.3, 0.2)
    answers = ["flu", "cold"]
    labels = [(Gold("flu"),), (Gold("cold"),), (Gold("mumps"),)]
    grid = [(i / 10, j / 10, (10 - i - j) / 10) for i in range(11) for j in range(11 - i)]

    def worth(p):
        text = write(answers, p[:2], p[2])
        paid = [pay(name, judged(text, golds=golds)).total for golds in labels]
        return float(np.dot(truth, paid))

    assert max(grid, key=worth) == truth


@pytest.mark.parametrize("name", ["simplex_brier", "spherical"])
def test_probabilities_of_the_golds_pay_the_expectation_over_drawn_labels(name):
    text = write(["flu", "cold"], [0.6, 0.1], 0.3)
    drawn = [pay(name, judged(text, golds=(Gold(g),))).total for g in ("flu", "cold", "mumps")]
    expected = replace(judged(text), hits=(0.5, 0.3))
    assert pay(name, expected).total == pytest.approx(np.dot((0.5, 0.3, 0.2), drawn))


def boldness(judged, weight):
    """Pays every confidence what it says."""
    said = [q or 0.0 for q in judged.parsed.confidences]
    return TermValue(confidences=[weight * q for q in said])


@pytest.fixture
def bold(monkeypatch):
    """A further term that is decided at every confidence."""
    term = Term(boldness, decides=("confidence",), needs=("confidences",))
    monkeypatch.setitem(REWARD_TERMS, "boldness", term)


def test_further_terms_enter_the_sum_the_components_and_the_log(bold):
    spec = RewardSpec(terms=(("length", 0.1), ("boldness", 0.5)))
    one = judged(write(["flu", "gout"], [0.5, 0.5]), spec=spec, num_tokens=30)
    plain = pay_terms(replace(one, spec=RewardSpec()))
    earned = pay_terms(one)
    paid = pay("boldness", one, 0.5)
    assert earned.parts["length"] == pytest.approx(-0.03)
    assert earned.parts["boldness"] == paid.total
    assert earned.total == pytest.approx(plain.total - 0.03 + paid.total)
    assert earned.components.sum() == pytest.approx(earned.total)
    names = [name for name, _ in component_layout(MULTI, spec)]
    assert names[:3] == ["coverage1", "brier1+boldness1", "coverage2"]
    gained = earned.components - plain.components
    np.testing.assert_allclose(gained, [0, paid.confidences[0], 0, paid.confidences[1], 0, -0.03])
    assert first_open(MULTI, spec).tolist() == first_open(MULTI, RewardSpec()).tolist()


def test_a_group_is_compared_by_what_its_answers_mean():
    """In the rollouts: an alias of a gold is that gold, and each prompt has its own group."""
    single = Grammar("rlvr_single", 1, thinking=False)
    spec = RewardSpec(brier="none", terms=(("batch_exploration", 1.0),))
    scorer = Scorer(single, spec, "text", lambda ids: "".join(map(chr, ids)))

    def completion(answer):
        ids = np.array([ord(char) for char in write([answer], [], grammar=single)])
        zeros = np.zeros(len(ids), np.float32)
        return Completion(0, ids, zeros, zeros, "stop_string")

    prompt = Prompt(Example("q", "test", "?", GOLDS), "?", (1,))
    groups = [["flu", "Influenza", "gout"], ["flu", "cold", "The Gout"]]
    rollouts = judge_groups([prompt] * 2, [list(map(completion, g)) for g in groups], scorer)
    penalties = [[r.parts["batch_exploration"] for r in group] for group in rollouts]
    assert penalties == [[pytest.approx(-1 / 3)] * 2 + [0], [0, 0, 0]]


@pytest.mark.parametrize("form", ["rlvr_single", "rlcr_single", "rlvr_multi", "rlcr_multi"])
def test_every_form_reaches_gdpo_with_its_terms(form):
    """From texts to advantages: those of the logged parts, each normalised over the group."""
    count = 1 if "single" in form else 2
    grammar = Grammar(form, count, thinking=False)
    brier = "paper" if grammar.confident else "none"
    spec = RewardSpec(brier=brier, format_weight=0.2, terms=(("length", 0.3),))
    scorer = Scorer(grammar, spec, "text", lambda ids: "".join(map(chr, ids)))

    def completion(answers, confidence, scrap=""):
        text = render(grammar, answers[:count], [confidence] * count) + scrap
        ids = np.array([ord(char) for char in text])
        zeros = np.zeros(len(ids), np.float32)
        return Completion(0, ids, zeros, zeros, "stop_string")

    hit, miss = ["flu", "gout"], ["mumps", "gout"]
    group = [completion(hit, 0.9), completion(miss, 0.5), completion(hit, 0.3, "bye")]
    prompt = Prompt(Example("q", "test", "?", GOLDS), "?", (1,))
    rollouts = judge_groups([prompt], [group], scorer)
    batch = make_batch(rollouts, scorer.first_open, of_confidence=scorer.of_confidence)

    sums = np.zeros(3)
    for name, weight in spec.weights.items():
        rewards = np.array([rollout.parts[name] for rollout in rollouts[0]]) / weight
        sums += weight * (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    of_tokens = np.repeat(sums, [len(one.ids) for one in group])
    expected = (sums - of_tokens.mean()) / (of_tokens.std(ddof=1) + 1e-8)
    got = token_advantages(batch, "set", "mean", "term_std")
    np.testing.assert_allclose(got[:, 0], expected, rtol=1e-9)


# --- what is decided stays decided ---------------------------------------------------------------


@st.composite
def cases(draw):
    """(a grammar of two answers, a text that is right, or nearly, a place to cut it, a switch)."""
    split = draw(st.booleans())
    grammar = Grammar(
        "rlcr_multi", 2, layout="split" if split else "interleaved", analysis=split, other=True
    )
    names = st.sampled_from(["flu", "The flu", "influenza", "a cold", "lupus"])
    levels = st.sampled_from([0.0, 0.3, 0.7, 1.0])
    said = [draw(levels), draw(levels)]
    text = render(grammar, [draw(names), draw(names)], said, "hm", other=draw(levels))
    if draw(st.booleans()):
        start = draw(st.integers(0, len(text)))
        stop = start + draw(st.sampled_from([0, 1, 3, 20, 200]))
        scrap = draw(st.sampled_from(["", "x", "</think>", "<answer1>cold</answer1>", "9"]))
        text = text[:start] + scrap + text[stop:]
    spec = RewardSpec(
        coverage=draw(st.sampled_from(sorted(COVERAGES))),
        brier=draw(st.sampled_from(["paper", "released"])),
        sum_rule=draw(st.booleans()),
        gate=draw(st.booleans()),
        duplicates=draw(st.sampled_from(["per_slot", "gate"])),
        rank_weights=draw(st.sampled_from([(), (2.0, 0.5)])),
    )
    return grammar, text, draw(st.integers(0, len(text))), spec


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_term_changes_its_mind_on_a_longer_prefix(case):
    grammar, text, cut, spec = case
    others = tuple(
        judged(write([a, "gout"], [0.5, 0.5], grammar=grammar), grammar) for a in ("flu", "cold")
    )
    full = judged(text, grammar, spec=spec, others=others, num_tokens=len(text))
    for length in {cut, *full.parsed.ends, *(end - 1 for end in full.parsed.ends)}:
        prefix = judged(text[:length], grammar, spec=spec, others=others, num_tokens=length)
        for name in REWARD_TERMS:
            assert prefix_fault(name, full, prefix) is None, name


@pytest.mark.parametrize("form", ["rlcr_multi", "rlvr_multi", "rlcr_single"])
def test_every_registered_term_passes_the_check_at_the_start_of_a_run(form):
    count = 1 if "single" in form else 3
    grammar = Grammar(form, count, other="rlcr" in form)
    fitting = [name for name in FURTHER if grammar.confident or not REWARD_TERMS[name].decides]
    brier = "paper" if grammar.confident else "none"
    check_terms(grammar, RewardSpec(brier=brier, terms=tuple((name, 0.5) for name in fitting)))


def in_hindsight(one, weight):
    """Pays the first answer for hits of later ones."""
    return TermValue(answers=[weight * sum(one.hits), *[0.0] * (len(one.hits) - 1)])


def too_early(one, weight):
    return TermValue(answers=[-weight] * len(one.hits))


def deaf(one, weight):
    return TermValue(whole=1.0)


def endless(one, weight):
    return TermValue(whole=weight * math.inf)


def at_closed_answers(one, weight):
    return TermValue(answers=[weight * (a is not None) for a in one.parsed.answers])


def broken(one, weight):
    return TermValue(whole=weight / len(one.text))


@pytest.mark.parametrize(
    ("function", "decides", "sentence"),
    [
        (in_hindsight, ("answer",), "changes its mind: it pays .* for <answer1> after"),
        (too_early, ("answer",), "pays -1 for <answer1> after .*not closed yet"),
        (deaf, (), "pays 1 with weight 1 and 1 with weight 2: multiply by it"),
        (endless, (), "pays inf: values must be finite"),
        (at_closed_answers, (), r"pays at <answer1> .*does not say so: add decides=\('answer',\)"),
        (broken, (), "fails on .*ZeroDivisionError"),
    ],
)
def test_a_term_that_breaks_a_rule_is_named_before_a_run(monkeypatch, function, decides, sentence):
    monkeypatch.setitem(REWARD_TERMS, "mine", Term(function, decides=decides))
    with pytest.raises(UserError, match=f"^reward term mine {sentence}"):
        check_terms(Grammar("rlcr_multi", 3), RewardSpec(terms=(("mine", 1.0),)))


def test_a_coverage_that_looks_ahead_is_named_before_a_run(monkeypatch):
    ahead = {"ahead": lambda hits, num_golds: [sum(hits) * (k == 0) for k in range(len(hits))]}
    monkeypatch.setitem(COVERAGES, "ahead", ahead["ahead"])
    with pytest.raises(UserError, match=r"^reward term coverage \(reward.coverage=ahead\) changes"):
        check_terms(Grammar("rlcr_multi", 3), RewardSpec(coverage="ahead"))


def test_a_coverage_pays_for_no_answer_that_was_not_written(monkeypatch):
    monkeypatch.setitem(COVERAGES, "halves", lambda hits, num_golds: [0.5 for _ in hits])
    check_terms(MULTI, RewardSpec(coverage="halves"))
    cut = judged(write(["flu", "gout"], [0.5, 0.5]).split("<answer2>")[0])
    spec = RewardSpec(coverage="halves", gate=False)
    assert pay("coverage", replace(cut, spec=spec)).answers == [0.5, 0.0]


# --- against the exact gradient ------------------------------------------------------------------

UNBIASED = ("to_go", "set", "to_go, matched baseline")


class ToyWithOther(Toy):
    """The enumerated policy of `experiments/credit` with `<other>` in the token of confidence 2.

    Only (0.5, 0.5, 0) keeps the sum rule, where it is on.
    """

    def __init__(self, layout, spec):
        super().__init__(layout, spec, answers=2, confidences=2)
        self.grammar = replace(self.grammar, other=True)
        *right, cut = self.steps[3]
        pairs = itertools.product(right, (0.0, 0.3))
        self.steps[3] = [*(text + f"<other>{q}</other>".encode() for text, q in pairs), cut]
        self.texts = [text for step in self.steps for text in step]
        self.offsets = np.cumsum([0, *map(len, self.steps)])
        self._enumerate()
        self._draw_logits(1.0)
        self._index()


@pytest.mark.parametrize(("layout", "spec"), [("interleaved", GATED), ("split", UNGATED)])
@pytest.mark.parametrize("name", EXACT)
def test_a_term_of_one_completion_keeps_the_gradient_exact(name, layout, spec):
    """Also on malformed text: most of the policy's mass breaks the form somewhere."""
    if name not in PAPER_TERMS:
        spec = replace(spec, terms=((name, 0.7),))
    toy = ToyWithOther(layout, spec)
    seen = facts(toy)
    assert all(0.01 < seen[kind] < 0.9 for kind in ("well_formed", "truncated", "repeating"))
    for estimator, row in report(toy, 2, UNBIASED).items():
        assert row["relative_error"] < 1e-10, estimator


def test_a_term_in_hindsight_would_bias_the_gradient(monkeypatch):
    """What the check at the start of a run guards."""
    monkeypatch.setitem(REWARD_TERMS, "hindsight", Term(in_hindsight, decides=("answer",)))
    toy = ToyWithOther("interleaved", replace(UNGATED, terms=(("hindsight", 0.7),)))
    rows = report(toy, 2, ("to_go", "set"))
    assert rows["to_go"]["relative_error"] > 1e-3
    assert rows["set"]["relative_error"] < 1e-10  # which looks at totals alone


def test_the_settings_page_says_which_terms_there_are_and_which_are_exact():
    page = (Path(__file__).resolve().parents[2] / "conf/README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (exact|not exact: .*) \|$", page, re.MULTILINE))
    assert list(rows) == FURTHER
    assert [name for name in rows if rows[name] == "exact"] == [n for n in FURTHER if n in EXACT]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["reward.terms.lenght=0.1"], "reward.terms.lenght=0.1 is unknown: choose one of length"),
        (["reward.terms={brier: 1}"], "reward.terms.brier=1.0: .* is reward.brier_weight"),
        (["reward.terms.length=-1"], "reward.terms.length=-1.0 is out of range"),
        (["reward.terms.length=nan"], "reward.terms.length=nan is out of range"),
        (["reward.terms.spherical=1"], "reward.terms.spherical=1.0 needs .*reward.other=true"),
        (
            ["reward.terms.batch_exploration=1", "algo.group_size=1", "algo.baseline=none"],
            "batch_exploration=1.0 compares .*algo.group_size=1 has one",
        ),
    ],
)
def test_weights_that_cannot_be_are_refused_in_one_sentence(words, sentence):
    with pytest.raises(UserError, match=sentence):
        compose(["+experiment=clinic", *words])


def test_a_term_of_confidences_is_refused_where_there_are_none(bold):
    words = ["+experiment=clinic", "reward=multi_rlvr", "reward.terms.boldness=1"]
    with pytest.raises(UserError, match="boldness=1.0 needs confidences"):
        compose(words)


def test_weights_of_terms_are_settings_like_others():
    words = ["+experiment=clinic", "reward.other=true", "reward.terms.spherical=0.5"]
    assert compose(words).reward.terms == {"spherical": 0.5}
    assert compose(["+experiment=clinic", "reward.terms={length: 0.1}"]).reward.terms == {
        "length": 0.1
    }


def test_a_term_cannot_take_the_name_of_something_else_in_the_log(monkeypatch):
    monkeypatch.setitem(REWARD_TERMS, "repeats", Term(in_hindsight, decides=("answer",)))
    with pytest.raises(UserError, match="reward/repeats is logged for something else"):
        component_layout(MULTI, RewardSpec(terms=(("repeats", 1.0),)))


def test_a_term_that_the_grammar_cannot_feed_is_refused_without_a_config_too(bold):
    spec = RewardSpec(brier="none", terms=(("boldness", 1.0),))
    with pytest.raises(UserError, match="boldness=1.0 needs confidences"):
        component_layout(Grammar("rlvr_multi", 2), spec)

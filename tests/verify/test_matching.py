"""Answers against golds: the normaliser, the maximum matching, repeats."""

import itertools
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mar.records import Gold
from mar.verify.matching import matching_increments, repeats, text_verifier
from mar.verify.normaliser import normalise
from mar.verify.verifiers import VERIFIERS

TEXT = st.text(
    st.characters(exclude_categories=["Cs"])
    | st.sampled_from(".,-+#%^'5aA é½⁵the <>=~!|/:*$\"&\u0338"),
    max_size=12,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Flu.", "flu"),
        (" the  FLU! ", "flu"),
        ("**flu**", "flu"),
        ("\uff26\uff4c\uff55", "flu"),  # full width
        ("f\u200bl\u00adu\ufe0f\x00", "flu"),  # invisible characters
        ("Crohn\u2019s disease", "crohn disease"),
        ("Guillain\u2013Barr\u00e9 syndrome", "guillain barre syndrome"),
        ("Me\u0301nie\u0300re", "meniere"),
        ("Stra\u00dfe", "strasse"),
        ("U.S.A.", "usa"),
        ("St. Louis", "st louis"),
        ("Tylenol\u2122", "tylenol"),
        ("a cold", "cold"),
        ("A", "a"),  # an option letter is no article
        ("The", "the"),
        ("Hepatitis A", "hepatitis a"),
        ("vitamin A deficiency", "vitamin a deficiency"),
        ("3.5", "3.5"),
        (".5", "0.5"),
        ("It is 3.", "it is 3"),
        ("1,000,000", "1000000"),
        ("10,20", "10 20"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("3-5", "3-5"),
        ("3 5", "3 5"),
        ("5 %", "5%"),
        ("10\u2075", "10^5"),
        ("1\u00bd", "1 1/2"),
        ("H\u2082O", "h2o"),
        ("6'2", "6'2"),
        ("C++", "c++"),
        ("C#", "c#"),
        ("+", "+"),
        ("3.50", "3.5"),
        ("-2.00 %", "-2%"),
        ("100", "100"),
        ("3.10.0", "3.10.0"),
        ("Twenty-one", "21"),
        ("the seven", "7"),
        ("seven dwarfs", "seven dwarfs"),
        ("3rd of May, 1999", "1999 05 03"),
        ("May 3, 1999", "1999 05 03"),
        ("1999-05-03", "1999 05 03"),
        ("12 Sept 2001", "2001 09 12"),
        ("ma 3 1999", "ma 3 1999"),
        ("mayor 3 1999", "mayor 3 1999"),
        ("May 1999", "may 1999"),
        ("M.I.", "myocardial infarction"),
        ("acute MI", "acute mi"),
        ("", ""),
        (" \u200b\u3164\u2800", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("3.5", "35"),
        ("1.5", "15"),
        ("-5", "5"),
        ("10^5", "105"),
        ("10\u2075", "105"),
        ("1\u00bd", "11/2"),
        ("5%", "5"),
        ("C", "C++"),
        ("A", "B"),
        ("+", "-"),
        ("a-b", "ab"),
        ("hepatitis A", "hepatitis"),
        ("\u0915\u093f", "\u0915\u0941"),
    ],
)
def test_different_answers_stay_different(a, b):
    assert normalise(a) != normalise(b)


@settings(max_examples=300, deadline=None)
@given(TEXT)
@example("x^^5")
@example("'90's")
@example("the the a")
def test_normalise_is_a_projection(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    "piece",
    ["x", "\u0301\u0316", " . ", "the ", "-+#^", "1,", "9", "'", "9,999", "5 "]
    + ["<", "-", "=", "*", "* ", "**a ", '"', '5"', "$", "5$", "5 x ", "a/", "|", "~", "+/-", "!="],
)
def test_long_texts_are_normalised_in_linear_time(piece):
    start = time.perf_counter()
    normalise(piece * (50_000 // len(piece)))
    assert time.perf_counter() - start < 3.0


def test_an_alias_hits_and_nothing_visible_never_does():
    gold = Gold("influenza", ("flu", "grippe"))
    assert text_verifier("The Flu.", [Gold("cold"), gold]) == (1,)
    assert text_verifier("INFLUENZA", [gold, gold]) == (0, 1)
    assert text_verifier("cold", [gold]) == ()
    assert text_verifier("\u200b", [Gold("\u200b")]) == ()


def brute_force(candidates):
    """The maximum matching by trying every choice of a gold, or none, for every answer."""
    choices = itertools.product(*[(None, *c) for c in candidates])
    return max(
        len(taken)
        for choice in choices
        if len(set(taken := [g for g in choice if g is not None])) == len(taken)
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sets(st.sampled_from("abcd"), min_size=1, max_size=3), max_size=4),
    st.permutations([*"abcde", None, "a"]).flatmap(
        lambda order: st.integers(0, 6).map(lambda length: order[:length])
    ),
)
@example([{"a", "b"}, {"a"}], ["a", "b"])
def test_increments_are_those_of_the_maximum_matching(aliases, answers):
    golds = [Gold(f"gold {i}", tuple(sorted(names))) for i, names in enumerate(aliases)]
    hits, taken = matching_increments(answers, golds)
    text = VERIFIERS["text"]
    for length in range(len(answers) + 1):
        distinct = {a for a in answers[:length] if a is not None}
        assert sum(hits[:length]) == brute_force([text(a, golds) for a in distinct])
        assert matching_increments(answers[:length], golds)[0] == hits[:length]  # causal
    assert all((gold is not None) == bool(hit) for gold, hit in zip(taken, hits, strict=True))
    won = [(answer, gold) for answer, gold in zip(answers, taken, strict=True) if gold is not None]
    assert all(gold in text(answer, golds) for answer, gold in won)
    assert len({gold for _, gold in won}) == len(won)


def test_many_golds_are_compared_as_few_are():
    names = [("Flu", "influenza"), ("cold",), ("influenza",), *((f"other {n}",) for n in range(20))]
    golds = tuple(Gold(name, tuple(aliases)) for name, *aliases in names)
    for answer in ("the flu", "Influenza.", "other 7", "nothing", "\u200b", "?"):
        few = [number for number, gold in enumerate(golds) if text_verifier(answer, (gold,))]
        assert text_verifier(answer, golds) == text_verifier(answer, list(golds)) == tuple(few)
    others = tuple(reversed(golds))
    assert text_verifier("other 7", others) == (len(golds) - 1 - 10,)


def test_a_later_answer_moves_an_earlier_one_to_its_other_gold():
    golds = [
        Gold("mercury the planet", ("mercury",)),
        Gold("mercury the element", ("mercury", "quicksilver")),
    ]
    assert matching_increments(["mercury", "mercury the planet"], golds) == ((1.0, 1.0), (1, 0))
    assert matching_increments(["mercury", "quicksilver"], golds) == ((1.0, 1.0), (0, 1))


def test_the_same_word_does_not_take_two_golds_that_share_it():
    golds = [Gold("mercury the planet", ("mercury",)), Gold("mercury the element", ("mercury",))]
    assert matching_increments(["mercury", "Mercury!"], golds)[0] == (1.0, 0.0)


def test_repeats_are_the_same_text_or_the_same_gold():
    golds = [Gold("influenza", ("flu",)), Gold("common cold", ("cold",))]
    assert repeats(["flu", "The Flu", "cold", None, "influenza", "gout", "gout?"], golds) == (
        False,
        True,
        False,
        False,
        True,
        False,
        True,
    )
    assert repeats(["flu", "influenza"]) == (False, False)  # without golds only the text can tell
    assert repeats([None, None]) == (False, False)


def test_a_verifier_may_bring_its_own_sameness():
    """Programs: `aa-b` and `aa*b` are one text to the normaliser, and two programs."""
    golds = [Gold("product"), Gold("difference")]

    def runs(program, golds):
        return (0,) if "*" in program else (1,)

    assert matching_increments(["aa-b", "aa*b"], golds, runs, key=str)[0] == (1.0, 1.0)
    assert matching_increments(["aa-b", "aa*b"], golds, runs)[0] == (1.0, 0.0)
    assert repeats(["f(aa-b)", "f(aa*b)"], (), key=str) == (False, False)
    assert repeats(["f(aa-b)", "f(aa*b)"], ()) == (False, True)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT | st.none(), max_size=5), st.lists(TEXT, max_size=3))
def test_a_repeat_never_hits(answers, names):
    golds = [Gold(name) for name in names]
    hits, _ = matching_increments(answers, golds)
    assert not any(hit and again for hit, again in zip(hits, repeats(answers, golds), strict=True))

"""The grammar: what is rendered is read back, nothing raises, and a prefix decides for good."""

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mar.answers.grammar import FORMS, RESERVED_TAG, Grammar, decode_with_starts, parse, render
from mar.answers.prompts import instructions

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(str.strip)
PROSE = WORDS.filter(lambda text: not RESERVED_TAG.search(text))
ANSWERS = PROSE.filter(lambda text: any(c.isprintable() and not c.isspace() for c in text))


@st.composite
def grammars(draw, most=10):
    form = draw(st.sampled_from(FORMS))
    multi = form.endswith("multi")
    confident = form.startswith("rlcr")
    layout = draw(st.sampled_from(["interleaved", "split"]))
    return Grammar(
        form=form,
        num_answers=draw(st.integers(1, most)) if multi else 1,
        layout=layout,
        thinking=draw(st.booleans()),
        analysis=confident and (not multi or layout == "split") and draw(st.booleans()),
        other=confident and draw(st.booleans()),
    )


@st.composite
def rendered(draw, most=10):
    """(grammar, think_open, the values written, the text)."""
    grammar = draw(grammars(most))
    K = grammar.num_answers
    think_open = grammar.thinking and draw(st.booleans())
    probability = st.integers(0, 100).map(lambda n: n / 100)
    values = {
        "answers": draw(st.lists(ANSWERS, min_size=K, max_size=K)),
        "confidences": draw(st.lists(probability, min_size=K, max_size=K)),
        "thinking": draw(WORDS.filter(lambda text: "</think>" not in text)),
        "analysis": draw(PROSE),
        "other": draw(probability),
    }
    return grammar, think_open, values, render(grammar, **values, think_open=think_open)


@st.composite
def mangled(draw, most=3):
    """(grammar, think_open, a text that is nearly right)."""
    grammar, think_open, _, text = draw(rendered(most))
    scraps = [
        "<think>",
        "</think>",
        "<answer1>",
        "</answer2>",
        "<confidence1>",
        "</other>",
        " ",
        "\n",
        "0.5",
        "x",
    ]
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.sampled_from([0, 0, 1, 3, 20])))
        text = text[:start] + draw(st.sampled_from(["", *scraps])) + text[stop:]
    return grammar, think_open, text


@settings(max_examples=150, deadline=None)
@given(rendered())
def test_parse_reads_back_what_render_wrote(case):
    grammar, think_open, values, text = case
    parsed = parse(text, grammar, think_open)
    no_confidences = (None,) * grammar.num_answers
    assert parsed.reason is None
    assert parsed.answers == tuple(values["answers"])
    assert parsed.confidences == (
        tuple(values["confidences"]) if grammar.confident else no_confidences
    )
    assert parsed.thinking == (values["thinking"] if grammar.thinking else None)
    assert parsed.analysis == (values["analysis"] if grammar.analysis else None)
    assert parsed.other == (values["other"] if grammar.other else None)
    assert parsed.ends[-1] == len(text)
    assert len(parsed.ends) == len(grammar.elements)


@settings(max_examples=150, deadline=None)
@given(grammars(), st.text(max_size=60), st.booleans())
def test_no_text_raises(grammar, text, think_open):
    parsed = parse(text, grammar, think_open)
    assert (parsed.reason is None) == (
        parsed.violation is None and len(parsed.ends) == len(grammar.elements)
    )
    assert len(parsed.answers) == len(parsed.confidences) == grammar.num_answers


def assert_prefixes_agree(grammar, think_open, text):
    """Both directions: a prefix decides exactly what the full text says was decided by then."""
    full = parse(text, grammar, think_open)
    for length in range(len(text) + 1):
        prefix = parse(text[:length], grammar, think_open)
        assert prefix.ends == tuple(end for end in full.ends if end <= length)
        violation = (None, None)
        if full.violation_at is not None and full.violation_at <= length:
            violation = (full.violation, full.violation_at)
        assert (prefix.violation, prefix.violation_at) == violation
        decided = grammar.elements[: len(prefix.ends)]
        for element in grammar.elements:
            answer = full.answers[element.slot] if element in decided else None
            confidence = full.confidences[element.slot] if element in decided else None
            if element.kind == "answer":
                assert prefix.answers[element.slot] == answer
            if element.kind == "confidence":
                assert prefix.confidences[element.slot] == confidence


@settings(max_examples=60, deadline=None)
@given(mangled())
def test_what_a_prefix_decides_is_what_the_full_text_says(case):
    assert_prefixes_agree(*case)


@settings(max_examples=60, deadline=None)
@given(mangled())
def test_segments_follow_the_ends(case):
    grammar, think_open, text = case
    parsed = parse(text, grammar, think_open)
    positions = np.arange(len(text) + 1)

    def segment(position):
        if parsed.violation_at is not None and position >= parsed.violation_at:
            return len(grammar.elements)
        return sum(end <= position for end in parsed.ends)

    expected = [segment(position) for position in positions]
    np.testing.assert_array_equal(parsed.segments(positions), expected)


FIRST = "<answer1>a</answer1><confidence1>0.5</confidence1>"
GOOD = "<think>t</think>" + FIRST + "<answer2>b</answer2><confidence2>.25</confidence2>"
NO_PROBABILITY = [
    "1%",
    "50%",
    "1.5",
    "-0.1",
    "5e-1",
    "",
    "half",
    "0,5",
    "1.01",
    "nan",
    "inf",
    "٠.٥",
    "0.5.",
    ".",
    "01.5",
    "10",
    "1.0000000000000000000000001",
    "+0.5",
    "1/2",
    "0 .5",
    "0_5",
]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("", "", None),
        ("<think>t", "<think>\n<answer1>z</answer1> or <think> again\n", None),
        ("</think><answer1>", "</think>\n\n<answer1>", None),
        (">0.5<", "> 0.5\n<", None),
        (">0.5<", ">1.0<", None),
        ("<think>", "Sure! <think>", "text_outside_tags"),
        ("</think>", "</think></think>", "text_outside_tags"),
        ("answer1>", "answer2>", "text_outside_tags"),
        ("<answer1>a</answer1>", "", "text_outside_tags"),
        ("<confidence1>0.5</confidence1>", "", "text_outside_tags"),
        ("<answer1>a", "<Answer1>a", "text_outside_tags"),
        ("<answer1>a", "<answer1><think>a", "tag_inside"),
        ("<answer1>a</answer1>", "<answer1>a", "tag_inside"),
        ("<answer1>a", "<answer1>", "empty_answer"),
        ("<answer1>a", "<answer1> \n", "empty_answer"),
        ("<answer1>a", "<answer1>\u200b", "empty_answer"),
        *[(">0.5<", f">{bad}<", "bad_confidence") for bad in NO_PROBABILITY],
        ("</confidence2>", "</confidence2> Hope this helps!", "trailing_text"),
        ("</confidence2>", "</confidence2><answer3>c</answer3>", "trailing_text"),
        ("</confidence2>", "", "unfinished"),
        (GOOD, "", "unfinished"),
        (GOOD, "no tags at all", "text_outside_tags"),
    ],
)
def test_every_breach_has_its_name(old, new, reason):
    parsed = parse(GOOD.replace(old, new), Grammar(num_answers=2))
    assert parsed.reason == reason
    assert (parsed.violation_at is None) == (reason in (None, "unfinished"))
    assert_prefixes_agree(Grammar(num_answers=2), False, GOOD.replace(old, new) + "\n tail")


@pytest.mark.parametrize(
    "written",
    ["0", "1", ".25", "0.5", "1.000000000000", "0.123456789", "0.1234567891", "0.3333333333333333"]
    + ["1.", "0.", "00.5", "01", "000", "00", "001.0"]
    + ["0.1000000000000000055511151231257827", "0." + "0" * 38, "." + "9" * 39],
)
def test_every_plain_decimal_of_up_to_40_characters_is_a_confidence(written):
    """Models write what a float prints: 16 digits and more."""
    text = GOOD.replace(">0.5<", f">{written}<")
    parsed = parse(text, Grammar(num_answers=2))
    assert parsed.reason is None
    assert parsed.confidences == (float(written), 0.25)
    assert_prefixes_agree(Grammar(num_answers=2), False, text)
    longer = GOOD.replace(">0.5<", f">{written:0<41}<")
    assert parse(longer, Grammar(num_answers=2)).reason == "bad_confidence"


def test_the_number_that_the_prompt_shows_is_read():
    form = instructions(Grammar(num_answers=2, other=True, thinking=False), "answer").splitlines()[
        -1
    ]
    shown = re.findall(r"<(?:confidence1|confidence2|other)>(.*?)</", form)
    assert shown == ["0.5"] * 3
    assert parse(GOOD.replace(">.25<", f">{shown[0]}<"), Grammar(num_answers=2)).reason is None


def test_values_before_a_breach_stay_readable_and_later_ones_do_not():
    parsed = parse(GOOD.replace("<answer2>", "and <answer2>"), Grammar(num_answers=2))
    assert parsed.answers == ("a", None)
    assert parsed.confidences == (0.5, None)
    assert parsed.violation_at == GOOD.index("<answer2>") + 1


def test_a_template_may_open_the_thinking_or_close_an_empty_one():
    grammar = Grammar("rlvr_single", 1)
    assert parse("<think>t</think><answer>a</answer>", grammar).answers == ("a",)
    opened = parse("t</think><answer>a</answer>", grammar, think_open=True)
    assert (opened.thinking, opened.answers, opened.reason) == ("t", ("a",), None)
    assert parse("t</think><answer>a</answer>", grammar).reason == "text_outside_tags"
    assert parse("</think><answer>a</answer>", grammar, think_open=True).reason is None
    # the template wrote an empty block, or no thoughts are wanted
    without = Grammar("rlvr_single", 1, thinking=False)
    assert parse("<answer>a</answer>", without).reason is None
    assert parse("<answer>a</answer>", without, think_open=True).reason is None
    assert parse("<think></think><answer>a</answer>", without).reason == "text_outside_tags"


@pytest.mark.parametrize(
    "choice",
    [
        {"form": "rlhf"},
        {"layout": "mixed"},
        {"num_answers": 0},
        {"form": "rlvr_single", "num_answers": 2},
        {"form": "rlvr_multi", "analysis": True},
        {"layout": "interleaved", "analysis": True},
        {"form": "rlvr_multi", "other": True},
    ],
)
def test_impossible_grammars_are_refused(choice):
    with pytest.raises(ValueError, match=r"form|layout|analysis|other"):
        Grammar(**choice)


@pytest.mark.parametrize(
    "piece", ["x", " ", "<", "<answer1>", "<think>", "</think>", "<answer", "0"]
)
def test_long_texts_are_read_in_linear_time(piece):
    start = time.perf_counter()
    for opening in ("", "<think></think>", "<think></think><answer1>"):
        parse(opening + piece * (200_000 // len(piece)), Grammar())
    assert time.perf_counter() - start < 3.0


# --- tokens -> text ------------------------------------------------------------------------------

EURO = b"\xe2\x82\xac"
PIECES = [
    b"a",
    b"<b>",
    EURO,
    b"\xe2",
    b"\x82",
    b"\xac",
    b"\xf0\x9f",
    b"\xa4\x92",
    b"\xff",
    " é".encode(),
    b"",
]
TOKENS = st.lists(st.integers(0, len(PIECES) - 1), max_size=14)


def decode_bytes(ids):
    return b"".join(PIECES[i] for i in ids).decode("utf-8", errors="replace")


@settings(max_examples=300, deadline=None)
@given(TOKENS, TOKENS, TOKENS)
def test_starts_depend_on_the_tokens_before_alone(common, left, right):
    a = common + left
    b = common + right
    text_a, starts_a = decode_with_starts(a, decode_bytes)
    text_b, starts_b = decode_with_starts(b, decode_bytes)
    assert text_a == decode_bytes(a)
    assert np.all(np.diff(starts_a, prepend=0) >= 0)
    # Also where one of them ends here: a stop token begins where any other would.
    known = len(common) + 1
    np.testing.assert_array_equal(starts_a[:known], starts_b[:known])
    assert text_a[: starts_a[known - 1]] == text_b[: starts_b[known - 1]]


def test_a_character_split_over_tokens_starts_where_its_first_byte_does():
    # a, the three bytes of the euro sign, a
    text, starts = decode_with_starts([0, 3, 4, 5, 0], decode_bytes)
    assert text == "a\u20aca"
    assert starts.tolist() == [0, 1, 1, 1, 2, 3]


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    text, starts = decode_with_starts([0, 3, 4], decode_bytes)
    assert text == "a\ufffd"
    assert starts.tolist() == [0, 1, 1, 1]


def test_a_long_run_of_broken_bytes_is_decoded_in_short_windows():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    text, starts = decode_with_starts([8] * 400 + [0], decode)
    assert text == "\ufffd" * 400 + "a"
    assert longest <= 40
    assert starts[-2] >= 380


def test_a_decoder_that_drops_the_leading_space_keeps_the_inner_ones():
    pieces = ["▁two", "▁red", "▁", "apples"]

    def decode(ids):
        return "".join(pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert decode_with_starts([0, 1, 2, 3], decode)[0] == "two red apples"


def test_a_token_across_a_border_belongs_to_the_earlier_segment():
    pieces = ["<answer1>a", "</answer1><answer2>", "b", "</answer2>", " so", " long"]
    text, starts = decode_with_starts(range(6), lambda ids: "".join(pieces[i] for i in ids))
    parsed = parse(text, Grammar("rlvr_multi", 2, thinking=False))
    assert parsed.reason == "trailing_text"
    assert parsed.segments(starts[:-1]).tolist() == [0, 0, 1, 1, 2, 2]

"""From token ids to segments, hits and components: each rollout by its own tokens and its own prompt."""

import numpy as np
import pytest

from experiments.embedded_model.shape import train_tokenizer
from mar.answers.grammar import Grammar, render
from mar.answers.prompts import build_prompt
from mar.answers.rewards import RewardSpec, first_open
from mar.answers.tokenizer import load_tokenizer
from mar.records import Completion, Example, Gold, Prompt
from mar.sample.draws import SamplingParams
from mar.sample.rollout import Scorer, judge_groups, make_decode, read, sample

GRAMMAR, SPEC = Grammar("rlcr_multi", 2, thinking=False), RewardSpec()


class Pieces:
    """A tokenizer whose tokens are given byte strings."""

    def __init__(self, *pieces):
        self.pieces = [p if isinstance(p, bytes) else p.encode() for p in pieces]

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


def prompt(*golds, id="q", **more):
    return Prompt(
        Example(
            id, "test", "?", tuple(Gold(g) if isinstance(g, str) else g for g in golds), **more
        ),
        "?",
        (1, 2),
    )


def completion(ids, finish_reason="stop"):
    zeros = np.zeros(len(ids), np.float32)
    return Completion(0, np.array(ids), zeros, zeros, finish_reason)


def judge(pieces, asked, finish_reason="stop", grammar=GRAMMAR, spec=SPEC):
    """The rollout of a completion with these tokens, the last of them the stop token if it stopped."""
    decode = make_decode(Pieces(*pieces))
    return judge_groups(
        [asked],
        [[completion(range(len(pieces)), finish_reason)]],
        Scorer(grammar, spec, "text", decode),
    )[0][0]


def test_tokens_across_borders_belong_to_the_earlier_segment():
    #         answer1                confidence1                answer2             confidence2         end
    pieces = ["<answer1>", "flu", "</answer1><conf", "idence1>", "0.", "8</confidence1>", "<answer2>", "cold</answer2><", "confidence2>",
              "0.1</confidence2>\n", "<stop>"]  # fmt: skip
    got = judge(pieces, prompt("cold"))
    assert (
        got.text
        == "<answer1>flu</answer1><confidence1>0.8</confidence1><answer2>cold</answer2><confidence2>0.1</confidence2>\n"
    )
    assert got.segment_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4]
    assert (got.answers, got.confidences, got.hits, got.reason) == (
        ("flu", "cold"),
        (0.8, 0.1),
        (0.0, 1.0),
        None,
    )
    np.testing.assert_allclose(
        got.components, [0, -0.32, 1, -0.405, 0.5], atol=1e-12
    )  # y1, -(q1 - y1)^2 / 2, y2, -(q2 - y2)^2 / 2, end
    assert (
        got.total
        == pytest.approx(got.components.sum())
        == pytest.approx(sum(got.parts[k] for k in ("format", "coverage", "brier")))
    )
    open_at = first_open(GRAMMAR, SPEC)[got.segment_ids]
    assert open_at.tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
    ]  # the first component that each token still decides


def test_the_stop_token_is_not_text_and_comes_last():
    pieces = [
        "<answer1>a</answer1>",
        "<confidence1>0</confidence1>",
        "<answer2>b</answer2>",
        "<confidence2>1</confidence2>",
        "<stop>",
    ]
    assert judge(pieces, prompt("b")).reason is None
    assert judge(pieces, prompt("b")).segment_ids.tolist() == [0, 1, 2, 3, 4]
    cut = judge(
        pieces, prompt("b"), "length"
    )  # the same token, but as the last of an overlong text
    assert cut.reason == "trailing_text" and cut.segment_ids.tolist() == [0, 1, 2, 3, 4]
    early = judge([*pieces[:2], "<answer2>b", "<stop>"], prompt("b"))
    assert early.reason == "unfinished" and early.segment_ids.tolist() == [0, 1, 2, 2]
    silent = judge(["<stop>"], prompt("b"))
    assert (
        silent.text == "" and silent.reason == "unfinished" and silent.segment_ids.tolist() == [0]
    )
    assert silent.total == silent.components[-1] == -1.0  # no format, the whole Brier term


def test_all_after_a_violation_is_the_last_segment():
    pieces = ["<answer1>flu</answer1>", "so", "<confidence1>", "0.8</confidence1>", "<stop>"]
    got = judge(pieces, prompt("flu"))
    assert got.reason == "text_outside_tags" and got.segment_ids.tolist() == [
        0,
        1,
        4,
        4,
        4,
    ]  # "so" is where it becomes certain
    np.testing.assert_allclose(
        got.components, [1, 0, 0, 0, -2], atol=1e-12
    )  # the hit is clawed back at the end


def test_a_character_of_two_tokens_counts_once():
    head, tail = "é".encode()[:1], "é".encode()[1:]
    pieces = [
        "<answer1>caf",
        head,
        tail,
        "</answer1>",
        "<confidence1>0.5</confidence1><answer2>b</answer2>",
        "<confidence2>0</confidence2>",
        "x",
    ]
    got = judge(pieces, prompt("café"))
    assert got.answers == ("café", "b") and got.hits == (1.0, 0.0)
    assert got.segment_ids.tolist() == [0, 0, 0, 0, 1, 3, 4]


def test_each_rollout_is_judged_by_its_own_prompt():
    pieces = [
        f"<answer1>{a}</answer1><confidence1>0</confidence1><answer2>{b}</answer2><confidence2>0</confidence2>"
        for a, b in ("xy", "yx")
    ]
    decode = make_decode(Pieces(*pieces, "<stop>"))
    prompts = [prompt("x", id="1"), prompt("y", id="2"), prompt("z", id="3")]
    completions = [completion([0, 2]), completion([1, 2])]
    groups = judge_groups(prompts, [completions] * 3, Scorer(GRAMMAR, SPEC, "text", decode))
    assert [[r.hits for r in group] for group in groups] == [
        [(1, 0), (0, 1)],
        [(0, 1), (1, 0)],
        [(0, 0), (0, 0)],
    ]
    assert [[r.prompt.id for r in group] for group in groups] == [
        ["1", "1"],
        ["2", "2"],
        ["3", "3"],
    ]


def test_only_the_drawn_label_is_paid_for_and_aliases_are_repeats():
    golds = (Gold("influenza", ("flu",), 0.5), Gold("cold", (), 0.5))
    text = "<answer1>Flu</answer1><confidence1>0</confidence1><answer2>influenza</answer2><confidence2>0</confidence2>"
    for drawn, hits in ((0, (1.0, 0.0)), (1, (0.0, 0.0))):
        got = judge([text, "<stop>"], prompt(*golds, truth="exact", label=drawn))
        assert (
            got.answers == ("Flu", "influenza")
            and got.hits == hits
            and got.repeated == (False, True)
        )


def test_segments_of_a_trained_tokenizer(tmp_path):
    """Segments from token ids alone equal those of the text: where each token's first character lies."""
    names = ("flu", "common cold", "measles", *(f"rare {word}" for word in "a b c d e f g".split()))
    golds = tuple(Gold(name, (), 0.1) for name in names)
    examples = [
        Example(str(i), "test", f"A patient with fever, day {i}?", golds, "exact")
        for i in range(40)
    ]
    train_tokenizer(examples, "diagnosis", 400, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    grammar = Grammar("rlcr_multi", 3, thinking=True)
    asked = build_prompt(examples[0], grammar, tokenizer, "diagnosis")
    text = render(grammar, ["flu", "ménière", "common cold"], [0.8, 0.15, 0.05], thinking="fever")
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    got = judge_groups(
        [asked], [[completion(ids)]], Scorer(grammar, SPEC, "text", make_decode(tokenizer))
    )[0][0]
    assert (
        got.text == text and got.reason is None and got.answers == ("flu", "ménière", "common cold")
    )
    ends = [text.index(f"</{e.tag}>") + len(e.tag) + 3 for e in grammar.elements]
    crossing = 0
    for n, segment in enumerate(got.segment_ids[:-1].tolist()):
        start, end = (len(tokenizer.decode(ids[:m]).rstrip("\ufffd")) for m in (n, n + 1))
        assert segment == sum(e <= start for e in ends)
        crossing += any(start < e < end for e in ends)
    assert crossing > 3 and got.segment_ids[-1] == len(ends)
    longer = completion([*ids[:-1], *tokenizer.encode("<|user|>"), ids[-1]])
    other = judge_groups(
        [asked], [[longer]], Scorer(grammar, SPEC, "text", make_decode(tokenizer))
    )[0][0]
    assert (
        other.text == text + "<|user|>" and other.reason == "trailing_text"
    )  # special tokens are not overlooked


def test_each_completion_is_handed_over_once_as_soon_as_it_is_done(tiny_model):
    prompts, seen = (
        [
            Prompt(Example(id, "test", "?", ()), "?", ids)
            for id, ids in (("a", (1, 2, 3)), ("b", (4, 5)), ("c", (6,)))
        ],
        [],
    )
    params = SamplingParams(8, stop_ids=(3, 5, 7))
    groups, generation = sample(
        tiny_model(),
        prompts,
        4,
        params,
        40,
        (0, "train", 1),
        slice(1, None),
        lambda p, c: seen.append((p.id, c)),
    )
    assert generation.num_steps > 8, "two groups, one after the other"
    assert sorted((id, c.sample_index) for id, c in seen) == [
        (id, g) for id in "bc" for g in range(4)
    ]
    for id, c in seen:
        assert groups["bc".index(id)][c.sample_index].ids.tolist() == c.ids.tolist()


def test_draws_depend_on_identity_not_on_company(tiny_model):
    model, params = tiny_model(), SamplingParams(8)
    a, b = (
        Prompt(Example(id, "test", "?", ()), "?", ids)
        for id, ids in (("a", (1, 2, 3)), ("b", (4, 5)))
    )
    ids = lambda groups: [[c.ids.tolist() for c in group] for group in groups]  # noqa: E731
    first, _ = sample(model, [a, b], 3, params, 1000, (0, "train", 1))
    assert [[c.sample_index for c in group] for group in first] == [[0, 1, 2]] * 2
    assert ids(sample(model, [b, a], 2, params, 1000, (0, "train", 1))[0]) == [
        group[:2] for group in ids(first)[::-1]
    ]
    twice = ids(sample(model, [a, b, a], 3, params, 1000, (0, "train", 1))[0])
    assert twice[:2] == ids(first) and not set(map(tuple, twice[2])) & set(
        map(tuple, twice[0])
    )  # asked twice: two different groups
    namesake = Prompt(Example("c", "test", "?", ()), "?", a.ids)
    assert ids(sample(model, [namesake], 3, params, 1000, (0, "train", 1))[0])[0] != ids(first)[0]
    for other in ((0, "train", 2), (1, "train", 1), (0, "eval", 1)):
        assert not set(map(tuple, ids(sample(model, [a], 3, params, 1000, other)[0])[0])) & set(
            map(tuple, ids(first)[0])
        )


@pytest.mark.parametrize("first", (b"\xe2\x82", b"<answer1>a</answer1>\xe2\x80", b"\xff", b"a"))
def test_a_tokens_segment_is_known_before_it_is_drawn(first):
    """After half a character the stop token belongs to the segment of any other token there."""
    pieces = [first, b"\xac", b"<", b"\x83<answer2>b</answer2>"]
    stop = len(pieces)
    grammar = Grammar("rlvr_multi", 2, thinking=False)

    def decode(ids):
        return b"".join(pieces[i] for i in ids).decode("utf-8", "replace")

    def second_segment(token, reason):
        zeros = np.zeros(2)
        drawn = Completion(0, np.array([0, token]), zeros, zeros, reason)
        reading = read(prompt(Gold("a")), drawn, grammar, decode)
        return int(reading.parsed.segments(reading.token_starts)[1])

    found = {second_segment(token, "length") for token in range(1, stop)}
    assert found | {second_segment(stop, "stop")} == found and len(found) == 1

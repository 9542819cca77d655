"""Supervised warm-up: demonstrations are right-formed, and their targets are the exact distribution of every next token."""

import itertools
import math

import numpy as np
import pytest
import torch

from experiments.embedded_model.shape import embedded_config
from mar.answers.grammar import Grammar, parse
from mar.answers.tokenizer import load_tokenizer
from mar.errors import UserError
from mar.learn import demonstrations
from mar.policy.attention import group_attention
from mar.policy.model import Decoder
from mar.policy.sources import resolve_model
from mar.records import Example, Gold
from mar.tasks import clinic

PIECES = [
    "<",
    demonstrations.DrawnText(["a", "ab", "b", "abc"], [0.1, 0.2, 0.3, 0.4], 1),
    ">c",
    demonstrations.DrawnText(["x", "xyz"], [0.25, 0.75], 1),
    "!",
]


def characters(text: str) -> list[int]:
    return [ord(c) for c in text]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_model("embedded", "embedded", None)[0])


def test_targets_are_the_enumerated_next_token_distribution():
    options = [
        [(p, 1.0)] if isinstance(p, str) else list(zip(p.candidates, p.probabilities, strict=True))
        for p in PIECES
    ]
    texts: dict[str, float] = {}
    for choice in itertools.product(*options):
        text = "".join(part for part, _ in choice)
        texts[text] = texts.get(text, 0.0) + math.prod(p for _, p in choice)
    ids, targets = demonstrations.soft_targets(PIECES, characters, stop_id=0)
    assert "".join(map(chr, ids[:-1])) == "<ab>cxyz!" and ids[-1] == 0
    for position, target in enumerate(targets):
        exact: dict[int, float] = {}
        for text, p in texts.items():
            row = [*characters(text), 0]
            if row[:position] == ids[:position]:
                exact[row[position]] = exact.get(row[position], 0.0) + p
        total = sum(exact.values())
        assert target == pytest.approx({token: p / total for token, p in exact.items()}, abs=1e-12)


def test_a_field_that_one_token_cannot_foresee_is_refused():
    pieces = ["<", demonstrations.DrawnText(["a", "a>"], [0.5, 0.5], 1), ">c"]
    with pytest.raises(ValueError, match="begins with another"):
        demonstrations.soft_targets(pieces, characters, stop_id=0)


def test_confidences_are_noise_with_at_most_a_hint():
    for truth, share in ((0.7, 0.0), (None, 0.5)):
        assert demonstrations.confidence_weights(
            truth, demonstrations.ConfidenceHint(share)
        ) == pytest.approx([1 / 101] * 101)
    weights = np.array(demonstrations.confidence_weights(0.7, demonstrations.ConfidenceHint(0.25)))
    assert (
        weights.sum() == pytest.approx(1) and weights.argmax() == 70 and weights.min() >= 0.75 / 101
    )
    narrow, wide = (
        np.array(demonstrations.confidence_weights(0.5, demonstrations.ConfidenceHint(1.0, 1.0, s)))
        for s in (0.02, 0.2)
    )
    assert narrow[40:61].sum() > 0.98 and 0.2 < wide[40:61].sum() < 0.6


def test_demonstrations_read_back_in_every_form_with_distinct_answers(tokenizer):
    rng, encode = np.random.default_rng(0), demonstrations.piece_encoder(tokenizer)
    forms = set()
    for example in clinic.load("train", 300):
        grammar, _ = demonstrations.draw_grammar(rng)
        ids, targets = demonstrations.soft_targets(
            demonstrations.draw_demonstration(example, grammar, [], rng),
            encode,
            tokenizer.eos_token_id,
        )
        parsed = parse(tokenizer.decode(ids[:-1]), grammar)
        assert parsed.reason is None and len(set(parsed.answers)) == grammar.num_answers
        assert len(ids) == len(targets) and all(
            token in target for token, target in zip(ids, targets, strict=True)
        )
        forms.add((grammar.form, grammar.layout, grammar.thinking))
    assert len(forms) >= 9


def test_later_slots_exclude_what_was_said():
    example = Example(
        "x",
        "clinic",
        "?",
        tuple(Gold(n, (), p) for n, p in zip("abc", (0.5, 0.3, 0.2), strict=True)),
        "exact",
    )
    first, second, third = demonstrations.draw_answers(example, 3, [], np.random.default_rng(1))
    assert sorted((first.text, second.text, third.text)) == ["a", "b", "c"]
    assert first.text not in second.candidates and third.probabilities == [1.0]
    chances = {"a": 0.5, "b": 0.3, "c": 0.2}
    left = sum(chances[name] for name in second.candidates)
    assert second.probabilities == pytest.approx(
        [chances[name] / left for name in second.candidates]
    )


def test_where_the_posterior_has_too_few_names_others_follow():
    example = Example(
        "x",
        "clinic",
        "?",
        (Gold("a", (), 0.6), Gold("b", (), 0.4), Gold("never", (), 0.0)),
        "exact",
    )
    names = [
        field.text
        for field in demonstrations.draw_answers(
            example, 4, ["a", "p", "never", "q", "r"], np.random.default_rng(0)
        )
    ]
    # "never" has probability 0: it is as wrong as the others
    assert set(names[:2]) == {"a", "b"} and len({*names[2:]} & {"p", "q", "r", "never"}) == 2


def test_impossible_golds_follow_where_all_names_are_golds():
    golds = tuple(Gold(name, (), p) for name, p in (("a", 1.0), ("b", 0.0), ("c", 0.0)))
    example = Example("x", "ddxplus_bayes", "?", golds, "exact")
    answers = demonstrations.draw_answers(example, 3, ["a", "b", "c"], np.random.default_rng(0))
    assert answers[0].text == "a" and {answer.text for answer in answers} == {"a", "b", "c"}


def test_an_example_without_probabilities_teaches_its_gold_among_others():
    example = Example("x", "medqa", "Why? Because.", (Gold("gold", (), None),), "single")
    fields = demonstrations.draw_answers(
        example, 3, ["gold", "p", "q", "r"], np.random.default_rng(0)
    )
    names = [field.text for field in fields]
    assert (
        "gold" in names
        and len(set(names)) == 3
        and all(field.probabilities == [1.0] for field in fields)
    )
    with pytest.raises(
        UserError, match="too few different answers for .* lower reward.num_answers"
    ):
        demonstrations.draw_demonstration(
            example, Grammar("rlvr_multi", 3), ["p"], np.random.default_rng(0)
        )


def test_of_several_golds_as_many_are_taught_as_fit_in_any_order():
    example = Example("x", "ddxplus", "?", tuple(Gold(n) for n in "abcd"), "uniform", True)
    rng = np.random.default_rng(0)
    drawn = [
        tuple(field.text for field in demonstrations.draw_answers(example, 3, ["a", "p", "q"], rng))
        for _ in range(200)
    ]
    assert len(set(drawn)) == 24  # all ordered choices of three of the four
    drawn = [
        tuple(field.text for field in demonstrations.draw_answers(example, 5, ["a", "p", "q"], rng))
        for _ in range(200)
    ]
    assert (
        all({*"abcd"} < set(names) and len(set(names)) == 5 for names in drawn)
        and len({names[0] for names in drawn}) == 6
    )


def test_the_short_mixture_has_every_form_once_and_no_thoughts():
    rng = np.random.default_rng(0)
    drawn = {demonstrations.MIXTURES["short"](rng)[0] for _ in range(100)}
    assert {(g.form, g.num_answers) for g in drawn} == {
        ("rlvr_single", 1),
        ("rlcr_single", 1),
        ("rlvr_multi", 3),
        ("rlcr_multi", 3),
    }
    assert len(drawn) == 4 and not any(g.thinking or g.analysis for g in drawn)


def test_loss_is_the_dense_cross_entropy(tokenizer):
    torch.manual_seed(0)
    model = Decoder(embedded_config(len(tokenizer))).double()
    rng = np.random.default_rng(0)
    encode = demonstrations.piece_encoder(tokenizer)
    batch = demonstrations.make_demonstration_batch(
        clinic.load("train", 8),
        "diagnosis",
        tokenizer,
        encode,
        rng,
        [],
        hint=demonstrations.ConfidenceHint(0.3, 8.0),
        rows=2,
    )
    assert len(batch.packed.prompts) == 8 and len(batch.packed.rows) == 16
    packed, ends = batch.packed, [*batch.bags.starts.tolist()[1:], len(batch.bags.weights)]
    hidden = model.hidden(packed.ids, packed.positions, group_attention(packed))[
        packed.predict_from
    ]
    logprobs = (hidden @ model.head_weight.T).log_softmax(-1)
    dense = torch.zeros_like(logprobs)
    for row, (start, end) in enumerate(zip(batch.bags.starts.tolist(), ends, strict=True)):
        dense[row].index_add_(0, batch.bags.ids[start:end], batch.bags.weights[start:end])
    assert set(dense.sum(-1).round(decimals=9).tolist()) == {1.0, 8.0}
    expected = -(dense * logprobs).sum() / dense.sum()
    loss = demonstrations.soft_target_loss(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    shares = dense / dense.sum(-1, keepdim=True)
    entropy = (torch.special.entr(shares).sum(-1) * dense.sum(-1)).sum() / dense.sum()
    assert batch.entropy == pytest.approx(entropy.item(), rel=1e-12)
    ours, theirs = (
        torch.autograd.grad(x, model.embed.weight, retain_graph=True)[0] for x in (loss, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_bare_prompt_is_the_question_alone(tokenizer):
    examples = clinic.load("train", 3)

    def batch(bare: bool) -> demonstrations.DemonstrationBatch:
        encode = demonstrations.piece_encoder(tokenizer)
        teach = ("diagnosis", tokenizer, encode, np.random.default_rng(0), [], "plain")
        return demonstrations.make_demonstration_batch(examples, *teach, bare=bare)

    asked, alone = batch(False), batch(True)
    for example, span in zip(examples, alone.packed.prompts, strict=True):
        ids = alone.packed.ids[span[0] : span[0] + span[1]].tolist()
        assert tokenizer.decode(ids) == f"<|user|>{example.question}<|end|><|assistant|>"
    assert alone.packed.targets.tolist() == asked.packed.targets.tolist()
    assert alone.bags.weights.tolist() == asked.bags.weights.tolist()


def test_a_tokenizer_whose_pieces_do_not_join_is_refused():
    class Spaced:
        def __call__(self, text, **_):
            return {"input_ids": [32, *characters(text)]}

        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    with pytest.raises(UserError, match="joins pieces"):
        demonstrations.piece_encoder(Spaced())


def test_a_token_with_an_empty_bag_counts_nothing():
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 4), torch.randn(6, 4)
    tokens = torch.tensor([1, 2, 3])
    bags = demonstrations.join_bags([{1: 0.5, 4: 0.5}, {}, {3: 2.0}])
    logprobs = torch.log_softmax(hidden @ head.T, dim=-1)
    expected = -(0.5 * logprobs[0, 1] + 0.5 * logprobs[0, 4] + 2.0 * logprobs[2, 3])
    found = demonstrations.cross_entropy(hidden, head, tokens, bags)
    np.testing.assert_allclose(found.item(), expected.item(), rtol=1e-5)
    assert bags.entropy == pytest.approx(np.log(2.0))

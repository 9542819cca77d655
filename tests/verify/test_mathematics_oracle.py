"""Our rewards against an independent reading of the paper, on 10,000 hostile completions."""

import itertools
import random
import re
import string

import pytest

from mar.answers.grammar import Grammar, parse, render
from mar.answers.rewards import RewardSpec, reward
from mar.records import Gold
from mar.verify.matching import matching_increments, repeats

WORDS = ["flu", "Flu.", "the flu", "influenza", "cold", "Cold!", "gout", "mumps", "a cold", "lupus"]
POOL = (("flu", "influenza"), ("cold", "influenza"), ("gout",), ("mumps", "gout"))
SCRAPS = [
    *("</think>", "<answer1>", "</answer2>", "<think>", "flu", " ", "\n", "1%", "nan", "1e-9", "<"),
    "<confidence1>0.5</confidence1>",
]
P = r"\s*((?:0?\.[0-9]{1,39}|0|1|1\.0{1,38}))\s*"
NOTHING = r"((?:(?!</?(?:think|analysis|other|answer[0-9]*|confidence[0-9]*)>)[\s\S])*)"


def plain(text):
    """Lower case, no punctuation but relations, no articles: enough for the words above."""
    gone = string.punctuation.translate(str.maketrans("", "", "<>=~"))
    words = "".join(" " if c in gone else c for c in text.lower()).split()
    return " ".join(w for w in words if w not in ("a", "the")) or " ".join(words)


def read(text, K, confident):
    """(answers, confidences) up to the first breach, and whether the whole is right.

    By one regular expression for each prefix of the form.
    """
    parts = [r"\s*<think>[\s\S]*?</think>"]
    for k in range(1, K + 1):
        parts.append(rf"\s*<answer{k}>{NOTHING}</answer{k}>")
        if confident:
            parts.append(rf"\s*<confidence{k}>{P}</confidence{k}>")
    if re.match(parts[0], text) is None:
        return [None] * K, [None] * K, False
    for length in range(len(parts), 0, -1):
        # a backtracking .*? would read on to a second </think>
        pattern = "".join(parts[:length])
        pattern = pattern.replace(r"[\s\S]*?</think>", r"(?:(?!</think>)[\s\S])*</think>")
        found = re.match(pattern, text)
        groups = list(found.groups()) if found else []
        written = groups[::2] if confident else groups
        if found and all(a.strip() for a in written):
            q = [float(c) for c in groups[1::2]] if confident else []
            whole = length == len(parts) and not text[found.end() :].strip()
            pad = [a.strip() for a in written] + [None] * (K - len(written))
            return pad, q + [None] * (K - len(q)), whole
    raise AssertionError


def best(answers, golds):
    """The largest number of golds that distinct answers can take, by trying everything."""
    distinct = list(dict.fromkeys(plain(a) for a in answers if a is not None))
    accepted = [{plain(name) for name in names} for names in golds]
    fits = []
    for answer in distinct:
        fits.append([gold for gold, names in enumerate(accepted) if answer in names] + [None])
    choices = [[g for g in choice if g is not None] for choice in itertools.product(*fits)]
    return max(len(c) for c in choices if len(c) == len(set(c)))


def oracle(text, golds, K, confident, coverage, brier, sum_rule):
    """format + coverage - Brier; without the format no coverage, and all of Brier.

    The released reward breaks the sum rule at the cost of its Brier term alone.
    """
    answers, q, whole = read(text, K, confident)
    totals = [best(answers[:k], golds) for k in range(K + 1)]
    y = [b - a for a, b in itertools.pairwise(totals)]
    breach = sum_rule and sum(c for c in q if c is not None) > 1 + 1e-6
    ok = whole and not (breach and brier != "released")
    paid = {
        "sum": sum(y),
        "any": float(any(y)),
        "fraction_golds": sum(y) / len(golds),
        "fraction_answers": sum(y) / K,
    }[coverage]
    error = sum((c - h) ** 2 for c, h in zip(q, y, strict=True)) / K if ok and confident else 1.0
    total = 0.5 * ok + paid * ok
    return (
        total + {"none": 0.0, "paper": -error, "released": (1 - error) * (ok and not breach)}[brier]
    )


def completion(rng, K, confident):
    """A right completion, or one damaged by an edit somewhere."""
    grammar = Grammar("rlcr_multi" if confident else "rlvr_multi", K)
    q = [rng.choice([0.0, 0.1, 0.33, 0.34, 0.5, 0.9, 1.0]) for _ in range(K)]
    answers = rng.choices(WORDS, k=K)
    thinking = rng.choice(["hm", "<answer1>flu</answer1>", ""])
    text = render(grammar, answers, q, thinking)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        start = rng.randrange(len(text) + 1)
        length = rng.choice([0, 0, 1, 3, 12])
        text = text[:start] + rng.choice([*SCRAPS, ""]) + text[start + length :]
    if rng.random() < 0.1:
        text = text[: rng.randrange(len(text) + 1)]
    return text, grammar


@pytest.mark.parametrize("seed", range(10))
def test_rewards_agree_with_the_oracle(seed):
    rng = random.Random(seed)
    well_formed = 0
    for _ in range(1000):
        K = rng.randint(1, 4)
        confident = rng.random() < 0.7
        text, grammar = completion(rng, K, confident)
        names = rng.sample(POOL, rng.randint(1, 4))
        golds = [Gold(n[0], n[1:]) for n in names]
        coverage = rng.choice(["sum", "any", "fraction_golds", "fraction_answers"])
        brier = rng.choice(["paper", "released"]) if confident else "none"
        sum_rule = confident and rng.random() < 0.5
        parsed = parse(text, grammar)
        hits, _ = matching_increments(parsed.answers, golds)
        spec = RewardSpec(coverage, brier, sum_rule)
        ours = reward(parsed, hits, repeats(parsed.answers, golds), len(golds), grammar, spec)
        expected = oracle(text, names, K, confident, coverage, brier, sum_rule)
        assert ours.total == pytest.approx(expected, abs=1e-9), text
        assert ours.components.sum() == pytest.approx(ours.total, abs=1e-9)
        well_formed += parsed.reason is None
    assert 200 < well_formed < 800

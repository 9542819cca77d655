"""clinic: the posterior is exact, the labels follow it, and the bars computed from it agree with enumeration."""

import itertools
import json
import re
import string
from importlib.resources import files

import numpy as np
import pytest

from mar.errors import UserError
from mar.measure import bounds as bars
from mar.tasks import clinic

RAW = json.loads(files("mar.tasks").joinpath("clinic.json").read_text(encoding="utf-8"))


def read_vignette(question: str) -> tuple[int, str, set[str], set[str]]:
    """(age, m or f, findings present, findings known to be absent), from the words alone."""
    text = question.split(f" {clinic.ABSENT}")[0]
    age, person = re.match(r"An? (\d+)-year-old (\w+)\.", text).groups()
    present, absent = set(), set()
    for sentence in text.rstrip(".").split(". ")[1:]:
        areas, content = sentence.lower().split(": ")
        named = set() if content == "normal" else {word.lower() for word in content.split(", ")}
        for area in re.split(r", | and ", areas):
            findings = {
                f
                for system in RAW["systems"]
                if system["name"].lower() == area
                for f in system["findings"]
            }
            assert findings, area
            absent |= {f for f in findings if f.lower() not in named}
            present |= {f for f in findings if f.lower() in named}
        assert len(named) == 0 or len(named & {f.lower() for f in present}) == len(named)
    return int(age), "m" if person in ("man", "boy") else "f", present, absent


def bayes(age: int, sex: str, present: set[str], absent: set[str]) -> list[float]:
    leak = {f: p for system in RAW["systems"] for f, p in system["findings"].items()}
    band = next(i for i, (_, first, last) in enumerate(RAW["bands"]) if first <= age <= last)
    mass = []
    for c in RAW["conditions"]:
        p = c["prior"] * c["sex"][sex] / sum(c["sex"].values()) * c["age"][band] / sum(c["age"])
        for f in present:
            p *= c["findings"].get(f, leak[f])
        for f in absent:
            p *= 1 - c["findings"].get(f, leak[f])
        mass.append(p)
    return [p / sum(mass) for p in mass]


def test_posterior_is_bayes_on_the_words_of_the_vignette():
    for example in clinic.load("test", 40):
        given = [gold.probability for gold in example.golds]
        np.testing.assert_allclose(
            given, bayes(*read_vignette(example.question)), rtol=1e-9, atol=1e-12
        )
        assert [gold.name for gold in example.golds] == [c["name"] for c in RAW["conditions"]]
        assert example.truth == "exact" and not example.multi_label and len(example.targets()) == 1


def test_data_is_complete_and_names_do_not_clash():
    assert len(RAW["conditions"]) == 64 and [len(s["findings"]) for s in RAW["systems"]] == [7] * 12
    assert all(6 <= len(c["findings"]) <= 12 for c in RAW["conditions"])
    assert all(0.01 <= p <= 0.10 for s in RAW["systems"] for p in s["findings"].values())
    assert all(0.1 <= p <= 0.95 for c in RAW["conditions"] for p in c["findings"].values())
    assert [b[1] for b in RAW["bands"]] == [1] + [b[2] + 1 for b in RAW["bands"]][:-1]
    plain = str.maketrans("", "", string.punctuation)
    written = [name for c in RAW["conditions"] for name in (c["name"], *c["aliases"])]
    names = [" ".join(name.lower().translate(plain).split()) for name in written]
    assert len(set(names)) == len(names)


def test_labels_follow_the_posterior():
    """Chi-squared over ten bins of the probability given to each condition: 10 degrees of freedom, 34 at 1 in 5,000."""
    patients = clinic.draw_patients("train", 6000)
    p = clinic.posterior(patients)
    y = np.zeros_like(p)
    y[np.arange(len(p)), patients.condition] = 1
    bins = np.digitize(p, [0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
    chi2 = sum((y - p)[bins == b].sum() ** 2 / (p * (1 - p))[bins == b].sum() for b in range(10))
    assert chi2 < 34
    # each condition is drawn as often as the posteriors add up to: 64 degrees of freedom, 110 at 1 in 5,000
    assert ((y - p).sum(axis=0) ** 2 / (p * (1 - p)).sum(axis=0)).sum() < 110


def test_what_is_examined_does_not_depend_on_the_patient():
    patients = clinic.draw_patients("validation", 20000)
    seen = patients.examined.reshape(20000, 12, 7).all(axis=2).astype(float)
    np.testing.assert_array_equal(seen.sum(axis=1), patients.size)
    rate, counts = seen.mean(), np.bincount(patients.condition, minlength=64)
    sums = np.stack(
        [np.bincount(patients.condition, seen[:, s], 64) for s in range(12)], axis=1
    )  # [64, 12]
    z = (sums - counts[:, None] * rate) / np.sqrt(counts[:, None] * rate * (1 - rate))
    assert abs(z).max() < 4.6  # 768 cells, and 1 in 300 such tables has a larger one
    sizes = np.stack(
        [np.bincount(patients.condition[patients.size == s], minlength=64) for s in clinic.SIZES]
    )
    assert (
        ((sizes - counts / 3) ** 2) / (counts / 3)
    ).sum() < 128 + 5 * 16  # 128 degrees of freedom


def test_splits_are_disjoint_deterministic_and_nested():
    sets = {split: clinic.load(split, 300) for split in clinic.SPLITS}
    questions = {split: {e.question for e in examples} for split, examples in sets.items()}
    for a, b in itertools.combinations(clinic.SPLITS, 2):
        assert not questions[a] & questions[b]
    assert clinic.load("train", 100) == sets["train"][:100]
    assert clinic.load("train", 100, seed=1) != sets["train"][:100]
    assert sets["test"][7].id == "clinic-test-000007"
    with pytest.raises(UserError, match="dev"):
        clinic.load("dev", 1)


def test_difficulty():
    p = clinic.posterior(clinic.draw_patients("test", 4000))
    assert 0.45 < bars.ceiling_coverage(p, 1).mean() < 0.60
    assert 0.74 < bars.ceiling_coverage(p, 3).mean() < 0.84
    p = p[:500]
    assert (bars.ceiling_coverage(p, 3) - bars.floor_coverage(p, 3)).mean() > 0.09


def enumerate_inclusion(p: np.ndarray, k: int) -> np.ndarray:
    out = np.zeros(len(p))
    for order in itertools.permutations(range(len(p)), k):
        chance, left = 1.0, 1.0
        for i in order:
            chance, left = chance * p[i] / left, left - p[i]
        out[list(order)] += chance
    return out


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_inclusion_probabilities_against_enumeration(k):
    rng = np.random.default_rng(k)
    p = np.stack([rng.dirichlet(np.full(6, a)) for a in (0.3, 0.7, 1.0, 5.0)] + [np.full(6, 1 / 6)])
    given = bars.inclusion_probabilities(p, k)
    np.testing.assert_allclose(given, [enumerate_inclusion(row, k) for row in p], atol=1e-9)
    np.testing.assert_allclose(bars.inclusion_probabilities(p[0], k), given[0], atol=1e-12)


def test_inclusion_probabilities_at_the_edges():
    skewed = np.array([1 - 1.1e-8, 1e-8, 1e-9, 0.0])
    given = bars.inclusion_probabilities(skewed, 2)
    np.testing.assert_allclose(given, [1.0, 10 / 11, 1 / 11, 0.0], atol=1e-7)
    np.testing.assert_allclose(
        bars.inclusion_probabilities(np.array([1.0, 0.0, 0.0]), 2), [1, 0.5, 0.5], atol=1e-9
    )
    with pytest.raises(ValueError, match="k=4"):
        bars.inclusion_probabilities(np.full(3, 1 / 3), 4)


def test_bars_against_enumeration():
    p = np.random.default_rng(0).dirichlet(np.ones(6), size=4)
    for k in (1, 3):
        pairs = [list(c) for c in itertools.combinations(range(6), k)]
        best = [max(row[c].sum() for c in pairs) for row in p]
        np.testing.assert_allclose(bars.ceiling_coverage(p, k), best)
        values = [max((row[c] - row[c] * (1 - row[c]) / k).sum() for c in pairs) for row in p]
        np.testing.assert_allclose(bars.ceiling_value(p, k), values)
        floor = [row @ enumerate_inclusion(row, k) for row in p]
        np.testing.assert_allclose(bars.floor_coverage(p, k), floor, atol=1e-9)

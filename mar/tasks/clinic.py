"""clinic: an invented little clinic whose true posterior is known: coverage has exact bounds.

A patient's condition is drawn from the prior; sex, age band and 84 findings depend on it alone and
not on each other (naive Bayes). Some of 12 body systems, picked without a look at the patient, are
examined, and each finding of these is known to be present or absent. The golds are all conditions
with their exact posterior given sex, age band and the examined findings; `label` is the patient's
own. The numbers (clinic.json) are made up: plausible enough to read, no medical advice.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from mar.errors import UserError
from mar.records import Example, Gold

NOUN = "diagnosis"
ABSENT = "Findings that are not named there are absent."
SPLITS = ("train", "validation", "test")

# How many systems are examined, each number equally often.
SIZES = (7, 8, 9)

FIRST_ADULT_AGE = 18


# ---------------------------------------------------------------------- the clinic


@dataclass(frozen=True)
class Clinic:
    """clinic.json as arrays: C conditions, F findings in S systems, A age bands."""

    conditions: tuple[tuple[str, tuple[str, ...]], ...]  # [C] (name, aliases)
    systems: tuple[tuple[str, tuple[str, ...]], ...]  # [S] (name, findings); all of one size
    bands: np.ndarray  # [A, 2] first and last age
    prior: np.ndarray  # [C]
    sex: np.ndarray  # [C, 2] male, female
    age: np.ndarray  # [C, A]
    present: np.ndarray  # [C, F] P(finding | condition), strictly between 0 and 1

    @property
    def num_findings(self) -> int:
        return self.present.shape[1]


@cache
def clinic() -> Clinic:
    """The data, read once. Raises ValueError where the file contradicts itself."""
    raw = json.loads(files("mar.tasks").joinpath("clinic.json").read_text(encoding="utf-8"))
    conditions, systems = raw["conditions"], raw["systems"]

    # P(finding) in a condition that says nothing of it.
    leak: dict[str, float] = {}
    for system in systems:
        leak |= system["findings"]
    if len(leak) != sum(len(system["findings"]) for system in systems):
        raise ValueError("clinic.json: a finding stands in two systems")

    names: list[str] = []
    unknown: set[str] = set()
    for condition in conditions:
        names += [condition["name"], *condition["aliases"]]
        unknown |= condition["findings"].keys() - leak.keys()
    if len(set(names)) != len(names):
        raise ValueError("clinic.json: two conditions share a name")
    if unknown:
        raise ValueError(f"clinic.json: findings of no system: {sorted(unknown)}")

    present = np.array([list((leak | condition["findings"]).values()) for condition in conditions])
    if not ((present > 0) & (present < 1)).all():
        raise ValueError("clinic.json: chances of findings must lie between 0 and 1")
    sexes = [[condition["sex"]["m"], condition["sex"]["f"]] for condition in conditions]
    return Clinic(
        conditions=tuple((c["name"], tuple(c["aliases"])) for c in conditions),
        systems=tuple((system["name"], tuple(system["findings"])) for system in systems),
        bands=np.array([[first, last] for _, first, last in raw["bands"]]),
        prior=_normalised([condition["prior"] for condition in conditions]),
        sex=_normalised(sexes),
        age=_normalised([condition["age"] for condition in conditions]),
        present=present,
    )


def _normalised(weights: list[Any]) -> np.ndarray:
    """Probabilities in proportion to the weights, along the last axis."""
    array = np.asarray(weights, dtype=np.float64)
    if (array < 0).any() or (array.sum(axis=-1) <= 0).any():
        raise ValueError("clinic.json: weights must be >= 0 with a positive sum")
    return array / array.sum(axis=-1, keepdims=True)


# ---------------------------------------------------------------------- its patients


@dataclass(frozen=True)
class Patients:
    """n drawn patients: what is true and what the doctor sees."""

    condition: np.ndarray  # [n]
    sex: np.ndarray  # [n] 0 male, 1 female
    band: np.ndarray  # [n]
    age: np.ndarray  # [n] years
    order: np.ndarray  # [n, S] the systems in the order of examination
    size: np.ndarray  # [n] the first `size` of them are examined
    examined: np.ndarray  # [n, F] bool
    found: np.ndarray  # [n, F] bool: present and examined


def draw_patients(split: str, num: int, seed: int = 0) -> Patients:
    """`num` patients of a split. Patient i is the same for every `num` above i.

    Each patient takes one row of uniform numbers: one each for the condition, the sex, the age
    band, the age in it and the number of systems examined, then one a system and one a finding.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of clinic: it has {', '.join(SPLITS)}")
    data = clinic()
    num_systems = len(data.systems)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    uniform = rng.random((num, 5 + num_systems + data.num_findings))
    for_condition, for_sex, for_band, for_age, for_size = uniform[:, :5].T
    for_order = uniform[:, 5 : 5 + num_systems]
    for_findings = uniform[:, 5 + num_systems :]

    condition = _draw_index(data.prior, for_condition)
    sex = _draw_index(data.sex[condition], for_sex)
    band = _draw_index(data.age[condition], for_band)
    first, last = data.bands[band].T
    age = first + (for_age * (last - first + 1)).astype(int)

    size = np.array(SIZES)[(for_size * len(SIZES)).astype(int)]
    order = np.argsort(for_order, axis=1)
    position = np.argsort(order, axis=1)  # [n, S] when each system would be examined
    is_examined = position < size[:, None]  # [n, S]
    examined = is_examined.repeat(data.num_findings // num_systems, axis=1)
    present = for_findings < data.present[condition]
    return Patients(
        condition=condition,
        sex=sex,
        band=band,
        age=age,
        order=order,
        size=size,
        examined=examined,
        found=examined & present,
    )


def _draw_index(probabilities: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """[n] indices drawn from each row of `probabilities` [n, m] (or from [m]) by `uniform` [n]."""
    edges = np.cumsum(probabilities, axis=-1)
    return (uniform[:, None] * edges[..., -1:] >= edges).sum(axis=1)


def posterior(patients: Patients) -> np.ndarray:
    """[n, C] exact P(condition | sex, age band, examined findings).

        log P = log prior + log P(sex | c) + log P(band | c)
                + sum_{f found} log P(f | c) + sum_{f absent} log (1 - P(f | c)) - log of the sum

    Which systems are examined says nothing of the condition.
    """
    data = clinic()
    with np.errstate(divide="ignore"):  # a probability of 0 rules the condition out
        of_person = np.log(data.sex.T)[patients.sex]
        of_band = np.log(data.age.T)[patients.band]
        logs = np.log(data.prior) + of_person + of_band
    absent = patients.examined & ~patients.found
    # einsum and not `@`: then a patient's bits do not depend on how many there are.
    logs = logs + np.einsum("nf,cf->nc", patients.found.astype(float), np.log(data.present))
    logs = logs + np.einsum("nf,cf->nc", absent.astype(float), np.log1p(-data.present))
    p = np.exp(logs - logs.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


# ---------------------------------------------------------------------- patients in words


def vignettes(patients: Patients) -> list[str]:
    """The patients in words.

    Examined systems with findings in their order of examination, then all the normal ones.
    """
    found = patients.found.reshape(len(patients.age), len(clinic().systems), -1)  # [n, S, F / S]
    rows = zip(
        patients.age.tolist(),
        patients.sex.tolist(),
        patients.order.tolist(),
        patients.size.tolist(),
        found.tolist(),
        strict=True,
    )
    return [
        " ".join([_person(age, sex), *_examination(order[:size], found_by_system)])
        for age, sex, order, size, found_by_system in rows
    ]


def _person(age: int, sex: int) -> str:
    person = ("boy", "girl") if age < FIRST_ADULT_AGE else ("man", "woman")
    article = "An" if age in (8, 11, 18) or 80 <= age <= 89 else "A"
    return f"{article} {age}-year-old {person[sex]}."


def _examination(examined: list[int], found: list[list[bool]]) -> list[str]:
    """A sentence for each examined system with findings, and one for the normal ones."""
    sentences: list[str] = []
    normal: list[str] = []
    for system in examined:
        name, findings = clinic().systems[system]
        named = [f for f, is_found in zip(findings, found[system], strict=True) if is_found]
        if named:
            sentences.append(f"{name.capitalize()}: {', '.join(named)}.")
        else:
            normal.append(name)
    if normal:
        sentences.append(f"{_join(normal).capitalize()}: normal.")
    return sentences


def _join(words: list[str]) -> str:
    """a, b and c"""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} and {words[-1]}"


def load(split: str, num: int, seed: int = 0) -> list[Example]:
    """`num` patients of `split` as questions.

    train, validation and test are separate streams of `seed`. Raises UserError for another split.
    """
    patients = draw_patients(split, num, seed)
    names, aliases = zip(*clinic().conditions, strict=True)
    rows = zip(
        vignettes(patients), posterior(patients).tolist(), patients.condition.tolist(), strict=True
    )
    return [
        Example(
            id=f"clinic-{split}-{i:06d}",
            task="clinic",
            question=f"{vignette} {ABSENT}",
            golds=tuple(map(Gold, names, aliases, probabilities)),
            truth="exact",
            label=condition,
        )
        for i, (vignette, probabilities, condition) in enumerate(rows)
    ]

"""clinic: an invented little clinic whose true posterior is known, so coverage and calibration have exact bars.

A patient's condition is drawn from the prior; sex, age band and 84 findings depend on it alone and not on each other (naive Bayes). Some of 12 body
systems, picked without a look at the patient, are examined, and each finding of these is known to be present or absent. The golds are all
conditions with their exact posterior given sex, age band and the examined findings; `label` is the patient's own. The numbers (clinic.json) are
made up: plausible enough to read, no medical advice.
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

SIZES = (7, 8, 9)  # how many systems are examined, each equally often

FIRST_ADULT_AGE = 18


@dataclass(frozen=True)
class Clinic:
    """clinic.json as arrays: C conditions, F findings in S systems, A age bands."""

    conditions: tuple[tuple[str, tuple[str, ...]], ...]  # (name, aliases)
    systems: tuple[tuple[str, tuple[str, ...]], ...]  # (name, findings); all of one size
    bands: np.ndarray  # [A, 2] first and last age
    prior: np.ndarray  # [C]
    sex: np.ndarray  # [C, 2] male, female
    age: np.ndarray  # [C, A]
    present: np.ndarray  # [C, F], strictly between 0 and 1


def _shares(numbers: list[Any]) -> np.ndarray:
    weights = np.asarray(numbers, dtype=np.float64)
    if (weights < 0).any() or (weights.sum(axis=-1) <= 0).any():
        raise ValueError("clinic.json: weights must be >= 0 with a positive sum")
    return weights / weights.sum(axis=-1, keepdims=True)


@cache
def clinic() -> Clinic:
    """The data, read once. Raises ValueError where the file contradicts itself."""
    raw = json.loads(files("mar.tasks").joinpath("clinic.json").read_text(encoding="utf-8"))
    leak = {
        finding: chance
        for system in raw["systems"]
        for finding, chance in system["findings"].items()
    }
    if len(leak) != sum(len(system["findings"]) for system in raw["systems"]):
        raise ValueError("clinic.json: a finding stands in two systems")
    names = [
        name
        for condition in raw["conditions"]
        for name in (condition["name"], *condition["aliases"])
    ]
    if len(set(names)) != len(names):
        raise ValueError("clinic.json: two conditions share a name")
    unknown = {
        finding for condition in raw["conditions"] for finding in condition["findings"]
    } - set(leak)
    if unknown:
        raise ValueError(f"clinic.json: findings of no system: {sorted(unknown)}")
    present = np.array(
        [[condition["findings"].get(f, leak[f]) for f in leak] for condition in raw["conditions"]]
    )
    if not ((present > 0) & (present < 1)).all():
        raise ValueError("clinic.json: chances of findings must lie between 0 and 1")
    return Clinic(
        conditions=tuple(
            (condition["name"], tuple(condition["aliases"])) for condition in raw["conditions"]
        ),
        systems=tuple((system["name"], tuple(system["findings"])) for system in raw["systems"]),
        bands=np.array([band[1:] for band in raw["bands"]]),
        prior=_shares([condition["prior"] for condition in raw["conditions"]]),
        sex=_shares(
            [[condition["sex"]["m"], condition["sex"]["f"]] for condition in raw["conditions"]]
        ),
        age=_shares([condition["age"] for condition in raw["conditions"]]),
        present=present,
    )


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


def _pick(shares: np.ndarray, u: np.ndarray) -> np.ndarray:
    """[n] index drawn from each row of `shares` [n, m] (or [m]) by one uniform number `u` [n]."""
    edges = np.cumsum(shares, axis=-1)
    return (u[:, None] * edges[..., -1:] >= edges).sum(axis=1)


def draw_patients(split: str, num: int, seed: int = 0) -> Patients:
    """`num` patients of a split. Patient i is the same for every `num` above i."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of clinic: it has {', '.join(SPLITS)}")
    data = clinic()
    num_systems = len(data.systems)
    u = np.random.default_rng([seed, SPLITS.index(split)]).random(
        (num, 5 + num_systems + data.present.shape[1])
    )
    condition = _pick(data.prior, u[:, 0])
    sex, band = _pick(data.sex[condition], u[:, 1]), _pick(data.age[condition], u[:, 2])
    first, last = data.bands[band].T
    order, size = (
        np.argsort(u[:, 5 : 5 + num_systems], axis=1),
        np.array(SIZES)[(u[:, 4] * len(SIZES)).astype(int)],
    )
    examined = (np.argsort(order, axis=1) < size[:, None]).repeat(
        data.present.shape[1] // num_systems, axis=1
    )
    found = examined & (u[:, 5 + num_systems :] < data.present[condition])
    age = first + (u[:, 3] * (last - first + 1)).astype(int)
    return Patients(condition, sex, band, age, order, size, examined, found)


def posterior(patients: Patients) -> np.ndarray:
    """[n, C] exact P(condition | sex, age band, examined findings). Which systems are examined says nothing."""
    data = clinic()
    with np.errstate(divide="ignore"):  # a share of 0 rules the condition out
        logs = (
            np.log(data.prior)
            + np.log(data.sex.T)[patients.sex]
            + np.log(data.age.T)[patients.band]
        )
    absent = patients.examined & ~patients.found
    for seen, chance in ((patients.found, np.log(data.present)), (absent, np.log1p(-data.present))):
        logs = logs + np.einsum(
            "nf,cf->nc", seen.astype(float), chance
        )  # unlike `@`, a row's bits do not depend on n
    p = np.exp(logs - logs.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def _join(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])


def vignettes(patients: Patients) -> list[str]:
    """The patients in words: examined systems with findings in their order of examination, then all the normal ones."""
    systems, out = clinic().systems, []
    found = patients.found.reshape(len(patients.age), len(systems), -1).tolist()
    columns = (patients.age, patients.sex, patients.order, patients.size)
    for age, sex, order, size, present in zip(*(c.tolist() for c in columns), found, strict=True):
        person = ("boy", "girl") if age < FIRST_ADULT_AGE else ("man", "woman")
        article = "An" if age in (8, 11, 18) or 80 <= age <= 89 else "A"
        sentences, normal = [f"{article} {age}-year-old {person[sex]}."], []
        for system in order[:size]:
            name, findings = systems[system]
            named = [
                finding for finding, there in zip(findings, present[system], strict=True) if there
            ]
            if named:
                sentences.append(f"{name.capitalize()}: {', '.join(named)}.")
            else:
                normal.append(name)
        if normal:
            sentences.append(f"{_join(normal).capitalize()}: normal.")
        out.append(" ".join(sentences))
    return out


def load(split: str, num: int, seed: int = 0) -> list[Example]:
    """`num` patients of `split` as questions; train, validation and test are separate streams of `seed`.

    Raises UserError for another split.
    """
    patients = draw_patients(split, num, seed)
    names, aliases = zip(*clinic().conditions, strict=True)
    rows = zip(
        vignettes(patients), posterior(patients).tolist(), patients.condition.tolist(), strict=True
    )
    return [
        Example(
            f"clinic-{split}-{i:06d}",
            "clinic",
            f"{vignette} {ABSENT}",
            tuple(map(Gold, names, aliases, row)),
            "exact",
            label=condition,
        )
        for i, (vignette, row, condition) in enumerate(rows)
    ]

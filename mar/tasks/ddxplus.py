"""DDXPlus (Fansi Tchango et al. 2022): patients with 223 possible findings, 49 conditions, and a differential diagnosis.

`ddxplus`: rows of patients as codes, put into words with the release's table of evidences. Golds are the conditions of
the differential with p >= `min_prob` (multi-label), or with `target=drawn` the pathology. The differential is NOT a
posterior of the pathology, so its p are used for that threshold alone and never reach the golds.

`ddxplus_bayes`: patients drawn from the release's statistics, P(finding | condition) and how frequent conditions are,
each finding independent of the others given the condition. Some findings are asked for, whatever the patient has; the
golds are all conditions with their exact posterior given the answers.
"""

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mar.errors import UserError, one_line
from mar.files import hub_fault, stable_hash
from mar.records import Example, Gold
from mar.tasks.loading import Candidate, Loaded, Row, Source, load_rows, read_json, split_of

EVIDENCES, STATISTICS = (
    ("release_evidences_en.json", "release_evidences.json"),
    "evidence_given_condition_probs.json",
)

NUM_ASKED = (8, 12, 20)  # findings asked for, each number equally often

FEW, WORDS = (
    "differential has no condition above data.min_prob",
    {"N": "no", "Y": "yes", "NA": "none of them"},
)


def _folder(source: Source) -> Path:
    """The folder that the path is, or is in."""
    path = Path(str(source.path)).expanduser()
    return path if path.is_dir() else path.parent


def _table(source: Source) -> dict[str, Any]:
    """The evidences by code: beside the rows, or in the data set of the hub."""
    if source.kind == "hub":
        from huggingface_hub import hf_hub_download

        fault = hub_fault("dataset", str(source.hub_id))
        try:
            return read_json(
                Path(hf_hub_download(str(source.hub_id), EVIDENCES[1], repo_type="dataset"))
            )
        except OSError as error:  # what the hub's client raises too
            raise UserError(
                f"cannot load {EVIDENCES[1]} of {source.hub_id} from the hub ({fault or one_line(error)}): check the network"
            ) from None
    folder = _folder(source)
    return read_json(
        next(
            (folder / name for name in EVIDENCES if (folder / name).is_file()),
            folder / EVIDENCES[0],
        )
    )


def _value(evidence: dict[str, Any], value: str) -> str:
    text = evidence["value_meaning"].get(value, {}).get("en", value)
    return WORDS.get(text, text)


def vignette(age: int, sex: str, chief: str | None, codes: list[str], table: dict[str, Any]) -> str:
    """A patient in words: codes are `E_1` (yes), or `E_1_@_V_2` for a value; several values stand on one line."""
    answers: dict[str, list[str]] = {}
    for code in codes:
        name, _, value = code.partition("_@_")
        answers.setdefault(name, []).append(_value(table[name], value) if value else "yes")
    lines = [f"Age: {age}", f"Sex: {'male' if sex == 'M' else 'female'}"]
    lines += [f"Chief complaint: {table[chief]['question_en']}"] if chief in table else []
    return "\n".join(
        [*lines, *(f"- {table[name]['question_en']} {', '.join(v)}" for name, v in answers.items())]
    )


def _listed(row: Row, key: str, place: str) -> list[Any]:
    """A list of the row; the hub writes it as the text of a Python list."""
    value = row.get(key)
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: {key!r} must be a list that is not empty")
    return value


def load(source: Source) -> Loaded:
    """The patients of a split. Raises UserError naming file, line and key of a malformed row."""
    table = _table(source)

    def read(row: Row, place: str) -> Candidate:
        row = {key.lower(): value for key, value in row.items()}
        row.setdefault("differential", row.get("differential_diagnosis"))
        codes, differential = _listed(row, "evidences", place), _listed(row, "differential", place)
        if unknown := [code for code in codes if str(code).partition("_@_")[0] not in table]:
            raise UserError(
                f"{place}: 'evidences' has {unknown[0]!r}, which the table of evidences does not know"
            )
        if (
            type(row.get("age")) is not int
            or row.get("sex") not in ("M", "F")
            or not row.get("pathology")
        ):
            raise UserError(
                f"{place}: a patient has 'age' (a number), 'sex' (M or F) and 'pathology' (a condition)"
            )
        text = vignette(row["age"], row["sex"], row.get("initial_evidence"), codes, table)
        if not all(
            isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[1], int | float)
            for pair in differential
        ):
            raise UserError(
                f"{place}: 'differential' must be pairs of a condition and its probability"
            )
        names = [name for name, p in differential if p >= source.min_prob]
        names = [row["pathology"]] if source.target == "drawn" else names
        id, several = f"ddxplus-{stable_hash(text):016x}", len(names) > 1
        golds = tuple(Gold(name) for name in names)
        example = Example(id, "ddxplus", text, golds, "uniform" if several else "single", several)
        return Candidate(example, text, None if golds else FEW)

    return load_rows(source, read)


def posterior(prior: np.ndarray, present: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """P(condition | answers) [C] of answers [F] in {1: present, 0: absent, -1: not asked}: Bayes' rule."""
    likelihood = np.where(answers == 1, present, np.where(answers == 0, 1.0 - present, 1.0)).prod(
        axis=1
    )
    return prior * likelihood / (prior * likelihood).sum()


def load_bayes(source: Source) -> Loaded:
    """`num` drawn patients of a split, to which they belong by their text: no question is in two splits, whatever the seed."""
    if source.kind != "path" or source.num is None:
        raise UserError(
            f"ddxplus_bayes draws patients from {STATISTICS}: use data.source=path data.path=<its folder> and data.num_train"
        )
    table, raw = _table(source), read_json(_folder(source) / STATISTICS)
    conditions, findings = raw["conditions"], raw["symptoms"]
    counts = np.array([raw["condition_counts"][c] for c in conditions], dtype=np.float64)
    prior = counts / counts.sum()  # [C]
    present = np.array(
        [[raw["probabilities"][c].get(f, 0.0) for f in findings] for c in conditions]
    )  # [C, F]
    spread = (
        prior @ (present - prior @ present) ** 2
    )  # findings that tell conditions apart are asked for more often
    rng = np.random.default_rng(source.seed)
    examples: list[Example] = []
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    while len(examples) < source.num:
        condition, size = rng.choice(len(prior), p=prior), rng.choice(NUM_ASKED)
        asked = np.sort(rng.choice(len(findings), size, replace=False, p=spread / spread.sum()))
        answers = np.full(len(findings), -1)
        answers[asked] = rng.random(size) < present[condition, asked]
        lines = [
            f"- {table[findings[f]]['question_en']} {'yes' if answers[f] else 'no'}" for f in asked
        ]
        text = "A patient was asked:\n" + "\n".join(lines)
        if split_of(text) != source.split:
            continue
        if text in seen:
            dropped["duplicate question"] += 1
            continue
        seen.add(text)
        golds = tuple(
            map(
                Gold,
                conditions,
                [()] * len(conditions),
                posterior(prior, present, answers).tolist(),
            )
        )
        id = f"ddxplus_bayes-{source.split}-{len(examples):06d}"
        examples.append(
            Example(
                id,
                "ddxplus_bayes",
                text,
                golds,
                "exact",
                label=int(condition),
                stratum=f"asked{size}",
            )
        )
    return Loaded(examples, dropped)

"""DDXPlus (Fansi Tchango et al. 2022): patients with 223 possible findings and 49 conditions.

`ddxplus`: rows of patients as codes, put into words with the release's table of evidences. Golds
are the conditions of the differential diagnosis with p >= `min_prob` (multi-label), or with
`target=drawn` the pathology. The differential is NOT a posterior of the pathology, so its p are
used for that threshold alone and never reach the golds.

`ddxplus_bayes`: patients drawn from the release's statistics, P(finding | condition) and how
frequent conditions are, each finding independent of the others given the condition. Some findings
are asked for, whatever the patient has; the golds are all conditions with their exact posterior
given the answers.
"""

import ast
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mar.errors import UserError, one_line
from mar.files import at_home, hub_fault, stable_hash
from mar.records import Example, Gold
from mar.tasks.loading import Candidate, Loaded, Row, Source, load_rows, read_json, split_of

# The table of evidences: its name in the release, and at the hub.
EVIDENCES = ("release_evidences_en.json", "release_evidences.json")
STATISTICS = "evidence_given_condition_probs.json"

# Our own short words for each finding, for data.findings=lists.
SHORT_WORDS = Path(__file__).with_name("ddxplus_findings.json")

NO_GOLD = "differential has no condition above data.min_prob"

# Values of the table that are codes themselves.
WORDS = {"N": "no", "Y": "yes", "NA": "none of them"}


# ---------------------------------------------------------------------- the release's files


def _folder(source: Source) -> Path:
    """The folder that the path is, or is in."""
    path = at_home(str(source.path))
    return path if path.is_dir() else path.parent


def _evidences(source: Source) -> dict[str, Any]:
    """The table of evidences by code: beside the rows, or in the data set of the hub."""
    if source.kind == "hub":
        return read_json(_evidences_of_hub(str(source.hub_id)))
    files = [_folder(source) / name for name in EVIDENCES]
    return read_json(next((file for file in files if file.is_file()), files[0]))


def _evidences_of_hub(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    fault = hub_fault("dataset", hub_id)
    try:
        return Path(hf_hub_download(hub_id, EVIDENCES[1], repo_type="dataset"))
    except OSError as error:  # what the hub's client raises too
        raise UserError(
            f"cannot load {EVIDENCES[1]} of {hub_id} from the hub ({fault or one_line(error)}): "
            "check the network"
        ) from None


# ---------------------------------------------------------------------- ddxplus: rows


def load(source: Source) -> Loaded:
    """The patients of a split. Raises UserError with file, line and key of a malformed row."""
    words = EvidenceWords(_evidences(source))

    def read(row: Row, where: str) -> Candidate:
        return _read(row, where, words, source)

    return load_rows(source, read)


class EvidenceWords(dict[str, tuple[str, str]]):
    """(evidence, answer in words) of a code: `E_1` is a yes, `E_1_@_V_2` a value. Found once each."""

    def __init__(self, table: dict[str, Any]) -> None:
        super().__init__()
        self.table = table

    def __missing__(self, code: str) -> tuple[str, str]:
        evidence, _, value = code.partition("_@_")
        answer = _value_in_words(self.table[evidence], value) if value else "yes"
        self[code] = (evidence, answer)
        return evidence, answer

    def knows(self, code: object) -> bool:
        return str(code) in self or str(code).partition("_@_")[0] in self.table


def _read(row: Row, where: str, words: EvidenceWords, source: Source) -> Candidate:
    row = {key.lower(): value for key, value in row.items()}
    row.setdefault("differential", row.get("differential_diagnosis"))
    if str(row.get("age")).isdecimal():
        # a table's cells are texts
        row["age"] = int(row["age"])
    codes = _list_of(row, "evidences", where)
    differential = _list_of(row, "differential", where)
    unknown = [code for code in codes if not words.knows(code)]
    if unknown:
        raise UserError(
            f"{where}: 'evidences' has {unknown[0]!r}, which the table of evidences does not know"
        )
    has_age = type(row.get("age")) is int
    has_sex = row.get("sex") in ("M", "F")
    if not (has_age and has_sex and row.get("pathology")):
        raise UserError(
            f"{where}: a patient has 'age' (a number), 'sex' (M or F) and 'pathology' (a condition)"
        )
    text = vignette(
        age=row["age"],
        sex=row["sex"],
        chief_complaint=row.get("initial_evidence"),
        codes=codes,
        words=words,
    )
    if not all(_is_named_probability(pair) for pair in differential):
        raise UserError(f"{where}: 'differential' must be pairs of a condition and its probability")

    names = [name for name, p in differential if p >= source.min_prob]
    if source.target == "drawn":
        names = [row["pathology"]]
    several = len(names) > 1
    example = Example(
        id=f"ddxplus-{stable_hash(text):016x}",
        task="ddxplus",
        question=text,
        golds=tuple(Gold(name) for name in names),
        truth="uniform" if several else "single",
        multi_label=several,
    )
    return Candidate(example, text, drop_reason=None if names else NO_GOLD)


def _list_of(row: Row, key: str, where: str) -> list[Any]:
    """A list of the row; the hub writes it as the text of a Python list."""
    value = row.get(key)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = None
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key!r} must be a list that is not empty")
    return value


def _is_named_probability(value: Any) -> bool:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return is_pair and isinstance(value[1], int | float)


def vignette(
    age: int, sex: str, chief_complaint: str | None, codes: list[str], words: EvidenceWords
) -> str:
    """A patient in words. Several values of one evidence share a line."""
    table = words.table
    answers: dict[str, str] = {}
    for code in codes:
        evidence, answer = words[code]
        if evidence in answers:
            answer = f"{answers[evidence]}, {answer}"
        answers[evidence] = answer
    lines = [f"Age: {age}", f"Sex: {'male' if sex == 'M' else 'female'}"]
    if chief_complaint in table:
        lines.append(f"Chief complaint: {table[chief_complaint]['question_en']}")
    for evidence, answer in answers.items():
        lines.append(f"- {table[evidence]['question_en']} {answer}")
    return "\n".join(lines)


def _value_in_words(evidence: dict[str, Any], value: str) -> str:
    text = evidence["value_meaning"].get(value, {}).get("en", value)
    return WORDS.get(text, text)


# ---------------------------------------------------------------------- ddxplus_bayes: draws


# (findings asked for, answers, codes of all findings) -> the question's text.
FindingsInWords = Callable[[np.ndarray, np.ndarray, list[str]], str]


@dataclass(frozen=True)
class _Statistics:
    """The release's statistics: C conditions, F findings."""

    conditions: list[str]  # [C]
    findings: list[str]  # [F] their codes
    prior: np.ndarray  # [C]
    present: np.ndarray  # [C, F] P(finding | condition)


def _statistics(source: Source) -> _Statistics:
    raw = read_json(_folder(source) / STATISTICS)
    conditions, findings = raw["conditions"], raw["symptoms"]
    counts = np.array([raw["condition_counts"][c] for c in conditions], dtype=np.float64)
    present = np.zeros((len(conditions), len(findings)))
    for row, condition in enumerate(conditions):
        chances = raw["probabilities"][condition]
        present[row] = [chances.get(finding, 0.0) for finding in findings]
    return _Statistics(conditions, findings, prior=counts / counts.sum(), present=present)


def load_bayes(source: Source) -> Loaded:
    """`num` drawn patients of a split.

    Their text decides the split that they belong to: no question is in two splits, whatever the
    seed.
    """
    if source.kind != "path" or source.num is None:
        raise UserError(
            f"ddxplus_bayes draws patients from {STATISTICS}: use data.source=path "
            "data.path=<its folder> and data.num_train"
        )
    table = _evidences(source)
    statistics = _statistics(source)
    prior, present = statistics.prior, statistics.present
    num_conditions, num_findings = present.shape
    # Findings that tell conditions apart, with a large variance over them, are asked for more
    # often.
    spread = prior @ (present - prior @ present) ** 2
    _check_num_asked(source.num_asked, most=int(np.count_nonzero(spread)))
    in_words: FindingsInWords = partial(_questions_and_answers, table=table)
    if source.findings == "lists":
        in_words = partial(_two_lists, short=_short_words(statistics.findings))

    rng = np.random.default_rng(source.seed)
    examples: list[Example] = []
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    while len(examples) < source.num:
        condition = rng.choice(num_conditions, p=prior)
        num_asked = rng.choice(source.num_asked)
        weights = spread / spread.sum()
        asked = np.sort(rng.choice(num_findings, num_asked, replace=False, p=weights))
        answers = np.full(num_findings, -1)
        answers[asked] = rng.random(num_asked) < present[condition, asked]
        text = in_words(asked, answers, statistics.findings)
        if split_of(text) != source.split:
            continue
        if text in seen:
            dropped["duplicate question"] += 1
            continue
        seen.add(text)
        probabilities = posterior(prior, present, answers).tolist()
        golds = [
            Gold(name, probability=p)
            for name, p in zip(statistics.conditions, probabilities, strict=True)
        ]
        example = Example(
            id=f"ddxplus_bayes-{source.split}-{len(examples):06d}",
            task="ddxplus_bayes",
            question=text,
            golds=tuple(golds),
            truth="exact",
            label=int(condition),
            stratum=f"asked{num_asked}",
        )
        examples.append(example)
    return Loaded(examples, dropped)


def _questions_and_answers(
    asked: np.ndarray, answers: np.ndarray, findings: list[str], table: dict[str, Any]
) -> str:
    lines = ["A patient was asked:"]
    for finding in asked:
        question = table[findings[finding]]["question_en"]
        lines.append(f"- {question} {'yes' if answers[finding] else 'no'}")
    return "\n".join(lines)


def _two_lists(
    asked: np.ndarray, answers: np.ndarray, findings: list[str], short: dict[str, str]
) -> str:
    present, absent = (
        [short[findings[finding]] for finding in asked if answers[finding] == answer]
        for answer in (1, 0)
    )
    return two_lists(present, absent)


def two_lists(present: Sequence[str], absent: Sequence[str]) -> str:
    """A line of the findings that a patient has, and a line of those that were not found."""
    parts = (("Present", present), ("Absent", absent))
    return "\n".join(f"{name}: {', '.join(names) or 'none'}." for name, names in parts)


def _short_words(findings: Sequence[str]) -> dict[str, str]:
    short: dict[str, str] = read_json(SHORT_WORDS)
    unknown = [finding for finding in findings if finding not in short]
    if unknown:
        raise UserError(
            f"{STATISTICS} has the finding {unknown[0]}, for which {SHORT_WORDS.name} has no "
            "words: add them, or use data.findings=questions"
        )
    return short


def _check_num_asked(num_asked: Sequence[int], most: int) -> None:
    """No more findings can be asked for than tell conditions apart."""
    if max(num_asked) > most:
        raise UserError(
            f"data.num_asked={list(num_asked)} asks for {max(num_asked)} findings, and {most} of "
            f"{STATISTICS} tell conditions apart: ask for fewer"
        )


def posterior(prior: np.ndarray, present: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """P(condition | answers) [C] by Bayes' rule; answers [F] are 1 present, 0 absent, -1 not asked.

    P(c | answers) = P(c) prod_f P(answer f | c) / sum over conditions
    """
    of_absent = np.where(answers == 0, 1.0 - present, 1.0)
    of_each = np.where(answers == 1, present, of_absent)  # [C, F]
    likelihood = of_each.prod(axis=1)
    return prior * likelihood / (prior * likelihood).sum()

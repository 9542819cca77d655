"""Invented patients in the form of DDXPlus's own files, for measuring what a million rows cost.

    python experiments/bench/synthetic_rows.py FOLDER [--rows 1000000] [--seed 0]

Writes FOLDER/patients.jsonl and the table of evidences beside it. Sizes are those of the release:
223 evidences with questions of about 58 characters, 49 conditions, 18 evidences and 9 conditions a
patient on average. The words mean nothing. Every patient is another one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

PATIENTS = "patients.jsonl"
TABLE = "release_evidences_en.json"
NUM_EVIDENCES = 223
NUM_CONDITIONS = 49
NUM_WITH_VALUES = 9  # evidences that are answered by a value, not by yes
NUM_VALUES = 40
WORDS = """pain fever cough chest skin swelling recently often during the your a in of with after
before hard breath heart rate night sweat travel family history close contact loss weight stomach
worse better sudden attack pressure head neck arm leg back severe mild colour increased""".split()


def words(rng: np.random.Generator, count: int) -> str:
    """`count` words in any order."""
    return " ".join(rng.choice(WORDS, count))


def evidence_table(rng: np.random.Generator) -> dict[str, Any]:
    """The table of evidences by code, in the form of the release."""
    table = {}
    for number in range(NUM_EVIDENCES):
        code = f"E_{number}"
        meanings = {}
        if number < NUM_WITH_VALUES:
            for value in range(NUM_VALUES):
                meanings[f"V_{value}"] = {"fr": words(rng, 1), "en": words(rng, 2)}
        table[code] = {
            "name": code,
            "question_fr": f"Avez-vous {words(rng, 7)} ?",
            "question_en": f"Do you have {words(rng, 8)}?",
            "data_type": "M" if meanings else "B",
            "value_meaning": meanings,
            "possible-values": list(meanings),
        }
    return table


def patient(rng: np.random.Generator, number: int, conditions: list[str]) -> dict[str, Any]:
    """One row. The number is written in evidences, so that no two patients are the same."""
    present = np.sort(rng.choice(NUM_EVIDENCES, rng.integers(8, 24), replace=False))
    codes = [f"E_{evidence}" for evidence in present if evidence >= NUM_WITH_VALUES]
    for evidence in range(4):  # 40^4 patients differ in these alone
        value = number // NUM_VALUES**evidence % NUM_VALUES
        codes.append(f"E_{evidence}_@_V_{value}")
    shown = rng.choice(NUM_CONDITIONS, rng.integers(3, 16), replace=False)
    shares = np.sort(rng.dirichlet(np.ones(len(shown))))[::-1]
    differential = []
    for condition, share in zip(shown, shares, strict=True):
        differential.append([conditions[condition], round(float(share), 6)])
    return {
        "age": int(rng.integers(1, 95)),
        "sex": "MF"[rng.integers(2)],
        "pathology": differential[0][0],
        "initial_evidence": codes[0],
        "evidences": codes,
        "differential": differential,
    }


def write(folder: Path, num_rows: int, seed: int = 0) -> Path:
    """The two files in `folder`; returns that of the patients."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    table = evidence_table(rng)
    (folder / TABLE).write_text(json.dumps(table), encoding="utf-8")
    conditions = [words(rng, 2) for _ in range(NUM_CONDITIONS)]
    with (folder / PATIENTS).open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            file.write(json.dumps(patient(rng, number, conditions)) + "\n")
    return folder / PATIENTS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(write(args.folder, args.rows, args.seed))


if __name__ == "__main__":
    main()

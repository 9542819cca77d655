"""How many of the answers to read name a condition of DDXPlus, before training and after it.

    python -m experiments.ddxplus_smollm2.names DATA

The rest are words that the warm-up broke, and conditions that DDXPlus does not have.
"""

import argparse
import json
from collections.abc import Collection
from pathlib import Path

from experiments.common.tables import markdown_table
from experiments.ddxplus_smollm2.summary import HERE, read_rows


def names_of_conditions(data: Path) -> set[str]:
    told = json.loads((data / "release_conditions_en.json").read_text(encoding="utf-8"))
    return {name.lower() for name in told}


def counted(file: Path, names: Collection[str]) -> list[str]:
    """Of the answers before training and after it: how many are names, `n of m`."""
    cells = []
    rows = read_rows(file)
    for before in (True, False):
        answers = [
            answer.lower()
            for row in rows
            if (row["step"] == 0) == before
            for answer in row["answers"]
            if answer is not None
        ]
        cells.append(f"{sum(answer in names for answer in answers)} of {len(answers)}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of DDXPlus")
    names = names_of_conditions(parser.parse_args().data)
    files = sorted((HERE / "logs").glob("*_completions*.jsonl"))
    rows = [[file.stem, *counted(file, names)] for file in files]
    print(markdown_table(["answers of", "before training", "after"], rows))


if __name__ == "__main__":
    main()

"""Which released spellings of one answer match, and which of different answers, now and before.

    python -m experiments.tasks.aliases DATA [--before a0f1d13]

DATA is a folder with ambigqa/dev_light.json and protoqa/dev.scraped.jsonl. Compared are every two
spellings of one gold (AmbigQA's aliases; a cluster of this ProtoQA file has one spelling), and every
two of different golds of one question (the crowd's clusters). A pair of one gold that matched at the
older commit and no longer does, or one of different golds that only matches now, is printed. The
last line is one JSON document.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import combinations, product
from pathlib import Path

from mar.errors import UserError, exit_code
from mar.records import Example
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import load_data
from mar.verify.normaliser import normalise

FILES = {"ambigqa": "ambigqa/dev_light.json", "protoqa": "protoqa/dev.scraped.jsonl"}
ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "validation", "test")
FIRST = "a0f1d13"  # before relations and currencies were part of an answer
# Runs in the older tree. The function has stood in three files.
OLDER = """
import importlib, json, sys
for name in ("mar.verify.normaliser", "mar.verify.matching", "mar.verify"):
    try:
        normalise = importlib.import_module(name).normalise
        break
    except (ImportError, AttributeError):
        pass
json.dump([normalise(text) for text in json.load(sys.stdin)], sys.stdout)
"""

Pair = tuple[str, str]


def examples_of(task: str, file: Path) -> list[Example]:
    """All questions of a file, as a run reads them."""
    config = compose(
        [f"+experiment={task}", "model=embedded", "data.source=path", f"data.path={file}"]
    )
    display = Display("plain", 0, 0)
    return [one for split in SPLITS for one in load_data(config, split, None, 0, display)]


def pairs_of(examples: Sequence[Example]) -> tuple[set[Pair], set[Pair]]:
    """Every two spellings of one gold, and every two of different golds of a question."""
    same: set[Pair] = set()
    different: set[Pair] = set()
    for example in examples:
        spellings = [dict.fromkeys((gold.name, *gold.aliases)) for gold in example.golds]
        for of_gold in spellings:
            same |= set(combinations(of_gold, 2))
        for one, other in combinations(spellings, 2):
            different |= set(product(one, other))
    return same, different


def forms_at(revision: str, texts: Sequence[str]) -> dict[str, str]:
    """Each text in the normal form that it had at a commit of this repository."""
    archive = subprocess.run(
        ["git", "archive", revision, "mar"], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        raise UserError(f"--before {revision}: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as tree:
            tree.extractall(folder, filter="data")
        command = [sys.executable, "-c", OLDER]
        said = json.dumps(texts)
        done = subprocess.run(
            command, cwd=folder, input=said, capture_output=True, text=True, check=True
        )
    return dict(zip(texts, json.loads(done.stdout), strict=True))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="the folder with ambigqa/ and protoqa/")
    parser.add_argument("--before", default=FIRST, help=f"the older commit ({FIRST})")
    args = parser.parse_args(arguments)

    pairs = {task: pairs_of(examples_of(task, args.data / file)) for task, file in FILES.items()}
    texts = {text for sides in pairs.values() for side in sides for pair in side for text in pair}
    before = forms_at(args.before, sorted(texts))
    now = {text: normalise(text) for text in texts}
    found: dict[str, dict[str, int]] = {}
    for task, (same, different) in pairs.items():
        lost = matching(same, before) - matching(same, now)
        gained = matching(different, now) - matching(different, before)
        for one, other in sorted(lost):
            print(f"{task}: {one!r} and {other!r}, of one answer, no longer match")
        for one, other in sorted(gained):
            print(f"{task}: {one!r} and {other!r}, of different answers, match now")
        found[task] = {
            "pairs of one answer": len(same),
            "matched before": len(matching(same, before)),
            "match now": len(matching(same, now)),
            "lost": len(lost),
            "pairs of different answers": len(different),
            "different, matched before": len(matching(different, before)),
            "different, match now": len(matching(different, now)),
            "gained": len(gained),
        }
    print(json.dumps(found))


def matching(pairs: set[Pair], forms: Mapping[str, str]) -> set[Pair]:
    """The pairs whose spellings have the same normal form."""
    return {(one, other) for one, other in pairs if forms[one] == forms[other]}


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))

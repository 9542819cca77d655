"""What saying the same to every patient covers: the k conditions that are right most often in training.

    python -m experiments.ddxplus_smollm2.constant DATA       # writes constant.json; `make report` makes the table

A policy that covers no more has learnt which conditions are frequent, not what speaks for one.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments.claims.summary import grid
from experiments.ddxplus_smollm2.run import ANSWERS, PATIENTS, SHARED, warm_up
from mar.files import write_json
from mar.policy.sources import resolve_model
from mar.records import Example
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import build_training

RESULT = Path(__file__).parent / "constant.json"


def covered(
    train: Sequence[Example], held_out: Sequence[Example], k: int
) -> tuple[float, list[str]]:
    """Mean number of golds that the k most frequent ones of training hit, and which these are."""
    counts = Counter(gold.name for example in train for gold in example.targets())
    said = [name for name, _ in counts.most_common(k)]
    return sum(len(set(said) & {gold.name for gold in e.targets()}) for e in held_out) / len(
        held_out
    ), said


def markdown() -> str:
    """A line for each seed."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    lines = [
        [seed, str(row["patients"]), *(f"{value:.3f}" for value in row["covered"].values())]
        for seed, row in found["seeds"].items()
    ]
    return grid(
        ["the same to all, seed", "patients", *(f"coverage@{k}" for k in found["ks"])], lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of DDXPlus")
    data = parser.parse_args().data
    warm_up(data / PATIENTS)
    display = Display("plain", 0, 0)
    display.console.quiet = True
    ks, seeds = [1, 3, ANSWERS], {}
    for seed in range(2):
        config = compose(
            [*SHARED, f"data.path={data / PATIENTS}", "reward=multi_rlcr", f"seed={seed}"]
        )
        training = build_training(
            config, resolve_model("folder", "hf", config.model.path)[0], display
        )
        train, held_out = (
            [p.example for p in prompts]
            for prompts in (training.prompts.prompts, training.held_out.prompts)
        )
        values = {str(k): covered(train, held_out, k)[0] for k in ks}
        seeds[str(seed)] = {
            "patients": len(held_out),
            "covered": values,
            "said": covered(train, held_out, 3)[1],
        }
    write_json(RESULT, {"ks": ks, "seeds": seeds})
    print(markdown())


if __name__ == "__main__":
    main()

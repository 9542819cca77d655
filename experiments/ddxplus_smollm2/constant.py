"""What saying the same to every patient covers: the k conditions most often right in training.

    python -m experiments.ddxplus_smollm2.constant DATA       # writes constant.json

A policy that covers no more has learnt which conditions are frequent, not what speaks for one.
`make report` makes the table.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments.common.tables import markdown_table
from experiments.ddxplus_smollm2.run import ANSWERS, PATIENTS, SHARED, warmed_up
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
    frequent = [name for name, _ in counts.most_common(k)]
    num_hits = 0
    for example in held_out:
        right = {gold.name for gold in example.targets()}
        num_hits += len(right & set(frequent))
    return num_hits / len(held_out), frequent


def markdown() -> str:
    """A line for each seed."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    lines = []
    for seed, row in found["seeds"].items():
        cells = [f"{value:.3f}" for value in row["covered"].values()]
        lines.append([seed, str(row["patients"]), *cells])
    names = [f"coverage@{k}" for k in found["ks"]]
    return markdown_table(["the same to all, seed", "patients", *names], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of DDXPlus")
    data = parser.parse_args().data
    warmed_up(data)
    display = Display("plain", 0, 0)
    display.console.quiet = True
    ks = [1, 3, ANSWERS]
    seeds = {}
    for seed in range(2):
        config = compose(
            [*SHARED, f"data.path={data / PATIENTS}", "reward=multi_rlcr", f"seed={seed}"]
        )
        model, _ = resolve_model("folder", "hf", config.model.path)
        training = build_training(config, model, display)
        train = [prompt.example for prompt in training.prompt_order.prompts]
        held_out = [prompt.example for prompt in training.held_out.prompts]
        seeds[str(seed)] = {
            "patients": len(held_out),
            "covered": {str(k): covered(train, held_out, k)[0] for k in ks},
            "said": covered(train, held_out, 3)[1],
        }
    write_json(RESULT, {"ks": ks, "seeds": seeds})
    print(markdown())


if __name__ == "__main__":
    main()

"""Which parameters to train in minutes, at which rate: one recipe and seed, to a log.

    python -m experiments.first_light.recipes "all parameters, 4e-4" 0 [WORD ...]

trains 100 steps of the main job with the recipe's words and measures validation patients, one set
each. Without a seed: every seed; without a recipe: every recipe; logs that exist are then kept. A
run that was interrupted goes on. More words go to `mar.train`. Logs: experiments/first_light/logs/.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from experiments.common.commands import train_unless_finished, write_log
from experiments.common.tables import Columns, Log, markdown_table, read_logs_by, table_over_seeds
from mar.files import read_json_object, read_jsonl
from mar.policy.sources import environment
from mar.run.warm_up import without_places

LOGS = Path(__file__).parent / "logs"
RUNS = Path("runs/recipes")
SEEDS = 3
SHARED = [
    "+experiment=clinic",
    "train.steps=100",
    "data.eval_split=validation",
    "eval.num_items=500",
    "model.threads=1",
]
ALL = ["model.lora_rank=0", "model.trainable="]
# On every layer, alone.
ADAPTERS = ["model.trainable=", "model.lora_layers=", "model.lora_scale=2"]
GAINS = 'model.trainable="^norm|^blocks[.]5[.]mlp_norm"'
# Recipe -> its words, in the order in which they are run.
RECIPES = {
    "the main job's": [],
    "adapters of rank 8, 1e-3": [*ADAPTERS, "model.lora_rank=8", "model.lr=1e-3"],
    "adapters of rank 8, 5e-3": [*ADAPTERS, "model.lora_rank=8", "model.lr=5e-3"],
    "all parameters, 4e-4": [*ALL, "model.lr=4e-4"],
    "all parameters, 1e-3": [*ALL, "model.lr=1e-3"],
    "the main job's gains": ["model.lora_rank=0", GAINS],
    "the main job's adapter": ["model.trainable=lora_b"],
}


def name_of(recipe: str) -> str:
    """A recipe as part of a file name."""
    return re.sub(r"\W+", "_", recipe)


def one(recipe: str, seed: int, again: bool, words: Sequence[str]) -> None:
    """Make the log of one recipe and seed; one that exists only if it is to be made again."""
    name = name_of(recipe)
    log = LOGS / f"{name}_seed{seed}.json"
    if log.exists() and not again:
        return
    settings = [*SHARED, f"name={name}", f"seed={seed}", f"out={RUNS}", *RECIPES[recipe], *words]
    run = RUNS / name / f"seed{seed}"
    train_unless_finished(run, *settings, again=log.exists())
    end = read_json_object(run / "eval.json")
    steps, _ = read_jsonl(run / "metrics.jsonl")
    document = {
        "recipe": recipe,
        "seed": seed,
        "words": without_places(settings),
        **environment(),
        "gap_closed": end["gap_closed"],
        "after": end["after"],
        "train_s": round(sum(step["perf/sample_s"] + step["perf/update_s"] for step in steps)),
    }
    write_log(log, document)


def after(metric: str) -> Columns:
    return {metric: lambda log: log["after"][metric]}


COLUMNS: Columns = {
    "gap_closed": lambda log: log["gap_closed"],
    **after("coverage@3"),
    **after("top1"),
    **after("ece"),
    **after("q_mse"),
    **after("repeats_per_set"),
    "seconds": lambda log: log["train_s"],
}


def read_logs() -> dict[str, list[Log]]:
    """Recipe -> its logs."""
    return read_logs_by(LOGS, "recipe", RECIPES)


def markdown() -> str:
    """A line for each recipe."""
    return table_over_seeds(read_logs(), COLUMNS, "trained")


def words_of_recipes() -> str:
    """What each recipe changes."""
    rows = []
    for recipe, words in RECIPES.items():
        # A bar would end the table's cell.
        shown = " ".join(words).replace("|", r"\|")
        rows.append([recipe, f"`{shown}`" if words else ""])
    return markdown_table(["recipe", "words"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", nargs="?", choices=[*RECIPES])
    add("seed", nargs="?", type=int)
    add("words", nargs="*", metavar="WORD", help="such as model.threads=2")
    args = parser.parse_args()
    recipes = [args.recipe] if args.recipe else [*RECIPES]
    again = bool(args.recipe) and args.seed is not None
    for seed in range(SEEDS) if args.seed is None else [args.seed]:
        for recipe in recipes:
            one(recipe, seed, again, args.words)


if __name__ == "__main__":
    main()

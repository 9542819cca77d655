"""Is depth what confidences lack? New layers on top of a model that answers well learn to rate.

    python experiments/embedded_model/grow.py --out FOLDER [--model FOLDER] [--steps 1200]

The new layers begin as the identity (what they write is multiplied by zero), so at first nothing
changes. All that the model had stays as it was; with `--all` it learns as well. `--layers 0 --all`
has no new layer and is the control. A run that was stopped goes on at its last checkpoint.
FOLDER/log.jsonl has loss and measurements, as recipe.py writes them.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from recipe import Stage, Teacher

from mar.policy.model import Decoder
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model


@torch.no_grad()
def make_quieter(model: Decoder, share: float) -> None:
    """Multiply the residual stream by `share`, without another change (but for norms' epsilon).

    Muon without decay has made the stream hundreds long. New layers, whose weights begin small,
    could not be heard in it.
    """
    model.embed.weight *= share
    if model.head is None:
        # The head is the embedding: the last norm makes up for it.
        model.norm.weight /= share
    for block in model.blocks:
        block.o.weight *= share
        block.down.weight *= share


def grown(model: Decoder, num_layers: int) -> Decoder:
    """The same function, with so many more layers."""
    num_old = model.config.num_layers
    deeper = Decoder(replace(model.config, num_layers=num_old + num_layers))
    deeper.load_state_dict(model.state_dict(), strict=False)
    for block in deeper.blocks[num_old:]:
        torch.nn.init.zeros_(block.o.weight)
        torch.nn.init.zeros_(block.down.weight)
    return deeper


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--model", type=Path, default=resolve_model("embedded", "embedded", None)[0])
    add("--layers", type=int, default=2)
    add(
        "--quieter",
        type=float,
        default=1.0,
        help="what the residual stream is multiplied by at first",
    )
    add("--all", action="store_true", help="train every parameter")
    add("--steps", type=int, default=1200)
    add("--lr", type=float, default=1e-3)
    add("--falling", type=float, default=0.5, help="share of the steps in which the rate falls")
    add("--prompts", type=int, default=16)
    add("--rows", type=int, default=6)
    add("--sets", type=float, default=1.0, help="share of the prompts that ask for three answers")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    base = load_model(args.model)
    make_quieter(base, args.quieter)
    model = grown(base, args.layers)
    model.requires_grad_(args.all)
    for block in model.blocks[len(base.blocks) :]:
        block.requires_grad_(True)
    stage = Stage(
        "grown",
        args.steps,
        args.lr,
        bare=0,
        prompts=args.prompts,
        rows=args.rows,
        sets=args.sets,
        early=0.0,
        falling=args.falling,
    )
    teacher = Teacher(args.out, args.model, model, 100 + args.seed, (stage,))
    teacher.resume()
    teacher.log_start(args)
    teacher.go("grown")


if __name__ == "__main__":
    main()

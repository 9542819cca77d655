"""What two more layers cost: a decode step of the model that ships against one of four layers.

    python -m experiments.embedded_model.decode_step [--runs 7]

Sixteen prompts of 64 tokens, eight completions each, one thread. Weights are random: a step takes as
long with any. Both models make 8 and 72 tokens in turn; the difference of the two times is that of
64 steps, without the prompts.
"""

import argparse
import statistics

import torch

from experiments.bench.common import quiet_machine, seconds
from experiments.bench.sampler import Case, run_ours, text_prompts
from experiments.embedded_model.shape import VOCABULARY, embedded_config
from mar.policy.model import Decoder

# Layers, and units inside a block.
SHAPES = {"ships": (6, 256), "four_layers": (4, 384)}
FEW_TOKENS, MANY_TOKENS = 8, 72


def run_seconds(model: Decoder, max_tokens: int, seed: int) -> float:
    """Seconds of 16 prompts with eight completions each, all of `max_tokens`."""
    case = Case("decode", "random", text_prompts(VOCABULARY, 16, 64), 8, max_tokens)
    return seconds(lambda: run_ours(model, case, seed), runs=1)


def step_seconds(model: Decoder, seed: int) -> float:
    """Seconds of one decode step of 128 rows."""
    more = run_seconds(model, MANY_TOKENS, seed) - run_seconds(model, FEW_TOKENS, seed)
    return more / (MANY_TOKENS - FEW_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_machine()
    torch.manual_seed(0)
    models = {
        name: Decoder(embedded_config(VOCABULARY, layers, wide))
        for name, (layers, wide) in SHAPES.items()
    }
    steps: dict[str, list[float]] = {name: [] for name in SHAPES}
    for run in range(-1, args.runs):
        for name, model in models.items():
            step = step_seconds(model, seed=run)
            if run >= 0:  # the first one warms up
                steps[name].append(step)
    for name, found in steps.items():
        print(f"{name:12s} {1000 * statistics.median(found):6.2f} ms a step")
    ratios = [ours / before for ours, before in zip(*steps.values(), strict=True)]
    print(
        f"ratio        {statistics.median(ratios):6.2f}    ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()

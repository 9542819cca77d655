"""Where does the untrained model know how probable an answer is?

    python -m experiments.claims.probe [--model FOLDER] [--out FILE]

Without options it reads the embedded model and writes probe.json, in a minute or two.

Probes read its state after each of its layers, at three places of a set of three answers:

- `answer`, where it is about to write the first one: a linear probe of the whole posterior;
- `read`, where it has just read the first one: how probable is that answer? A linear probe, and one
  with a hidden layer of 256;
- `confidence`, where it is about to rate it: the same.

The answers are draws from the exact posterior. The probes are measured on other patients than
those that they were trained on.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.common.tables import markdown_table
from mar.answers.grammar import Grammar
from mar.answers.prompts import build_prompt
from mar.answers.tokenizer import load_tokenizer
from mar.files import write_json
from mar.policy.model import Decoder
from mar.policy.packing import chunks, pack_groups
from mar.policy.sources import environment, resolve_model
from mar.policy.weights import load_model
from mar.records import Example
from mar.tasks.loading import Source
from mar.tasks.registry import get_task

RESULT = Path(__file__).parent / "probe.json"
# Of the model that shipped before.
FOUR_LAYERS = Path(__file__).parent / "probe_four_layers.json"
# Patients of the probes' training, and those that they are measured on.
TRAINING = 8000
HELD_OUT = 1000
# Patients that no run and no demonstration has.
SEED = 2_000_000
SETS = Grammar("rlcr_multi", 3, thinking=False)
# Tokens of one forward pass.
AT_ONCE = 8192


@torch.no_grad()
def states(
    model: Decoder, tokenizer: Any, noun: str, examples: Sequence[Example]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the probes read and what they are to find, of n patients.

    States [3 places, layers, n, D] after the embedding and each layer; exact posteriors
    [n, conditions]; which condition was drawn as the first answer [n]; and the probability with
    which the model writes its name [n] (no name begins with another).
    """

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    layers: list[Tensor] = []
    first = model.blocks[0]
    hooks = [first.register_forward_pre_hook(lambda _, args: layers.append(args[0]))]
    for block in model.blocks:
        hooks.append(block.register_forward_hook(lambda _, args, out: layers.append(out)))

    rng = np.random.default_rng(0)
    posterior = np.array([[gold.probability for gold in e.golds] for e in examples])
    drawn = [int(rng.choice(len(p), p=p / p.sum())) for p in posterior]

    # Each row: the opening tag, the drawn answer, and the tags up to its confidence.
    opening = SETS.elements[0].opening
    closing = SETS.elements[0].closing + SETS.elements[1].opening
    num_opening = len(ids_of(opening))
    num_closing = len(ids_of(closing))
    prompts = [build_prompt(e, SETS, tokenizer, noun).ids.tolist() for e in examples]
    rows = []
    for example, i in zip(examples, drawn, strict=True):
        rows.append(ids_of(opening + example.golds[i].name + closing))

    found, written = [], []
    for part in chunks(range(len(examples)), [len(p) for p in prompts], AT_ONCE):
        # The last token of a row is only a target.
        packed = pack_groups([prompts[i] for i in part], [[[*rows[i], 0]] for i in part])
        layers.clear()
        logprobs = model(packed)[0].split([len(rows[i]) + 1 for i in part])
        answer_at = [start + num_opening - 1 for start, _, _ in packed.rows]
        confidence_at = [start + length - 1 for start, length, _ in packed.rows]
        read_at = [place - num_closing for place in confidence_at]
        of_places = []
        for places in (answer_at, read_at, confidence_at):
            of_places.append(torch.stack([states[places] for states in layers]))
        found.append(torch.stack(of_places))
        for row in logprobs:
            of_name = row[num_opening : -1 - num_closing]
            written.append(of_name.sum().exp())
    for hook in hooks:
        hook.remove()
    return (
        torch.cat(found, 2),
        torch.tensor(posterior, dtype=torch.float32),
        torch.tensor(drawn),
        torch.stack(written),
    )


def of_posterior(
    train: Tensor, target: Tensor, held_out: Tensor, truth: Tensor, drawn: Tensor
) -> dict[str, float]:
    """A linear probe of the posterior, on held-out states.

    KL in nats from the exact one, and the mean squared error of the drawn answer's probability.
    """
    mean = train.mean(0)
    std = train.std(0) + 1e-6
    probe = nn.Linear(train.shape[1], target.shape[1])
    nn.init.zeros_(probe.weight)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logprobs = probe((train - mean) / std).log_softmax(-1)
        cross_entropy = -(target * logprobs).sum(-1).mean()
        total = cross_entropy + 1e-4 * probe.weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        logprobs = probe((held_out - mean) / std).log_softmax(-1)
        kl = (torch.special.xlogy(truth, truth) - truth * logprobs).sum(-1).mean()
        of_drawn = (logprobs.exp() - truth).gather(1, drawn[:, None])
        return {"kl": kl.item(), "of_drawn": (of_drawn**2).mean().item()}


def errors(train: Tensor, target: Tensor, held_out: Tensor, truth: Tensor) -> tuple[float, float]:
    """Mean squared errors of the probability of the answer just written, on held-out states: of a
    linear probe, and of one with a hidden layer.
    """
    from sklearn.linear_model import RidgeCV  # an extra
    from sklearn.neural_network import MLPRegressor

    mean = train.mean(0)
    std = train.std(0) + 1e-6
    x = ((train - mean) / std).numpy()
    held_out_x = ((held_out - mean) / std).numpy()
    linear = RidgeCV(np.logspace(-2, 4, 7)).fit(x, target.numpy())
    hidden = MLPRegressor(
        hidden_layer_sizes=(256,), alpha=1e-2, early_stopping=True, random_state=0, max_iter=200
    )
    hidden.fit(x, target.numpy())

    def error(probe: Any) -> float:
        return float(np.mean((probe.predict(held_out_x) - truth.numpy()) ** 2))

    return error(linear), error(hidden)


def markdown(file: Path = RESULT) -> str:
    """A line for each depth."""
    columns = {
        "kl": "answer: KL of the posterior",
        "of_drawn": "answer: error",
        "read": "read: error",
        "read_hidden": "with a hidden layer",
        "confidence": "confidence: error",
        "confidence_hidden": "with a hidden layer",
    }
    lines = []
    for row in json.loads(file.read_text(encoding="utf-8"))["layers"]:
        depth = str(row["layer"] or "embedding")
        lines.append([depth, *(f"{row[key]:.3f}" for key in columns)])
    return markdown_table(["after layer", *columns.values()], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=resolve_model("embedded", "embedded", None)[0]
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = load_model(args.model)
    tokenizer = load_tokenizer(args.model)
    task = get_task("clinic")

    def read(split: str, num: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        examples = task.load(Source("embedded", split, num, SEED)).examples
        return states(model, tokenizer, task.noun, examples)

    train, posterior, drawn, _ = read("train", TRAINING)
    held_out, exact, chosen, written = read("validation", HELD_OUT)
    target = posterior.gather(1, drawn[:, None])[:, 0]
    truth = exact.gather(1, chosen[:, None])[:, 0]
    layers = []
    for layer in range(train.shape[1]):
        of_answer = of_posterior(train[0, layer], posterior, held_out[0, layer], exact, chosen)
        row = {"layer": layer, **of_answer}
        for place, name in enumerate(("read", "confidence"), start=1):
            linear, hidden = errors(train[place, layer], target, held_out[place, layer], truth)
            row |= {name: linear, f"{name}_hidden": hidden}
        layers.append(row)
        print(json.dumps(layers[-1]), flush=True)
    document = {
        **environment(),
        "patients": [TRAINING, HELD_OUT],
        "variance": truth.var().item(),
        "own_answers": ((written - truth) ** 2).mean().item(),
        "layers": layers,
    }
    write_json(args.out, document)


if __name__ == "__main__":
    main()

"""Where does the untrained model know how probable an answer is?  python experiments/claims/probe.py      # writes probe.json, some minutes

Probes read its state after each of its layers, at two places of a set of three answers: `answer`, where it is about to write the first answer
(a linear probe of the whole posterior), and `confidence`, where it is about to rate it (how probable is what it just wrote? a linear probe and one
with a hidden layer of 256). The answers are draws from the exact posterior; the patients of the probes' training are not those they are measured on.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.neural_network import MLPRegressor
from torch import Tensor, nn

from experiments.claims.summary import grid
from mar.attention import chunks, pack_groups
from mar.fetch import environment, resolve_model
from mar.grammar import Grammar
from mar.log import write_json
from mar.model import Decoder
from mar.prompts import build_prompt, load_tokenizer
from mar.records import Example
from mar.tasks import get_task
from mar.tasks.common import Source
from mar.weights import load_model

RESULT = Path(__file__).parent / "probe.json"
TRAINING, HELD_OUT, SEED = 8000, 1000, 2_000_000  # patients, and a seed that no run and no lesson has
SETS, AT_ONCE = Grammar("rlcr_multi", 3, thinking=False), 8192


@torch.no_grad()
def states(model: Decoder, tokenizer: Any, noun: str, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States [places, layers, n, width] after the embedding and each layer; [n, conditions] exact posteriors; of the drawn first answers the exact
    probabilities [n] and those that the model gives to them where it writes them."""
    layers: list[Tensor] = []
    hooks = [model.blocks[0].register_forward_pre_hook(lambda _, args: layers.append(args[0]))]
    hooks += [block.register_forward_hook(lambda _, args, out: layers.append(out)) for block in model.blocks]
    rng, opening = np.random.default_rng(0), tokenizer(SETS.elements[0].opening, add_special_tokens=False)["input_ids"]
    posterior = np.array([[gold.probability for gold in e.golds] for e in examples])
    drawn = [int(rng.choice(len(p), p=p / p.sum())) for p in posterior]
    prompts = [list(build_prompt(e, SETS, tokenizer, noun).ids) for e in examples]
    closing = SETS.elements[0].closing + SETS.elements[1].opening
    rows = [
        tokenizer(SETS.elements[0].opening + e.golds[i].name + closing, add_special_tokens=False)["input_ids"]
        for e, i in zip(examples, drawn, strict=True)
    ]
    found, said = [], []
    for part in chunks(range(len(examples)), [len(p) for p in prompts], AT_ONCE):
        packed = pack_groups([prompts[i] for i in part], [[[*rows[i], 0]] for i in part])  # the last token is a target only
        layers.clear()
        logprobs = model(packed)[0].split([len(rows[i]) + 1 for i in part])
        places = [(start + len(opening) - 1, start + length - 1) for start, length, _ in packed.rows]
        found.append(torch.stack([torch.stack([x[[p[which] for p in places]] for x in layers]) for which in (0, 1)]))
        ends = len(tokenizer(closing, add_special_tokens=False)["input_ids"])
        said += [row[len(opening) : -1 - ends].sum().exp() for row in logprobs]
    for hook in hooks:
        hook.remove()
    exact = torch.tensor(posterior, dtype=torch.float32)
    return torch.cat(found, 2), exact, exact[range(len(drawn)), drawn], torch.stack(said)


def divergence(train: Tensor, target: Tensor, held_out: Tensor, truth: Tensor) -> float:
    """KL in nats from the exact posterior to a linear probe's, on held-out states."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    probe = nn.Linear(train.shape[1], target.shape[1])
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        out = -(target * probe((train - mean) / std).log_softmax(-1)).sum(-1).mean() + 1e-4 * probe.weight.square().sum()
        out.backward()
        return out

    optimizer.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        said = probe((held_out - mean) / std).log_softmax(-1)
        return (torch.special.xlogy(truth, truth) - truth * said).sum(-1).mean().item()


def errors(train: Tensor, target: Tensor, held_out: Tensor, truth: Tensor) -> dict[str, float]:
    """Mean squared errors of the probability of the answer just written, on held-out states."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    x, at = ((train - mean) / std).numpy(), ((held_out - mean) / std).numpy()
    ridge = RidgeCV(np.logspace(-2, 4, 7)).fit(x, target.numpy())
    hidden = MLPRegressor(hidden_layer_sizes=(256,), alpha=1e-2, early_stopping=True, random_state=0, max_iter=200).fit(x, target.numpy())
    return {name: float(np.mean((probe.predict(at) - truth.numpy()) ** 2)) for name, probe in (("linear", ridge), ("hidden", hidden))}


def markdown() -> str:
    """A line for each depth."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    names = ("KL of the posterior where it answers", "error of a linear probe where it rates", "with a hidden layer")
    lines = [[str(row["layer"]), *(f"{row[key]:.3f}" for key in ("kl", "linear", "hidden"))] for row in found["layers"]]
    return grid(("after layer", *names), lines)


def main() -> None:
    folder, _ = resolve_model("embedded", "embedded", None)
    model, tokenizer, task = load_model(folder), load_tokenizer(folder), get_task("clinic")
    parts = [task.load(Source("embedded", split, n, SEED)).examples for split, n in (("train", TRAINING), ("validation", HELD_OUT))]
    (train, posterior, p, _), (held_out, exact, truth, said) = (states(model, tokenizer, task.noun, part) for part in parts)
    layers = []
    for layer in range(train.shape[1]):
        row = {"layer": layer, "kl": divergence(train[0, layer], posterior, held_out[0, layer], exact)}
        layers.append(row | errors(train[1, layer], p, held_out[1, layer], truth))
        print(json.dumps(layers[-1]), flush=True)
    told = {"patients": [TRAINING, HELD_OUT], "variance": truth.var().item(), "own_answers": ((said - truth) ** 2).mean().item()}
    write_json(RESULT, {**environment(), **told, "layers": layers})


if __name__ == "__main__":
    main()

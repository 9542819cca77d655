"""Where does the untrained model know how probable an answer is?  python -m experiments.claims.probe      # writes probe.json, a minute or two

Probes read its state after each of its layers, at two places of a set of three answers: `answer`, where it is about to write the first one (a
linear probe of the whole posterior), and `confidence`, where it is about to rate it (how probable is what it just wrote? a linear probe, and one with
a hidden layer of 256). The answers are draws from the exact posterior; the patients of the probes' training are not those they are measured on.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.common.tables import markdown_table
from mar.answers.grammar import Grammar
from mar.answers.prompts import build_prompt, load_tokenizer
from mar.files import write_json
from mar.policy.attention import chunks, pack_groups
from mar.policy.model import Decoder
from mar.policy.sources import environment, resolve_model
from mar.policy.weights import load_model
from mar.records import Example
from mar.tasks.loading import Source
from mar.tasks.registry import get_task

RESULT = Path(__file__).parent / "probe.json"
TRAINING, HELD_OUT, SEED = (
    8000,
    1000,
    2_000_000,
)  # patients, and a seed that no run and no lesson has
SETS, AT_ONCE = Grammar("rlcr_multi", 3, thinking=False), 8192


@torch.no_grad()
def states(
    model: Decoder, tokenizer: Any, noun: str, examples: Sequence[Example]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States [places, layers, n, width] after the embedding and each layer; exact posteriors [n, conditions]; which condition was drawn as the first
    answer [n], and the probability with which the model writes its name [n] (no name begins with another)."""
    layers: list[Tensor] = []
    hooks = [model.blocks[0].register_forward_pre_hook(lambda _, args: layers.append(args[0]))]
    hooks += [
        block.register_forward_hook(lambda _, args, out: layers.append(out))
        for block in model.blocks
    ]
    rng, opening = (
        np.random.default_rng(0),
        tokenizer(SETS.elements[0].opening, add_special_tokens=False)["input_ids"],
    )
    posterior = np.array([[gold.probability for gold in e.golds] for e in examples])
    drawn = [int(rng.choice(len(p), p=p / p.sum())) for p in posterior]
    prompts = [list(build_prompt(e, SETS, tokenizer, noun).ids) for e in examples]
    closing = SETS.elements[0].closing + SETS.elements[1].opening
    ends = len(tokenizer(closing, add_special_tokens=False)["input_ids"])
    texts = [
        SETS.elements[0].opening + e.golds[i].name + closing
        for e, i in zip(examples, drawn, strict=True)
    ]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    found, said = [], []
    for part in chunks(range(len(examples)), [len(p) for p in prompts], AT_ONCE):
        packed = pack_groups(
            [prompts[i] for i in part], [[[*rows[i], 0]] for i in part]
        )  # the last token is a target only
        layers.clear()
        logprobs = model(packed)[0].split([len(rows[i]) + 1 for i in part])
        places = [
            (start + len(opening) - 1, start + length - 1) for start, length, _ in packed.rows
        ]
        found.append(
            torch.stack(
                [torch.stack([x[[p[which] for p in places]] for x in layers]) for which in (0, 1)]
            )
        )
        said += [row[len(opening) : -1 - ends].sum().exp() for row in logprobs]
    for hook in hooks:
        hook.remove()
    return (
        torch.cat(found, 2),
        torch.tensor(posterior, dtype=torch.float32),
        torch.tensor(drawn),
        torch.stack(said),
    )


def of_posterior(
    train: Tensor, target: Tensor, held_out: Tensor, truth: Tensor, drawn: Tensor
) -> dict[str, float]:
    """A linear probe of the posterior, on held-out states: KL in nats from the exact one, and the mean squared error of the drawn
    answer's probability."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    probe = nn.Linear(train.shape[1], target.shape[1])
    nn.init.zeros_(probe.weight)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        out = (
            -(target * probe((train - mean) / std).log_softmax(-1)).sum(-1).mean()
            + 1e-4 * probe.weight.square().sum()
        )
        out.backward()
        return out

    optimizer.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        said = probe((held_out - mean) / std).log_softmax(-1)
        kl = (torch.special.xlogy(truth, truth) - truth * said).sum(-1).mean().item()
        return {
            "kl": kl,
            "of_drawn": ((said.exp() - truth).gather(1, drawn[:, None]) ** 2).mean().item(),
        }


def errors(train: Tensor, target: Tensor, held_out: Tensor, truth: Tensor) -> dict[str, float]:
    """Mean squared errors of the probability of the answer just written, on held-out states."""
    from sklearn.linear_model import RidgeCV  # an extra
    from sklearn.neural_network import MLPRegressor

    mean, std = train.mean(0), train.std(0) + 1e-6
    x, at = ((train - mean) / std).numpy(), ((held_out - mean) / std).numpy()
    ridge = RidgeCV(np.logspace(-2, 4, 7)).fit(x, target.numpy())
    hidden = MLPRegressor(
        hidden_layer_sizes=(256,), alpha=1e-2, early_stopping=True, random_state=0, max_iter=200
    ).fit(x, target.numpy())
    return {
        name: float(np.mean((probe.predict(at) - truth.numpy()) ** 2))
        for name, probe in (("linear", ridge), ("hidden", hidden))
    }


def markdown(file: Path = RESULT) -> str:
    """A line for each depth."""
    columns = {
        "kl": "answer: KL of the posterior",
        "of_drawn": "answer: error",
        "linear": "confidence: error",
        "hidden": "with a hidden layer",
    }
    layers = json.loads(file.read_text(encoding="utf-8"))["layers"]
    lines = [
        [str(row["layer"] or "embedding"), *(f"{row[key]:.3f}" for key in columns)]
        for row in layers
    ]
    return markdown_table(("after layer", *columns.values()), lines)


def main() -> None:
    torch.manual_seed(0)
    folder, _ = resolve_model("embedded", "embedded", None)
    model, tokenizer, task = load_model(folder), load_tokenizer(folder), get_task("clinic")
    parts = [
        task.load(Source("embedded", split, n, SEED)).examples
        for split, n in (("train", TRAINING), ("validation", HELD_OUT))
    ]
    (train, posterior, drawn, _), (held_out, exact, chosen, said) = (
        states(model, tokenizer, task.noun, part) for part in parts
    )
    p, truth = posterior.gather(1, drawn[:, None])[:, 0], exact.gather(1, chosen[:, None])[:, 0]
    layers = []
    for layer in range(train.shape[1]):
        row = {
            "layer": layer,
            **of_posterior(train[0, layer], posterior, held_out[0, layer], exact, chosen),
        }
        layers.append(row | errors(train[1, layer], p, held_out[1, layer], truth))
        print(json.dumps(layers[-1]), flush=True)
    told = {
        "patients": [TRAINING, HELD_OUT],
        "variance": truth.var().item(),
        "own_answers": ((said - truth) ** 2).mean().item(),
    }
    write_json(RESULT, {**environment(), **told, "layers": layers})


if __name__ == "__main__":
    main()

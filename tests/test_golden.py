"""Committed loss and gradient norm of one fixed step per credit rule and per preset: a change of either is a change of the algorithm.

`make golden-update` rewrites tests/golden.json and shows the difference.
"""

import difflib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mar.learn.batch import make_batch
from mar.learn.learner import Learner
from mar.learn.losses import policy_gradient, token_weights
from mar.learn.update import compute_advantages, update
from mar.policy.critic import Critic
from mar.policy.model import Decoder, ModelConfig
from mar.policy.packing import pack_groups
from mar.records import Completion, Example, Prompt, Rollout
from mar.run.compose import CONF_DIR, compose
from mar_kernels import answer_advantages

FILE = Path(__file__).with_name("golden.json")
CREDITS = ("to_go", "set", "own")


def _values(*shape: int) -> torch.Tensor:
    """Fixed numbers without a random generator: the fractional parts of a quadratic sequence, in [-0.5, 0.5)."""
    n = torch.arange(1, int(torch.tensor(shape).prod()) + 1, dtype=torch.float64)
    return ((n * 0.6180339887498949 + n * n * 0.1234567) % 1.0 - 0.5).reshape(shape)


def tiny(scale: float = 1.0) -> Decoder:
    """A float64 model of fixed numbers, its matrices times `scale`."""
    shape = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 29,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
    }
    shape |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    model = Decoder(ModelConfig.from_hf(shape)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                scale * _values(*parameter.shape) + (1.0 if parameter.ndim == 1 else 0.0)
            )
    return model


def step(credit: str) -> dict[str, float]:
    """Loss and gradient norm of 2 groups x 3 completions on a tiny float64 model."""
    model = tiny()
    lengths = [[3, 7, 5], [6, 1, 4]]
    completions = [
        [[(5 * i + 3 * j + t) % 29 for t in range(n)] for j, n in enumerate(group)]
        for i, group in enumerate(lengths)
    ]
    flat = torch.tensor([n for group in lengths for n in group])
    mask = torch.arange(int(flat.max())) < flat[:, None]
    segments = (torch.arange(int(flat.max())) // 2).clamp(max=3).expand(6, -1)
    advantages = answer_advantages(
        _values(6, 4),
        torch.ones(4, dtype=torch.float64),
        torch.tensor([[0, 1, 2, 3]]).expand(6, -1),
        segments,
        torch.tensor([0, 0, 0, 1, 1, 1]),
        credit,
    )
    logprobs, _, _ = model(pack_groups([[1, 2, 3, 4], [7, 8]], completions), 0.7)
    loss = policy_gradient(logprobs, advantages[mask], token_weights(mask, "token_mean", 8)[mask])
    loss.backward()
    return {
        "loss": loss.item(),
        "grad_norm": torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item(),
    }


PRESETS = sorted(file.stem for file in (CONF_DIR / "algo").glob("*.yaml"))


def preset_step(preset: str) -> dict[str, float]:
    """All updates of one step of a preset: the mean loss and gradient norm, and the critic's loss where there is one."""
    sizes = [
        "algo.group_size=3",
        "algo.prompts_per_step=4",
        "algo.temperature=0.7",
        "model.max_completion_tokens=8",
    ]
    config = compose([f"algo={preset}", *sizes, "optim.lr=1e-2", "algo.critic_lr=1e-2"])
    model = tiny()
    groups = []
    for i, lengths in enumerate([[3, 7, 5], [6, 1, 4], [2, 2, 8], [5, 3, 4]]):
        asked = Prompt(Example(str(i), "golden", "?", ()), "?", tuple(range(1 + i, 5 + 2 * i)))
        group = []
        for j, n in enumerate(lengths):
            ids = np.array([(5 * i + 3 * j + t) % 29 for t in range(n)])
            drawn, paid = _values(n + i + j)[i + j :].numpy() - 3, _values(12, 4)[3 * i + j].numpy()
            done = Completion(j, ids, drawn, drawn, "length" if n == 8 else "stop")
            reading = (np.arange(n) // 2).clip(max=3)
            rollout = Rollout(
                asked, done, "", (), (), (), (), None, paid, reading, float(paid.sum())
            )
            # two terms, the second of half a weight; which component is whose is arbitrary
            terms = np.stack([paid * np.array([1, 0, 1, 0]), paid * np.array([0, 2, 0, 2])])
            group.append(replace(rollout, terms=terms, term_weights=np.array([1.0, 0.5])))
        groups.append(group)
    sgd = torch.optim.SGD(model.parameters(), 1e-2)
    reference = tiny(0.9) if config.algo.kl_coef else None
    critic = Critic(model) if config.algo.baseline == "value" else None
    critic_optimizer = torch.optim.SGD(critic.parameters(), 1e-2) if critic else None
    opens = np.arange(4)
    learner = Learner(
        config,
        model,
        sgd,
        reference=reference,
        critic=critic,
        critic_optimizer=critic_optimizer,
    )
    metrics = update(learner, *compute_advantages(learner, make_batch(groups, opens), 0), 0)
    kept = {"loss": "policy/loss", "grad_norm": "optim/grad_norm", "value_loss": "value/loss"}
    return {name: metrics[key] for name, key in kept.items() if key in metrics}


def goldens() -> dict[str, dict[str, float]]:
    return {credit: step(credit) for credit in CREDITS} | {
        f"algo={p}": preset_step(p) for p in PRESETS
    }


@pytest.mark.golden
@pytest.mark.parametrize("credit", CREDITS)
def test_golden_step(credit: str) -> None:
    assert step(credit) == pytest.approx(json.loads(FILE.read_text())[credit], rel=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize("preset", PRESETS)
def test_golden_preset(preset: str) -> None:
    assert preset_step(preset) == pytest.approx(
        json.loads(FILE.read_text())[f"algo={preset}"], rel=1e-9, abs=1e-12
    )


if __name__ == "__main__":
    old, new = (
        json.dumps(d, indent=2).splitlines() for d in (json.loads(FILE.read_text()), goldens())
    )
    print(
        "\n".join(difflib.unified_diff(old, new, "committed", "now", lineterm=""))
        or "nothing changed"
    )
    FILE.write_text("\n".join(new) + "\n")

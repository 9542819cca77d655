"""The script of mar/README.md: what a researcher copies runs, and is a step of `mar.train`."""

import re
from pathlib import Path

import torch

from mar.policy.sources import EMBEDDED
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import build_training
from mar.train import train_step

README = Path(__file__).resolve().parents[1] / "mar/README.md"
MOST_LINES = 30


def script() -> str:
    found = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)
    assert len(found) == 1
    return found[0]


def test_the_script_is_short_and_reads_no_config() -> None:
    lines = [line for line in script().splitlines() if line.strip()]
    code = [line for line in lines if not line.startswith(("import ", "from "))]
    assert len(code) <= MOST_LINES
    assert not re.search(r"hydra|mar\.config|mar\.run|compose", script())
    assert max(map(len, lines)) <= 100


def test_the_script_takes_the_step_of_a_training_run(capsys) -> None:
    names: dict = {}
    exec(compile(script(), str(README), "exec"), names)
    said = capsys.readouterr().out
    words = [
        "+experiment=clinic",
        "model.trainable=",
        "model.lora_rank=0",
        "optim.grad_clip=1e9",
        "algo.entropy_coef=0",
        "algo.prompts_per_step=4",
        "algo.group_size=8",
        "data.num_train=4",
        "eval.num_items=1",
        "device=cpu",
    ]
    training = build_training(compose(words), EMBEDDED, Display("plain", 0, 1))
    before = {name: p.detach().clone() for name, p in training.learner.policy.named_parameters()}
    step = train_step(training, 0)
    reward = step.metrics["reward/total"]
    assert f"mean reward {reward:.3f} of 32 completions" in said
    ours = dict(training.learner.policy.named_parameters())
    for name, theirs in names["policy"].named_parameters():
        change = ours[name] - before[name]
        assert change.abs().max() > 0, name
        # AdamW's first step is the sign of the gradient: compare the gradients.
        torch.testing.assert_close(theirs.grad, ours[name].grad, rtol=1e-4, atol=1e-7)

"""What the README's table of forks promises: one function and one dictionary entry."""

import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mar.errors import UserError
from mar.export import export
from mar.policy.attention import pack_groups
from mar.policy.families import ARCHITECTURES, LLAMA_TENSORS, Family
from mar.policy.model import Decoder, ModelConfig
from mar.policy.sources import EMBEDDED
from mar.policy.weights import load_model, save_model
from mar.records import Example, Gold
from mar.run.compose import compose
from mar.tasks.__main__ import main as look
from mar.tasks.loading import Loaded, Source
from mar.tasks.registry import TASKS, Task
from mar.train import run


def sums(source: Source) -> Loaded:
    pairs = [(a, b) for a in range(10) for b in range(10)][: source.num]
    examples = [
        Example(f"{a}+{b}", "sums", f"{a} + {b} = ?", (Gold(str(a + b)),)) for a, b in pairs
    ]
    return Loaded(examples, Counter())


def test_a_task_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TASKS, "sums", Task(load=sums, noun="number", embedded=True))
    size = [
        "train.steps=1",
        "algo.group_size=2",
        "algo.prompts_per_step=2",
        "eval.num_items=4",
        "model.max_completion_tokens=4",
    ]
    words = [
        "+experiment=jsonl",
        "data.task=sums",
        "data.source=embedded",
        "name=sums",
        f"out={tmp_path}",
        "logger.console=plain",
        *size,
    ]
    assert run(compose(words)) == 0
    out = capsys.readouterr().out
    assert (
        "sums: 2 training and 4 held-out prompts" in out
        and "no completion has the right form" in out
        and "REHEARSAL" not in out
    )
    look(["sums", "data.source=embedded", "data.num_train=5", "model=embedded"])
    assert "5 rows" in (out := capsys.readouterr().out) and "0 + 2 = ?" in out


def test_a_model_family_is_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model under other names, and with its norms behind attention and MLP."""
    with pytest.raises(UserError, match="architecture MineForCausalLM is not supported"):
        ModelConfig.from_hf({"architectures": ["MineForCausalLM"]})
    tensors = {
        layer: tuple(f"mine.{name}" for name in names) for layer, names in LLAMA_TENSORS.items()
    }
    family = Family("mine", qk_norm="head", norms="after", tensors=tensors)
    monkeypatch.setitem(ARCHITECTURES, "MineForCausalLM", family)

    embedded = load_model(EMBEDDED)
    with torch.device("meta"):
        mine = Decoder(replace(embedded.config, architecture="MineForCausalLM"))
    mine.load_state_dict(embedded.state_dict(), assign=True)
    folder = tmp_path / "mine"
    shutil.copytree(EMBEDDED, folder)
    save_model(mine, folder)
    assert "model.layers.0.mine.mlp.up_proj.weight" in load_file(folder / "model.safetensors")
    packed = pack_groups([[5, 6, 7]], [[[8, 9]]])
    logprobs = mine(packed)[0]
    assert torch.equal(load_model(folder)(packed)[0], logprobs)
    assert not torch.allclose(embedded(packed)[0], logprobs)

    words = f"""+experiment=clinic model=hf model.path={folder} model.thinking=false train.steps=1
    model.max_completion_tokens=4 algo.group_size=2 algo.prompts_per_step=2 eval.num_items=2
    algo.entropy_coef=1 model.lr=1e-3 out={tmp_path} logger.console=plain"""
    assert run(compose(words.split())) == 0
    exported = export(tmp_path / "clinic/seed0", tmp_path / "exported", "float32")
    assert load_model(exported).config == mine.config
    assert not torch.equal(load_model(exported)(packed)[0], logprobs)


def test_losses_and_coverages_are_a_function_and_an_entry() -> None:
    """Their names are read off the dictionaries, here in a process where nothing has read them."""
    code = """if 1:
        from mar.answers import rewards
        from mar.learn import losses
        losses.LOSSES["mine"] = losses.reinforce
        rewards.COVERAGES["mine"] = rewards.COVERAGES["sum"]
        from mar.run.compose import compose
        compose(["+experiment=clinic", "algo.loss=mine", "reward.coverage=mine"])"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""What the README's table of forks promises: one function and one dictionary entry."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

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

"""Every logged metric has a line in the glossary, mar/measure/README.md."""

import json
import re
from pathlib import Path

import pytest

from mar.answers.reward_terms import REWARD_TERMS
from mar.measure.metrics import METRICS
from mar.run.compose import compose
from mar.train import run

README = Path(__file__).parents[2] / "mar/measure/README.md"

# a run with everything that logs something: a critic, a reference, minibatches
WORDS = [
    "+experiment=clinic",
    "algo=ppo",
    "algo.kl_coef=0.01",
    "algo.minibatches=2",
    "algo.group_size=2",
    "algo.prompts_per_step=2",
    "train.steps=1",
    "eval.num_items=2",
    "logger.console=plain",
]


def explained() -> set[str]:
    """The names in the first column of the glossary's tables."""
    names = set()
    for line in README.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            names |= set(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return names


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_of_answer_sets_is_explained(name: str) -> None:
    assert name.format(K="K", all="k") in explained()


def test_what_a_step_logs_is_explained(tmp_path: Path) -> None:
    assert run(compose([*WORDS, f"out={tmp_path}"])) == 0
    step = json.loads((tmp_path / "clinic/seed0/metrics.jsonl").read_text())
    of_sets = {f"train/{name.format(K=3, all=3)}" for name in METRICS}
    terms = {f"reward/{name}" for name in REWARD_TERMS}  # explained together
    missing = set(step) - explained() - of_sets - terms - {"step"}
    assert not missing, f"add a line to {README.name} for {sorted(missing)}"

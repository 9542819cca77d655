"""Every logged metric has a line in the glossary, mar/measure/README.md, which is made from code."""

import json
import re
from pathlib import Path

import pytest

from experiments.common.glossary import of_steps, one_set, several_sets, steps
from mar.answers.reward_terms import REWARD_TERMS
from mar.measure.metrics import METRICS, Metric
from mar.measure.step_metrics import STEP_METRICS
from mar.run.compose import compose
from mar.train import run

README = Path(__file__).parents[2] / "mar/measure/README.md"
UNWRITTEN = "the glossary is behind the code: run `make report`, which writes it from docstrings"

SMALL = [
    "+experiment=clinic",
    "algo.group_size=2",
    "algo.prompts_per_step=2",
    "train.steps=1",
    "eval.num_items=2",
    "logger.console=plain",
]
# runs that log everything there is: a critic, a reference and minibatches; then a mask, the
# variance of two credits, and a further term
RUNS = {
    "ppo": ["algo=ppo", "algo.kl_coef=0.01", "algo.minibatches=2"],
    "dppo": ["algo=rloo", "algo.loss=dppo", "algo.variance_every=1", "reward.terms.length=0.1"],
}


def explained() -> set[str]:
    """The names in the first column of the glossary's tables."""
    names = set()
    for line in README.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            names |= set(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return names


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_of_answer_sets_is_explained(name: str) -> None:
    assert name.format(K="K", all="k") in explained(), UNWRITTEN


@pytest.mark.slow
def test_what_a_step_logs_is_explained_and_nothing_else(tmp_path: Path) -> None:
    of_sets = {f"train/{name.format(K=3, all=3)}" for name in METRICS}
    terms = {f"reward/{name}" for name in REWARD_TERMS}  # explained together
    logged = set()
    for name, words in RUNS.items():
        assert run(compose([*SMALL, *words, f"out={tmp_path / name}"])) == 0
        logged |= set(json.loads((tmp_path / name / "clinic/seed0/metrics.jsonl").read_text()))
    missing = logged - set(of_steps()) - of_sets - terms - {"step"}
    assert not missing, f"define {sorted(missing)} beside the code that logs it"
    never = set(of_steps()) - logged
    assert not never, f"no run of RUNS logs {sorted(never)}: add one that does"
    assert set(of_steps()) <= explained(), UNWRITTEN


def test_a_metric_without_a_docstring_or_with_two_meanings_fails_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(METRICS, "mine", Metric(lambda a: METRICS["top1"].compute(a)))
        with pytest.raises(SystemExit, match="the metric mine has no docstring"):
            one_set()
    with monkeypatch.context() as patched:
        patched.setitem(STEP_METRICS, "mine/too", lambda seen: 1.0)
        with pytest.raises(SystemExit, match="the metric mine/too has no docstring"):
            steps()
    monkeypatch.setitem(STEP_METRICS, "policy/loss", STEP_METRICS["adv/mean"])
    with pytest.raises(SystemExit, match="the metric policy/loss is defined twice"):
        steps()


def test_the_glossary_is_made_from_what_stands_beside_the_metrics() -> None:
    page = README.read_text(encoding="utf-8")
    assert all(table() in page for table in (one_set, several_sets, steps)), UNWRITTEN
    assert "| `q_mse` | Mean (q - p)^2 (known posterior only) |" in one_set()
    assert "`unique@k`" in several_sets() and "`coverage@K`" not in several_sets()

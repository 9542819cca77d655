"""What the README's table of forks promises: one function and one dictionary entry."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.common import glossary
from mar.answers import reward_spec
from mar.answers.reward_terms import REWARD_TERMS, Judged, Term, TermValue
from mar.errors import UserError
from mar.export import export
from mar.learn import losses
from mar.learn.advantages import BASELINES, CREDITS, SCALES, STEP_SCALES, estimate
from mar.learn.batch import Batch
from mar.measure.bootstrap import Statistic, mean_of
from mar.measure.metrics import METRICS, AnswerArrays, Metric
from mar.measure.step_metrics import STEP_METRICS, StepSeen
from mar.policy.families import ARCHITECTURES, LLAMA_TENSORS, Family
from mar.policy.model import Decoder, ModelConfig
from mar.policy.packing import pack_groups
from mar.policy.sources import EMBEDDED
from mar.policy.weights import load_model, save_model
from mar.records import Example, Gold
from mar.run.compose import compose
from mar.tasks.__main__ import main as look
from mar.tasks.loading import Loaded, Source
from mar.tasks.registry import TASKS, Task
from mar.train import run
from mar.verify.verifiers import VERIFIERS


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
        "model=embedded",
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
        and "model.max_completion_tokens=4 cuts them: raise it" in out
        and "REHEARSAL" not in out
    )
    assert look(["sums", "data.source=embedded", "data.num_train=5", "model=embedded"]) == 0
    assert "5 rows" in (out := capsys.readouterr().out) and "0 + 2 = ?" in out


# transformers, whose tokenizer asks a config.json of an unknown model_type too
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
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
    algo.entropy_coef=1 algo.entropy_of=tokens model.lr=1e-3 out={tmp_path} logger.console=plain"""
    assert run(compose(words.split())) == 0
    exported = export(tmp_path / "clinic/seed0", tmp_path / "exported", "float32")
    assert load_model(exported).config == mine.config
    assert not torch.equal(load_model(exported)(packed)[0], logprobs)


def first_step(tmp_path: Path, *words: str) -> dict[str, float]:
    """The metrics of one real step of the clinic with a small batch."""
    small = ["train.steps=1", "algo.group_size=4", "algo.prompts_per_step=2", "eval.num_items=2"]
    # Without the bonus of the experiment, which has a gradient of its own.
    fixed = ["+experiment=clinic", "algo=rloo", "algo.entropy_coef=0", *small]
    fixed += ["logger.console=plain", f"out={tmp_path}"]
    assert run(compose([*fixed, *words])) == 0
    return json.loads((tmp_path / "clinic/seed0/metrics.jsonl").read_text().splitlines()[0])


def test_a_loss_with_an_option_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @losses.options(strength=losses.Option(default=1.0, low=0.0, high=10.0))
    def mine(inputs: losses.LossInputs) -> losses.LossOutput:
        strength = inputs.options["strength"]
        plain = losses.policy_gradient(inputs.logprobs, inputs.advantages, inputs.weights)
        logged = {
            "strength": losses.Logged(strength, losses.LARGEST),
            "counted": losses.Logged((inputs.weights != 0).sum().item(), losses.TOKEN_MEAN),
        }
        return losses.LossOutput(strength * plain, logged)

    monkeypatch.setitem(losses.LOSSES, "mine", mine)
    usual = first_step(tmp_path / "usual")
    own = first_step(tmp_path / "own", "algo.loss=mine", "algo.loss_options.strength=3")
    assert own["policy/strength"] == 3 and own["policy/counted"] == 1
    assert own["optim/grad_norm"] == pytest.approx(3 * usual["optim/grad_norm"], rel=1e-4)

    with pytest.raises(UserError, match=r"loss_options.strngth is no option.*it has strength"):
        compose(["+experiment=clinic", "algo.loss=mine", "algo.loss_options.strngth=3"])
    with pytest.raises(UserError, match=r"loss_options.strength=11"):
        compose(["+experiment=clinic", "algo.loss=mine", "algo.loss_options.strength=11"])


def test_a_credit_rule_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under every baseline; the name does not fall through to another rule."""
    monkeypatch.setitem(CREDITS, "nothing", lambda decided: 0.0 * decided.first_open)
    for baseline in ("leave_one_out", "matched"):
        words = ("algo.credit=nothing", f"algo.baseline={baseline}")
        metrics = first_step(tmp_path / baseline, *words)
        assert metrics["adv/std"] == 0 and metrics["optim/grad_norm"] == 0


def test_a_baseline_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BASELINES, "all_of_it", lambda compared: compared.credited)
    assert first_step(tmp_path, "algo.baseline=all_of_it")["optim/grad_norm"] == 0


def test_a_scale_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCALES, "tenth", lambda totals, group_ids: 0.1 + 0 * totals)
    usual = first_step(tmp_path / "usual")
    scaled = first_step(tmp_path / "scaled", "algo.scale_by=tenth")
    assert scaled["adv/std"] == pytest.approx(10 * usual["adv/std"], rel=1e-4)


def test_a_scale_of_the_whole_step_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sign(batch: Batch, credit: str, baseline: str) -> torch.Tensor:
        return estimate(batch, batch.components, credit, baseline, "none").sign()

    monkeypatch.setitem(STEP_SCALES, "sign", sign)
    assert 0.5 < first_step(tmp_path, "algo.scale_by=sign")["adv/std"] < 1.1


def test_a_verifier_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the first gold for whatever was written: the first answer hits, others repeat it."""
    monkeypatch.setitem(VERIFIERS, "generous", lambda answer, golds: (0,))
    metrics = first_step(tmp_path, "data.verifier=generous")
    assert metrics["train/pass@3"] > 0.9 and metrics["train/repeats_per_set"] > 1.5
    with pytest.raises(UserError, match=r"data.verifier=typo is unknown: choose auto, text, math"):
        first_step(tmp_path / "refused", "data.verifier=typo")


def test_a_metric_of_a_step_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def longest(seen: StepSeen) -> int:
        """Tokens of the longest completion."""
        return seen.batch.completion_mask.sum(1).max().item()

    monkeypatch.setitem(STEP_METRICS, "train/longest", longest)
    metrics = first_step(tmp_path)
    assert metrics["train/longest"] >= metrics["train/tokens_per_set"] > 1
    assert "| `train/longest` | Tokens of the longest completion |" in glossary.steps()


def test_a_metric_of_answer_sets_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged at the step, in `eval.json`, and stands in the glossary."""

    def last(a: AnswerArrays) -> Statistic:
        """Coverage of the last answer alone."""
        return mean_of(a.mass[..., -1])

    monkeypatch.setitem(METRICS, "last@{K}", Metric(last))
    metrics = first_step(tmp_path)
    assert 0 <= metrics["train/last@3"] <= metrics["train/coverage@3"]
    measured = json.loads((tmp_path / "clinic/seed0/eval.json").read_text())
    assert "last@3" in measured["before"] and "last@3" in measured["after"]
    assert "| `last@K` | Coverage of the last answer alone |" in glossary.one_set()


def test_an_aggregation_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.AGGREGATIONS, "nothing", lambda mask, longest: 0 * mask)
    assert first_step(tmp_path, "algo.aggregation=nothing")["optim/grad_norm"] == 0


def test_an_importance_weight_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.IMPORTANCE, "none_trusted", lambda inputs: 0 * inputs.old_logprobs)
    assert first_step(tmp_path, "algo.importance=none_trusted")["optim/grad_norm"] == 0


def test_a_kl_estimator_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.KL_ESTIMATORS, "seven", lambda logprobs, ref: 0 * logprobs + 7)
    assert first_step(tmp_path, "algo.kl=seven", "algo.kl_coef=0.1")["policy/ref_kl"] == 7


def test_a_coverage_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reward_spec.COVERAGES, "halves", lambda hits, _: [0.5 for _ in hits])
    assert first_step(tmp_path, "reward.coverage=halves")["reward/coverage"] > 1.2


@pytest.mark.parametrize(
    "word",
    [
        "algo.credit=typo",
        "algo.baseline=typo",
        "algo.scale_by=typo",
        "algo.importance=typo",
        "algo.loss=typo",
        "algo.kl=typo",
        "algo.aggregation=typo",
        "reward.coverage=typo",
    ],
)
def test_an_unknown_name_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="typo is unknown: choose one of"):
        compose(["+experiment=clinic", word])


def test_a_reward_term_is_a_function_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is paid, logged and trained on; one that changes its mind is refused before the run."""

    def vowels(judged: Judged, weight: float) -> TermValue:
        counts = [sum(c in "aeiou" for c in answer or "") for answer in judged.parsed.answers]
        return TermValue(answers=[weight * count for count in counts])

    monkeypatch.setitem(REWARD_TERMS, "vowels", Term(vowels, decides=("answer",)))
    usual = first_step(tmp_path / "usual")
    own = first_step(tmp_path / "own", "reward.terms.vowels=0.5")
    assert "reward/vowels" not in usual and own["reward/vowels"] > 0
    assert own["reward/total"] == pytest.approx(usual["reward/total"] + own["reward/vowels"])
    assert own["optim/grad_norm"] != pytest.approx(usual["optim/grad_norm"], rel=1e-3)

    def last_first(judged: Judged, weight: float) -> TermValue:
        return TermValue(answers=[weight * sum(judged.hits), 0.0, 0.0])

    monkeypatch.setitem(REWARD_TERMS, "vowels", last_first)
    with pytest.raises(UserError, match=r"reward.terms.vowels=0.5: its entry .* write Term\("):
        first_step(tmp_path / "bare", "reward.terms.vowels=0.5")

    monkeypatch.setitem(REWARD_TERMS, "vowels", Term(last_first, decides=("answer",)))
    with pytest.raises(UserError, match="reward term vowels changes its mind"):
        first_step(tmp_path / "refused", "reward.terms.vowels=0.5")

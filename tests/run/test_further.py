"""Training on: a finished run gets more steps, and a run starts from another one's policy."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from mar.answers.tokenizer import load_tokenizer, stop_ids
from mar.errors import UserError
from mar.learn.optim import learning_rate
from mar.policy.lora import adapted
from mar.policy.model import Decoder
from mar.policy.packing import pack_groups
from mar.policy.weights import load_model
from mar.run import checkpoint
from mar.run.compose import compose, load_config
from mar.run.console import Display
from mar.run.evaluations import Evaluations
from mar.run.folder import prepare
from mar.run.from_run import model_of, pin_source
from mar.run.setup import build_training
from mar.train import run, run_until_end

EMBEDDED = Path("mar/embedded/model").absolute()
SMALL = [
    *("+experiment=clinic", "algo.prompts_per_step=2", "algo.group_size=3"),
    *("eval.num_items=3", "checkpoint.every=50", "optim.lr=1e-2", "logger.console=plain"),
    "model.max_completion_tokens=40",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MAR_CACHE", str(cache))
    return cache


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "eval.json").read_text())


def test_the_measurement_before_training_is_not_made_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where eval.json is lost, the policy of a later step would be measured as the untrained one."""
    measured = []
    monkeypatch.setattr(Evaluations, "measure", lambda self, *what: measured.append(what))
    training: Any = SimpleNamespace(config=compose([*SMALL, "train.steps=9", "eval.every=3"]))
    evaluations = Evaluations(training, tmp_path, Display("plain", 0, 9), {})
    evaluations.catch_up(2)
    assert not measured and "cannot be made again" in capsys.readouterr().out
    evaluations.catch_up(3)
    evaluations.catch_up(0)
    assert measured == [("step 3", 3), ("before", 0)]


# --- more steps ------------------------------------------------------------------------------


def test_a_finished_run_gets_more_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, f"out={tmp_path}"]
    folder = tmp_path / "clinic/seed0"
    assert run(compose([*words, "train.steps=3"])) == 0
    first = records(folder)
    first_end = document(folder)["after"]
    texts = (folder / "completions.jsonl").read_text()
    capsys.readouterr()

    assert run(compose([*words, "train.steps=6", "train.stop_at=5"])) == 0
    said = capsys.readouterr().out
    assert "had train.steps=3 and gets 6: it goes on after step 3" in said
    # rates of the linear schedule: the end of 3 steps, and the middle of 6
    assert "the learning rate was 0.005 in step 3 and is 0.006 in step 4" in said
    assert "resuming after step 3" in said
    assert "after" not in document(folder), "it is unfinished again"
    assert load_config(folder / "config.yaml").train.steps == 6

    assert run(compose([*words, "train.steps=6"])) == 0
    assert [path.name for path in tmp_path.glob("clinic/seed*")] == ["seed0"]
    rows = records(folder)
    assert rows[:3] == first and [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows[3:]:
        expected = learning_rate(row["step"] - 1, 6, 1e-2, 0.05, "linear")
        assert row["optim/lr"] == pytest.approx(expected, rel=1e-4)
    assert (folder / "completions.jsonl").read_text().startswith(texts)
    kept = document(folder)
    assert [entry["step"] for entry in kept["history"]] == [0, 3, 6]
    assert kept["history"][1] == {"step": 3, **first_end}
    assert kept["after"] == {k: v for k, v in kept["history"][2].items() if k != "step"}
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["provenance"]["extended_from"] == [3]

    capsys.readouterr()
    assert run(compose([*words, "train.steps=5"])) == 0
    assert "and differed in train.steps" in capsys.readouterr().out, "fewer steps are another run"


@pytest.mark.slow
def test_an_unfinished_run_gets_more_steps_too(tmp_path: Path) -> None:
    words = [*SMALL, f"out={tmp_path}"]
    assert run(compose([*words, "train.steps=3", "train.stop_at=2"])) == 0
    assert run(compose([*words, "train.steps=4", "eval.every=3"])) == 0
    folder = tmp_path / "clinic/seed0"
    assert [row["step"] for row in records(folder)] == [1, 2, 3, 4]
    assert [entry["step"] for entry in document(folder)["history"]] == [0, 3, 4]
    with pytest.raises(UserError, match=r"optim\.lr, train\.steps"):
        unfinished = [*words, "seed=1", "train.steps=3", "train.stop_at=1"]
        assert run(compose(unfinished)) == 0
        run(compose([*words, "seed=1", "train.steps=6", "optim.lr=1e-3"]))


def test_without_its_last_checkpoint_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    """It would begin anew, and forget what it has written."""
    words = [*SMALL, f"out={tmp_path}"]
    folder = tmp_path / "clinic/seed0"
    assert run(compose([*words, "train.steps=2", "checkpoint.every=1"])) == 0
    (folder / "checkpoints/step000002/manifest.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="cannot go on to train.steps=4"):
        run(compose([*words, "train.steps=4", "checkpoint.every=1"]))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_extension_that_was_cut_off_is_neither_finished_nor_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two files that it changes."""
    config = compose([*SMALL, f"out={tmp_path}", "train.steps=2"]).to_dict()
    folder = prepare(config).path
    (folder / "eval.json").write_text(json.dumps({"before": {"top1": 0}, "after": {"top1": 1}}))
    longer = compose([*SMALL, f"out={tmp_path}", "train.steps=4"]).to_dict()
    replace = Path.replace
    replaced = []

    def killed(self: Path, target: Path) -> Path:
        replaced.append(target.name)
        if len(replaced) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(longer)
    monkeypatch.setattr(Path, "replace", replace)
    assert set(replaced) == {"eval.json", "config.yaml"}
    again = prepare(longer)
    assert again.resume and again.extends == 2 and again.archive is None
    last = prepare(longer)
    assert last.resume and last.extends is None
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["provenance"]["extended_from"] == [2], "a resumed run still knows it"


def test_a_finished_run_with_an_equal_configuration_can_be_left_alone(tmp_path: Path) -> None:
    config = compose([*SMALL, f"out={tmp_path}", "train.steps=1"])
    assert run_until_end(config, skip_finished=True) == "finished"
    assert run_until_end(config, skip_finished=True) == "finished before"
    assert run_until_end(config) == "finished"
    assert sorted(p.name for p in tmp_path.glob("clinic/seed*")) == ["seed0", "seed0~1"]


# --- another run's policy --------------------------------------------------------------------


def final_policy(folder: Path, dtype: torch.dtype) -> Decoder:
    config = load_config(folder / "config.yaml")
    policy = adapted(load_model(EMBEDDED, dtype=dtype), config.model)
    checkpoint.restore_weights(checkpoint.require_newest(folder, config), policy)
    return policy


KINDS = {
    "the embedded model's": [],
    "adapters on all layers": ["model.trainable=", "model.lora_layers=", "model.lora_rank=4"],
    "all parameters": ["model.trainable=", "model.lora_rank=0"],
}


@pytest.mark.parametrize(
    "kind",
    [
        "the embedded model's",
        pytest.param("adapters on all layers", marks=pytest.mark.slow),
        pytest.param("all parameters", marks=pytest.mark.slow),
    ],
)
def test_a_run_starts_from_the_policy_of_another(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    double = ["scale.dtype=float64", *KINDS[kind]]
    assert run(compose([*SMALL, *double, f"out={tmp_path}", "train.steps=2", "name=first"])) == 0
    first = tmp_path / "first/seed0"
    words = [
        *("+experiment=clinic", "model=run", f"model.path={first}", "scale.dtype=float64"),
        *("algo.prompts_per_step=2", "algo.group_size=3", "eval.num_items=3", "train.steps=2"),
        *(f"out={tmp_path}", "name=second", "logger.console=plain"),
    ]
    composed = compose(words)
    theirs = load_config(first / "config.yaml").model
    kept = ("thinking", "max_prompt_tokens", "max_completion_tokens", "lr")
    for key in (*kept, "trainable", "lora_rank", "lora_scale", "lora_layers"):
        assert getattr(composed.model, key) == getattr(theirs, key), key

    config = pin_source(composed, print)
    source, record = model_of(config.model)
    assert record["source"] == "run" and record["origin"] == f"{first} after step 2"
    tokenizer = load_tokenizer(source)
    assert stop_ids(tokenizer, source) == stop_ids(load_tokenizer(EMBEDDED), EMBEDDED)
    training = build_training(config, source, Display("plain", 0, 0))
    began = training.learner.policy
    ended = final_policy(first, torch.float64)
    untrained = load_model(EMBEDDED, dtype=torch.float64)
    ids = [list(prompt.ids) for prompt in training.held_out.prompts]
    packed = pack_groups([one[:-20] for one in ids], [[one[-20:]] for one in ids])
    with torch.no_grad():
        logprobs = [model(packed)[0] for model in (began, ended, untrained)]
    torch.testing.assert_close(logprobs[0], logprobs[1], rtol=0, atol=1e-11)
    assert (logprobs[0] - logprobs[2]).abs().max() > 1e-6, "the two steps changed it"

    assert run(composed) == 0
    second = tmp_path / "second/seed0"
    assert document(second)["before"] == document(first)["after"]
    assert [row["step"] for row in records(second)] == [1, 2]
    assert load_config(second / "config.yaml").model.path == config.model.path


def small_run(out: Path, *more: str) -> Path:
    assert run(compose([*SMALL, f"out={out}", "train.steps=1", "name=first", *more])) == 0
    return out / "first/seed0"


def further(first: Path, *more: str) -> list[str]:
    words = ["+experiment=clinic", "model=run", f"model.path={first}", "train.steps=1"]
    few = ["algo.prompts_per_step=2", "algo.group_size=3", "eval.num_items=3"]
    return [*words, *few, f"out={first.parents[1]}", "logger.console=plain", *more]


@pytest.mark.slow
def test_the_start_stays_when_the_other_run_goes_on(tmp_path: Path, own_cache: Path) -> None:
    first = small_run(tmp_path)
    stopped = further(first, "name=second", "train.steps=2", "train.stop_at=1")
    assert run(compose(stopped)) == 0
    assert [path.name.partition("-")[0] for path in own_cache.glob("models/*")] == ["run"]
    weights = next(own_cache.glob("models/*/model.safetensors")).read_bytes()

    longer = [*SMALL, f"out={tmp_path}", "train.steps=2", "name=first"]
    assert run(compose(longer)) == 0
    with pytest.raises(UserError, match=r"differs in model\.path"):
        run(compose(further(first, "name=second", "train.steps=2")))
    pinned = load_config(tmp_path / "second/seed0/config.yaml").model
    # Without the cache the checkpoint is still there, then it is gone.
    shutil.rmtree(own_cache / "models")
    folder, _ = model_of(pinned)
    assert (folder / "model.safetensors").read_bytes() == weights
    shutil.rmtree(own_cache / "models")
    shutil.rmtree(first / "checkpoints/step000001")
    with pytest.raises(UserError, match="neither in the cache nor in the run"):
        model_of(pinned)


@pytest.mark.slow
def test_a_resumed_start_is_the_same_one(tmp_path: Path) -> None:
    first = small_run(tmp_path)
    for stop in ("train.stop_at=1", "train.stop_at=2"):
        assert run(compose(further(first, "name=second", "train.steps=2", stop))) == 0
    assert [row["step"] for row in records(tmp_path / "second/seed0")] == [1, 2]


def test_mistakes_of_a_start_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = small_run(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match="the folder that this run writes to"):
        run(compose(further(first, "name=first")))
    shutil.rmtree(first / "checkpoints")
    with pytest.raises(UserError, match="is finished and its checkpoints are gone: train it again"):
        run(compose(further(first, "name=second")))
    (first / "checkpoints/step000002").mkdir(parents=True)
    with pytest.raises(UserError, match="no readable checkpoint .*manifest.json is missing"):
        run(compose(further(first, "name=second")))
    assert sorted(os.listdir(tmp_path)) == before

"""The whole job on a tiny random model: what it writes, that a resumed run is the uninterrupted one, and every mistake a user can make."""

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint as recompute

from experiments.embedded_model.shape import train_tokenizer
from mar.errors import UserError
from mar.learn import batch, losses
from mar.learn.optim import make_optimizer
from mar.policy.model import Decoder, ModelConfig
from mar.policy.weights import load_model, save_model
from mar.run import checkpoint
from mar.run.compose import compose
from mar.run.evaluations import Evaluations
from mar.run.interrupts import Interrupts
from mar.tasks import clinic
from mar.train import main, run, train_step
from tests.helpers.processes import start

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
}
SHAPE |= {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(clinic.load("train", 50, 1), clinic.NOUN, 400, folder)
    torch.manual_seed(0)
    save_model(Decoder(ModelConfig.from_hf(SHAPE | {"vocab_size": 400})), folder)
    return folder


EMBEDDED = Path("mar/embedded/model").absolute()


def words(model: Path, out: Path, *more: str) -> list[str]:
    """The command line of a small run."""
    return [
        "+experiment=clinic", "model=hf", f"model.path={model}", "model.max_prompt_tokens=400", "model.max_completion_tokens=48",
        "train.steps=4", "algo.prompts_per_step=2", "algo.group_size=3", "eval.num_items=3", "eval.every=0", "checkpoint.every=50",
        "optim.lr=1e-2", f"out={out}", "logger.console=plain", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_checkpointed_activations_train_the_same_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(block: torch.nn.Module, *inputs: object, **options: bool) -> torch.Tensor:
        calls.append(block)
        return recompute(block, *inputs, **options)

    monkeypatch.setattr("mar.policy.model.checkpoint", counted)
    for name, switch in (("kept", "false"), ("recomputed", "true")):
        before = len(calls)
        switched = (f"train.checkpoint_activations={switch}", "train.steps=2")
        assert run(compose(words(EMBEDDED, tmp_path / name, *switched))) == 0
        assert (len(calls) > before) == (switch == "true")
    kept, recomputed = (
        records(tmp_path / name / "clinic" / "seed0") for name in ("kept", "recomputed")
    )
    assert kept == recomputed and any(row["optim/grad_norm"] > 0 for row in kept)


@pytest.mark.slow
def test_measuring_the_variance_changes_nothing_else(tmp_path: Path) -> None:
    for name, every in (("with", 2), ("without", 0)):
        assert (
            run(
                compose(
                    words(
                        EMBEDDED, tmp_path / name, f"algo.variance_every={every}", "train.steps=3"
                    )
                )
            )
            == 0
        )
    measured, plain = (
        records(tmp_path / name / "clinic" / "seed0") for name in ("with", "without")
    )
    told = [
        row.pop("adv/variance_ratio", "absent") for row in measured
    ]  # null where no group has spread
    assert told[0] > 0 and told[1:] == ["absent", None] and measured == plain


def weights_after(folder: Path, model: Path, trainable: str = "") -> dict[str, torch.Tensor]:
    found, policy = checkpoint.newest(folder / "checkpoints"), load_model(model)
    assert found is not None and found.step == 4
    checkpoint.restore(
        found, policy, make_optimizer(policy, 1.0, (0.9, 0.95), 1e-8, 0.0, trainable)
    )
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


PPO = ["algo=ppo", "algo.minibatches=2", "algo.critic_warmup=1", "algo.critic_lr=1e-3"]
DAPO = [
    "algo=dapo",
    "algo.epochs=2",
    "algo.minibatches=2",
    "algo.importance=truncated",
    "algo.top_p=0.9",
]
ALGORITHMS = {
    "ppo": PPO,
    "dapo": DAPO,
    "grpo": ["algo=grpo", "algo.entropy_coef=0.01", "algo.entropy_decay=true"],
    "lag": ["algo.lag=2", "algo.loss=ppo"],
    "lag and importance": ["algo.lag=1", "algo.importance=masked", "algo.resample=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_resumed_runs_of_other_algorithms_are_the_uninterrupted_ones(
    tmp_path: Path, name: str
) -> None:
    """Critic, its moments, the reference, minibatches and dynamic sampling all go on where they were."""
    chosen = ALGORITHMS[name]
    assert run(compose(words(EMBEDDED, tmp_path / "whole", *chosen))) == 0
    for stop in ("train.stop_at=2", "train.stop_at=4"):
        assert run(compose(words(EMBEDDED, tmp_path / "cut", *chosen, stop))) == 0
    whole, cut = (records(tmp_path / part / "clinic/seed0") for part in ("whole", "cut"))
    assert whole == cut and len(whole) == 4
    updated = whole[1:] if name == "ppo" else whole  # the first step of ppo trains the critic alone
    for row in updated:
        assert row["optim/skipped"] == 0
        assert 0 <= row["policy/clip_frac"] <= 1
        assert row["policy/approx_kl"] >= 0
    if name == "ppo":
        assert "policy/clip_frac" not in whole[0]
        assert whole[0]["optim/grad_norm"] == 0 < whole[1]["optim/grad_norm"]
        assert whole[0]["value/loss"] > 0
    if name == "dapo":
        kept = [
            row["policy/sampler_kl"] for row in whole
        ]  # top_p cuts what is drawn from, less as the policy sharpens
        assert kept[0] > 1e-2 and min(kept) > 1e-5  # of rounding alone it would be 1e-7 at most
    if name == "lag":  # two steps with the first weights: the ratio moves in the second
        ratios = [row["policy/ratio_max"] for row in whole]
        assert ratios[0] == pytest.approx(1, abs=1e-4) and min(ratios[1:]) > 1.001
        assert max(row["policy/sampler_mismatch_max"] for row in whole) < 1e-4
    if name == "lag and importance":
        assert [row["policy/ratio_max"] for row in whole] == [1.0] * 4
        assert abs(whole[0]["policy/sampler_kl"]) < 1e-6
        assert min(row["policy/sampler_mismatch_max"] for row in whole[1:]) > 1e-3
    if name == "grpo":
        assert (
            whole[0]["policy/ref_kl"] == pytest.approx(0, abs=1e-6)
            and whole[-1]["policy/ref_kl"] > 1e-5
        )


def test_steps_that_are_not_finite_are_kept_aside_and_end_the_run(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:

    def not_finite(inputs: losses.LossInputs) -> losses.LossOutput:
        return losses.LossOutput((inputs.logprobs * float("nan")).sum(), {})

    monkeypatch.setitem(losses.LOSSES, "reinforce", not_finite)
    for _ in range(2):  # the second run begins anew, and so does what it keeps
        with pytest.raises(UserError, match="2 steps in a row were not finite"):
            run(
                compose(
                    words(
                        model_folder, tmp_path, "algo.max_skips=2", "model.max_completion_tokens=4"
                    )
                )
            )
        gc.collect()  # the run that failed lets go of its folder
    folder = tmp_path / "clinic/seed0"
    assert (folder / "skipped.jsonl").read_text().count("\n") == 2 * 6
    assert "step 1: a loss or gradient is not finite" in capsys.readouterr().out
    assert all(row["optim/skipped"] == 1 and row["policy/loss"] is None for row in records(folder))


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real limit on the size of a file: lines can be written, shards cannot. Then the only checkpoint is damaged, which is said."""
    small = [
        *words(
            model_folder,
            tmp_path,
            "model.max_completion_tokens=4",
            "checkpoint.every=1",
            "train.steps=3",
        )
    ]
    assert run(compose([*small, "train.stop_at=1"])) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(
            UserError,
            match=r"^[^\n]*File too large[^\n]*: mend that, [^\n]* goes on after step 1 of [^\n]*seed0$",
        ):
            run(compose(small))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    gc.collect()  # the run that failed lets go of its folder
    folder = tmp_path / "clinic/seed0/checkpoints"
    (folder / "step000001" / checkpoint.MANIFEST).unlink()
    assert run(compose(small)) == 0
    said = capsys.readouterr().out
    assert "passed over a checkpoint" in said and "resuming after step 1" in said
    assert sorted(p.name for p in folder.iterdir()) == ["step000002", "step000003"]


def test_groups_without_spread_are_replaced(model_folder: Path, tmp_path: Path) -> None:
    """The random model never writes an answer: every group is flat in every round."""
    chosen = ["algo.resample=2", "train.steps=1", "model.max_completion_tokens=4"]
    assert run(compose(words(model_folder, tmp_path, *chosen))) == 0
    (row,) = records(tmp_path / "clinic/seed0")
    assert row["adv/replaced_groups"] == 2 and row["adv/zero_group_frac"] == 1
    assert 4 < row["sampler/decode_steps"] <= 3 * 4  # of all three rounds


def records(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


@pytest.mark.parametrize("trainable", ["", pytest.param("^norm", marks=pytest.mark.slow)])
def test_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trainable: str
) -> None:
    chosen = f"model.trainable='{trainable}'"
    assert run(compose(words(EMBEDDED, tmp_path / "whole", chosen))) == 0
    said = capsys.readouterr()
    last = json.loads(said.out.splitlines()[-1])
    size = sum(p.numel() for p in load_model(EMBEDDED).parameters())
    num_trained = 128 if trainable else size
    assert f"training {num_trained:,} of the {size:,} parameters" in said.out
    assert run(compose(words(EMBEDDED, tmp_path / "cut", "train.stop_at=2", chosen))) == 0
    cut, whole = tmp_path / "cut/clinic/seed0", tmp_path / "whole/clinic/seed0"
    assert not json.loads((cut / "eval.json").read_text()).get("after") and len(records(cut)) == 2
    # as if a crash had come after the checkpoint, in the middle of a line
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (cut / name).open("a") as file:
            file.write('{"step": 3, "stage": "train"}\n{"step": 4, "re')
    assert run(compose(words(EMBEDDED, tmp_path / "cut", chosen))) == 0

    one, two = weights_after(whole, EMBEDDED, trainable), weights_after(cut, EMBEDDED, trainable)
    assert all(torch.equal(one[name], two[name]) for name in one)
    base = dict(load_model(EMBEDDED).named_parameters())
    moved = {name for name in one if not torch.equal(one[name], base[name])}
    assert moved == ({"norm.weight"} if trainable else set(base))  # it did train, and nothing else
    assert records(whole) == records(cut) and len(records(whole)) == 4
    assert (whole / "completions.jsonl").read_text() == (cut / "completions.jsonl").read_text()
    assert json.loads((whole / "eval.json").read_text()) == json.loads(
        (cut / "eval.json").read_text()
    )

    assert set(last) == {"run_dir", "job_s", "floor", "before", "after", "ceiling", "gap_closed"}
    keys = {
        "coverage@3",
        "top1",
        "brier",
        "ece",
        "q_mse",
        "format_rate",
        "repeats_per_set",
        "tokens_per_set",
        "prompt_tokens",
    }
    assert all(set(last[name]) == keys for name in ("floor", "before", "after", "ceiling"))
    kept = json.loads((whole / "eval.json").read_text())
    assert kept["gap_closed"] == last["gap_closed"]
    assert all(last[name][key] == kept[name][key] for name in ("before", "after") for key in keys)
    assert json.loads((whole / "eval.json").read_text())["task"] == "clinic"


def test_finished_run_moves_aside_and_another_config_is_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(compose(words(model_folder, tmp_path, "train.steps=1", "optim.eps=1e-7"))) == 0
    assert run(compose(words(model_folder, tmp_path, "train.steps=2", "train.stop_at=1"))) == 0
    assert (tmp_path / "clinic/seed0~1/eval.json").exists() and "seed0 was finished: it is " in (
        said := capsys.readouterr().out
    )
    assert "and differed in optim.eps, train.steps\n" in said
    with pytest.raises(UserError, match=r"optim\.lr"):
        run(compose(words(model_folder, tmp_path, "train.steps=2", "optim.lr=1e-3")))


def test_medqa_on_embedded_data_says_clinic(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [
        w.replace("+experiment=clinic", "+experiment=medqa")
        for w in words(model_folder, tmp_path, "train.steps=1")
    ]
    assert run(compose([*changed, "model.max_completion_tokens=4"])) == 0
    assert "SYNTHETIC REHEARSAL" in capsys.readouterr().out.splitlines()[0]
    folder = tmp_path / "medqa/seed0"
    assert "task: clinic" in (folder / "config.yaml").read_text()
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == {"clinic"}


BAD = {
    "no embedded data": (
        ["data=hotpotqa", "data.source=embedded"],
        "hotpotqa has no embedded data: add data.source=path",
    ),
    "missing file": (
        ["data=jsonl", "data.source=path", "data.path=nowhere.jsonl"],
        "nowhere.jsonl",
    ),
    "unknown task": (["data.task=chess"], "unknown task 'chess'"),
    "no answers": (["reward.num_answers=0"], "reward.num_answers=0"),
    "lonely group": (["algo.group_size=1"], "algo.group_size=1"),
    "long prompts": (["model.max_prompt_tokens=20"], "max_prompt_tokens=20"),
    "small memory": (["sampler.kv_budget_tokens=30"], "kv_budget_tokens"),
    "beyond its positions": (["model.max_completion_tokens=3000"], "2048 positions"),
    "no such folder": (["model.path=./nowhere"], "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_give_one_sentence_and_leave_nothing(
    name: str, model_folder: Path, tmp_path: Path
) -> None:
    more, expected = BAD[name]
    with pytest.raises(UserError, match=expected) as error:
        run(compose(words(model_folder, tmp_path, *more)))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_truncated_weights_are_named(model_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        run(compose(words(broken, tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on(
    model_folder: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    command = words(model_folder, tmp_path, "train.steps=400", "model.max_completion_tokens=4")
    said = tmp_path / "said"
    process = start(main, command, said=said)
    metrics = tmp_path / "clinic/seed0/metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") >= 3:
            break
        time.sleep(0.1)
    os.kill(process.pid, kind)
    process.join(60)
    out = said.read_text()
    assert process.exitcode == 130 and "checkpoint of step" in out and "Traceback" not in out
    found = checkpoint.newest(tmp_path / "clinic/seed0/checkpoints")
    assert found is not None and found.step == metrics.read_text().count("\n")
    again = run(compose([*command, f"train.stop_at={found.step + 1}"]))
    assert again == 0 and metrics.read_text().count("\n") == found.step + 1


def test_a_signal_while_a_checkpoint_is_saved_waits_for_the_next_step(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It may have reached this rank alone, and all ranks decide before the save whether they stop after it."""
    save = checkpoint.save

    def interrupted(folder: Path, step: int, *rest: Any) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    assert (
        run(
            compose(
                words(model_folder, tmp_path, "checkpoint.every=1", "model.max_completion_tokens=4")
            )
        )
        == 130
    )
    assert "interrupted at step 2; checkpoint of step 2" in capsys.readouterr().out


@pytest.mark.parametrize(("more", "stopped_at"), [((), 2), (("eval.every=1",), 1)])
def test_a_signal_between_two_steps_loses_nothing(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    stopped_at: int,
) -> None:
    """The next step ends first; a measurement, before which all is saved, is not begun."""
    is_due = Evaluations.is_due
    asked = []

    def interrupted(evaluations: Evaluations, step: int) -> bool:
        asked.append(step)
        if asked == [1, 1]:  # the second time is behind the step
            os.kill(os.getpid(), signal.SIGTERM)
        return is_due(evaluations, step)

    monkeypatch.setattr(Evaluations, "is_due", interrupted)
    monkeypatch.setattr(Evaluations, "measure", pytest.fail)
    monkeypatch.setattr(Evaluations, "catch_up", lambda *_: None)
    chosen = ["checkpoint.every=50", "model.max_completion_tokens=4", *more]
    assert run(compose(words(model_folder, tmp_path, *chosen))) == 130
    told = f"interrupted at step {stopped_at}; checkpoint of step {stopped_at}"
    assert told in capsys.readouterr().out


def test_a_run_that_ends_by_an_error_lets_its_checkpoint_be_written_first(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, failed = checkpoint._publish, threading.Event()

    def slow(*of: Any) -> None:
        assert failed.wait(60)
        time.sleep(0.3)
        publish(*of)

    def step(training: Any, number: int) -> Any:
        if number == 1:
            failed.set()
            raise UserError("no second step")
        return train_step(training, number)

    monkeypatch.setattr(checkpoint, "_publish", slow)
    monkeypatch.setattr("mar.train.train_step", step)
    with pytest.raises(UserError, match="no second step"):
        run(
            compose(
                words(model_folder, tmp_path, "checkpoint.every=1", "model.max_completion_tokens=4")
            )
        )
    assert [path.name for path in (tmp_path / "clinic/seed0/checkpoints").iterdir()] == [
        "step000001"
    ]


def test_an_interrupted_run_says_that_its_last_checkpoint_was_not_written(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The save of step 2 fails, and a signal comes in the evaluation after it, before the next step would have noticed."""
    publish = checkpoint._publish

    def full(temporary: Path, target: Path, step: int, keep: int) -> None:
        if step == 2:
            raise OSError(28, "No space left on device")
        publish(temporary, target, step, keep)

    measure = Evaluations.measure

    def interrupted(evaluations: Evaluations, stage: str, step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt
        measure(evaluations, stage, step)

    monkeypatch.setattr(checkpoint, "_publish", full)
    monkeypatch.setattr(Evaluations, "measure", interrupted)
    chosen = ["checkpoint.every=1", "eval.every=2", "model.max_completion_tokens=4"]
    assert run(compose(words(model_folder, tmp_path, *chosen))) == 130
    said = capsys.readouterr().out
    assert "a checkpoint could not be written: [Errno 28] No space left on device" in said
    assert "interrupted at step 2; checkpoint of step 1" in said


def test_a_signal_during_an_evaluation_loses_nothing(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure = Evaluations.measure

    def interrupted(evaluations: Evaluations, stage: str, step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        measure(evaluations, stage, step)

    monkeypatch.setattr(Evaluations, "measure", interrupted)
    chosen = ["checkpoint.every=50", "eval.every=3", "model.max_completion_tokens=4"]
    assert run(compose(words(model_folder, tmp_path, *chosen))) == 130
    assert "interrupted at step 3; checkpoint of step 3" in capsys.readouterr().out


def test_a_signal_that_arrives_twice_at_once_is_one(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cluster signals every process of a job, and torchrun passes the signal on; a person's second Ctrl-C comes later and means at once."""

    def twice(pause: float) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)

    def in_step(pause: float, *of: Any) -> Any:
        twice(pause)
        return batch.make_batch(*of)

    def in_evaluation(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:  # the second one finds the first being dealt with
            os.kill(os.getpid(), signal.SIGTERM)

    cases = [
        ("train.make_batch", partial(in_step, 0.0), 1, 1),
        ("run.evaluations.measure", in_evaluation, 0, 0),
        ("train.make_batch", partial(in_step, 1.1), 1, 0),
    ]
    for number, (place, signalled, step, saved) in enumerate(cases):
        with monkeypatch.context() as patched:
            patched.setattr(f"mar.{place}", signalled)
            assert (
                run(
                    compose(
                        words(model_folder, tmp_path / str(number), "model.max_completion_tokens=4")
                    )
                )
                == 130
            )
        assert f"interrupted at step {step}; checkpoint of step {saved}" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["+experiment=clinc", "algo.groupsize=4", "modle=hf", "garbage"])
@pytest.mark.parametrize("flags", [[], ["-m"], ["--cfg", "job"]], ids=["run", "sweep", "look"])
def test_a_misspelt_word_is_one_sentence(
    flags: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = [] if word.startswith("+") else ["+experiment=clinic"]
    assert main([*flags, *task, word]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and said.err.startswith("error: ")
    assert word.partition("=")[2 if word.startswith("+") else 0] in said.err


def test_ctrl_c_while_the_code_is_loaded_leaves_no_traceback():
    run = subprocess.Popen(
        [sys.executable, "-m", "mar.train", "+experiment=medqa"], stderr=subprocess.PIPE, text=True
    )
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    assert "Traceback" not in run.communicate()[1] and run.returncode in (-signal.SIGINT, 130)


def test_a_step_after_a_measurement_is_held_again(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = []

    def signalled(*given: Any) -> Any:
        steps.append(len(steps) + 1)
        if steps == [1, 2]:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch.make_batch(*given)

    monkeypatch.setattr("mar.train.make_batch", signalled)
    chosen = ["checkpoint.every=50", "eval.every=1", "model.max_completion_tokens=4"]
    assert run(compose(words(model_folder, tmp_path, *chosen))) == 130
    assert "interrupted at step 2; checkpoint of step 2" in capsys.readouterr().out


@pytest.mark.parametrize("leads", [True, False])
def test_one_rank_says_that_it_stops(leads: bool, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(kind) for kind in kinds]
    try:
        interrupts = Interrupts(leads)
        with interrupts.held():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # within a second: the same one
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
    assert (
        capsys.readouterr().err.count("stopping after this step") == leads
        and interrupts.received_at
    )

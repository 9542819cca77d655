"""mar.sft: the same command goes on, its words are checked, and what it leaves is a checkpoint."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mar import sft
from mar.errors import UserError
from mar.files import read_jsonl
from mar.policy.sources import EMBEDDED, resolve_model
from mar.policy.weights import load_model
from mar.run import warm_up
from mar.run.asked_as import asked_as
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.folder import lock
from mar.run.warm_up import Questions
from mar.run.words import read_words

WORDS = """
+experiment=clinic model.lora_rank=2 model.trainable=lora_ sft.lr=1e-2 logger.console=plain
sft.batch=4 sft.steps=4 sft.log_every=2 sft.save_every=2 sft.eval_every=2 sft.eval_items=4
""".split()
# All parameters, a form for each question, Muon beside AdamW.
WHOLE = """
+experiment=clinic model.lora_rank=0 model.trainable= logger.console=plain sft.mixture=all
sft.muon=true sft.rows=2 sft.hint=0.3 sft.plain_steps=1 sft.batch=2 sft.steps=4 sft.log_every=2
sft.save_every=2 sft.eval_every=0
""".split()
CLOCK = ("seconds", "cpu_seconds", "words")


def train(words):
    sft.run(read_words(sft.COMMAND, words))


def rows(folder):
    """The lines of the log without clocks and words."""
    found, broken = read_jsonl(folder / sft.LOG)
    assert not broken
    told = [{key: value for key, value in row.items() if key not in CLOCK} for row in found]
    return [row for row in told if len(row) > 1]


def weights(folder):
    return torch.load(folder / warm_up.STATE, weights_only=True)["weights"]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(WORDS, id="adapters"),
        pytest.param(WHOLE, id="all parameters", marks=pytest.mark.slow),
    ],
)
def test_the_same_command_goes_on(words, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # the second load of questions lies within the run
    monkeypatch.setattr(warm_up, "STEPS_PER_LOAD", 3)
    monkeypatch.setattr(warm_up, "NUM_FOR_PRIOR", 50)
    train([*words, f"run_dir={whole}"])

    def stop(*given):
        warm_up.save_state(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            train([*words, f"run_dir={cut}"])
    train([*words, f"run_dir={cut}"])
    assert rows(cut) == rows(whole) and len(rows(whole)) == (6 if words is WORDS else 2)
    assert weights(cut).keys() == weights(whole).keys()
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(cut).items())
    assert load_model(cut).embed.weight.isfinite().all() and (cut / "tokenizer.json").is_file()
    with pytest.raises(UserError, match="adapters of another rank"):
        train([*words, "model.lora_rank=3", f"run_dir={cut}"])


def test_the_checkpoint_is_what_was_trained(tmp_path, monkeypatch):
    """Adapters are merged into it, and lie beside it."""
    monkeypatch.setattr(warm_up, "NUM_FOR_PRIOR", 50)
    train([*WORDS, "sft.steps=2", f"run_dir={tmp_path}"])
    trained = weights(tmp_path)
    assert any(value.any() for name, value in trained.items() if name.endswith("lora_b"))
    before, after = load_model(resolve_model("embedded", "", None)[0]), load_model(tmp_path)
    last = before.config.num_layers - 1
    a, b = trained[f"blocks.{last}.qkv.lora_a"], trained[f"blocks.{last}.qkv.lora_b"]
    scale = compose(["+experiment=clinic"]).model.lora_scale
    expected = before.blocks[last].qkv.weight + scale * b @ a
    torch.testing.assert_close(after.blocks[last].qkv.weight, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(after.embed.weight, before.embed.weight, rtol=0, atol=0)
    assert (tmp_path / "adapters/adapter_model.safetensors").is_file()
    # It was taught several forms: the file says the words alone.
    assert asked_as(tmp_path, []) == [
        "data.task=clinic",
        "data.request_first=false",
        "model.thinking=false",
        "model.explain_decimals=false",
    ]


def test_a_step_that_is_not_finite_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_up, "NUM_FOR_PRIOR", 50)
    loss = sft.soft_target_loss
    monkeypatch.setattr(sft, "soft_target_loss", lambda *given: loss(*given) * float("nan"))
    with pytest.raises(UserError, match="step 1 is not finite.*lower sft.lr"):
        train([*WORDS, f"run_dir={tmp_path}"])
    assert not (tmp_path / warm_up.STATE).exists()


def test_the_questions_of_a_file_come_in_a_new_order_each_epoch(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": f"Number {n}?", "golds": [f"g{n}"]}) for n in range(40)]
    file.write_text("\n".join(lines))
    config = compose(["+experiment=jsonl", f"data.path={file}", "model=embedded"])
    questions = Questions(config, 1, Display("plain", 0, 1))
    count = len(questions.examples)
    epochs = [[questions.of(step + n * count)[0].id for step in range(count)] for n in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == count
    assert epochs[0] != epochs[1]


def test_its_own_words_and_its_folder(tmp_path, monkeypatch):
    words = read_words(
        sft.COMMAND, [*WORDS, "sft.steps=7", "sft.asked=[2,4]", "sft.shares=[1,0,0,0]"]
    )
    assert words.options.steps == 7 and words.options.asked == [2, 4]
    assert words.options.shares == [1.0, 0.0, 0.0, 0.0]
    config = compose([*words.settings, f"out={tmp_path}"])
    assert warm_up.folder_of(config, []) == tmp_path / "clinic-sft/seed0"
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="holds something else"):
        train([*WORDS, f"run_dir={tmp_path}"])


@pytest.mark.parametrize(
    "word, sentence",
    [
        ("sft.stepz=7", "did you mean sft.steps=7"),
        ("sft.steps=0", "sft.steps=0 is out of range"),
        ("sft.steps=many", "sft.steps=many is no whole number"),
        ("sft.muon=yes", "neither true nor false"),
        ("sft.shares=[1,2]", "give 4 numbers"),
        ("sft.save_every=3", "no multiple of sft.log_every=2"),
        ("sft.eval_every=3", "no multiple of sft.save_every=2"),
        ("sft.rows=2", "add sft.mixture=short"),
        ("model.lr=1e-3", "write sft.lr=1e-3"),
        ("train.steps=3", "write sft.steps=3"),
        ("optim.schedule=cosine", "falls over the share sft.decay"),
        ("model.max_prompt_tokens=64", "takes prompts of any length"),
        ("device=cuda", "a warm-up runs on the CPU"),
    ],
)
def test_what_cannot_work_is_refused(word, sentence, tmp_path):
    with pytest.raises(UserError) as caught:
        train([*WORDS, word, f"run_dir={tmp_path}"])
    assert sentence in str(caught.value) and not list(tmp_path.iterdir())


def test_a_step_takes_wrong_answers_from_questions_of_other_steps(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": f"Number {n}?", "golds": [f"g{n}"]}) for n in range(40)]
    file.write_text("\n".join(lines))
    # A batch of one question has one answer, and a set needs three.
    words = ["+experiment=jsonl", "model=embedded", f"data.path={file}", "sft.shares=[0,0,1,0]"]
    words += ["sft.batch=1", "sft.steps=2", "sft.eval_every=0", "logger.console=plain"]
    train([*words, f"run_dir={tmp_path / 'run'}"])
    assert (tmp_path / "run" / warm_up.STATE).is_file()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with the state of two steps."""
    folder = tmp_path_factory.mktemp("begun")
    train([*WORDS, "sft.steps=2", "sft.eval_every=0", f"run_dir={folder}"])
    return folder


def test_it_goes_on_with_the_same_model_and_optimizer(begun, tmp_path):
    folder = Path(shutil.copytree(begun, tmp_path / "run"))
    words = [*WORDS, "sft.steps=4", "sft.eval_every=0", f"run_dir={folder}"]
    with pytest.raises(UserError, match="state.pt was written with another sft.muon"):
        train([*words, "sft.muon=true"])
    other = Path(shutil.copytree(EMBEDDED, tmp_path / "other"))
    weights_file = other / "model.safetensors"
    tensors = load_file(weights_file)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, weights_file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="state.pt was written with another model"):
        train([*words, "model=hf", f"model.path={other}"])


@pytest.mark.parametrize("damage", ["cut", "short", "empty", "text", "no moments"])
def test_a_damaged_state_is_one_sentence(damage, begun, tmp_path):
    folder = Path(shutil.copytree(begun, tmp_path / "run"))
    file = folder / warm_up.STATE
    whole = file.read_bytes()
    if damage == "no moments":
        state = torch.load(file, weights_only=True)
        del state["moments"]
        torch.save(state, file)
    else:
        cut = whole[: len(whole) // 2]
        contents = {"cut": cut, "short": whole[:10], "empty": b"", "text": b"not a state"}
        file.write_bytes(contents[damage])
    with pytest.raises(UserError, match="remove it and the same command begins anew"):
        train([*WORDS, "sft.steps=4", "sft.eval_every=0", f"run_dir={folder}"])


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(UserError, match="nothing can be written into"):
        train([*WORDS, f"run_dir={tmp_path / 'new'}"])


def test_two_warm_ups_never_share_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "one"
    words = [*WORDS, "sft.steps=2", f"run_dir={folder}"]
    taken = "one is being written by another process: wait for it"
    with lock(folder), pytest.raises(UserError, match=taken):
        train(words)
    assert not folder.exists()

    def while_it_runs(*given):
        with pytest.raises(UserError, match=taken):
            lock(folder)
        warm_up.save_state(*given)

    monkeypatch.setattr(sft, "save_state", while_it_runs)
    train(words)
    with lock(folder):
        pass


def test_drawn_questions_are_always_new(monkeypatch):
    monkeypatch.setattr(warm_up, "STEPS_PER_LOAD", 3)
    config = compose(["+experiment=clinic"])
    questions = Questions(config, 2, Display("plain", 0, 1))
    asked = [example.question for step in range(7) for example in questions.of(step)]
    assert len(set(asked)) == len(asked) == 14
    assert [example.question for example in questions.of(4)] == asked[8:10]


def test_few_questions_of_which_one_is_held_out(tmp_path):
    rows = [{"question": f"What is {n} plus 1?", "golds": [str(n + 1)]} for n in range(8)]
    files = []
    for name, some in (("train", rows[1:]), ("held_out", rows[:1])):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in some))
    train(
        [
            "+experiment=jsonl",
            "model=embedded",
            f"data.train_path={files[0]}",
            f"data.eval_path={files[1]}",
            f"run_dir={tmp_path / 'warm'}",
            "sft.mixture=short",
            "sft.steps=2",
            "sft.batch=2",
        ]
    )
    measured = [row for row in read_jsonl(tmp_path / "warm/sft.jsonl")[0] if "named" in row]
    assert measured and not any("constant@3" in row for row in measured)

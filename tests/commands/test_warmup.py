"""mar.warmup: the same command goes on, and its words are checked."""

import json

import pytest
import torch

from mar import warmup
from mar.errors import UserError
from mar.files import read_jsonl
from mar.run import warm_up
from mar.run.console import Display
from mar.run.warm_up import Questions, split_words

WORDS = """
+experiment=clinic model.lora_rank=2 model.trainable=lora_ model.lr=1e-2 logger.console=plain
sft.batch=4 sft.steps=4 sft.save_every=2 sft.eval_every=2 sft.eval_items=4
""".split()
CLOCK = ("seconds", "cpu_seconds", "words")


def rows(folder):
    """The lines of the log without clocks and words."""
    found, broken = read_jsonl(folder / warmup.LOG)
    assert not broken
    told = [{key: value for key, value in row.items() if key not in CLOCK} for row in found]
    return [row for row in told if len(row) > 1]


def adapters(folder):
    return torch.load(folder / warm_up.STATE, weights_only=True)["adapters"]


def test_the_same_command_goes_on(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # the second load of questions lies within the run
    monkeypatch.setattr(warm_up, "STEPS_PER_LOAD", 3)
    monkeypatch.setattr(warm_up, "NUM_FOR_PRIOR", 50)
    warmup.run([*WORDS, f"run_dir={whole}"])

    def stop(*given):
        warm_up.save_state(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(warmup, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            warmup.run([*WORDS, f"run_dir={cut}"])
    warmup.run([*WORDS, f"run_dir={cut}"])
    assert rows(cut) == rows(whole) and len(rows(whole)) == 6
    pairs = zip(adapters(cut).values(), adapters(whole).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(value.any() for name, value in adapters(whole).items() if name.endswith("lora_b"))

    with pytest.raises(UserError, match="adapters of another rank"):
        warmup.run([*WORDS, "model.lora_rank=3", f"run_dir={cut}"])


def test_a_step_that_is_not_finite_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_up, "NUM_FOR_PRIOR", 50)
    loss = warmup.soft_target_loss
    monkeypatch.setattr(warmup, "soft_target_loss", lambda *given: loss(*given) * float("nan"))
    with pytest.raises(UserError, match="step 1 is not finite.*lower model.lr"):
        warmup.run([*WORDS, f"run_dir={tmp_path}"])
    assert not (tmp_path / warm_up.STATE).exists()


def test_the_questions_of_a_file_come_in_a_new_order_each_epoch(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": f"Number {n}?", "golds": [f"g{n}"]}) for n in range(40)]
    file.write_text("\n".join(lines))
    words = ["+experiment=jsonl", f"data.path={file}", "model.lora_rank=2"]
    _, config = split_words(words)
    questions = Questions(config, 1, Display("plain", 0, 1))
    count = len(questions.examples)
    epochs = [[questions.of(step + n * count)[0].id for step in range(count)] for n in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == count
    assert epochs[0] != epochs[1]


def test_its_own_words():
    sft, config = split_words([*WORDS, "sft.steps=7"])
    assert sft.steps == 7 and config.data.task == "clinic"


@pytest.mark.parametrize(
    "word, sentence",
    [
        ("sft.stepz=7", "there are steps"),
        ("sft.steps=0", "sft.steps=0 is out of range"),
        ("sft.shares=[1,2]", "give 4 numbers"),
        ("sft.save_every=3", "no multiple of sft.save_every=3"),
        ("model.lora_rank=0", "add model.lora_rank=12"),
    ],
)
def test_what_cannot_work_is_refused(word, sentence):
    with pytest.raises(UserError, match=sentence.replace("[", r"\[")):
        split_words([*WORDS, word])

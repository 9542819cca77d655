"""An exported run is a checkpoint that transformers reads, equal to the policy."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mar.errors import UserError
from mar.export import _measured_at, _save_generation_config, export
from mar.policy.lora import adapted, merged_parameters
from mar.policy.sources import EMBEDDED, resolve_model
from mar.policy.weights import load_model
from mar.run import checkpoint
from mar.run.answering import find_target
from mar.run.asked_as import KNOWN, asked_as
from mar.run.asking import open_policy
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.folder import flatten
from mar.run.setup import announce
from mar.train import run

WORDS = "+experiment=clinic train.steps=1 eval.num_items=2 algo.prompts_per_step=1 algo.group_size=2 logger.console=plain"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert run(compose([*WORDS.split(), f"out={out}"])) == 0
    return out / "clinic" / "seed0"


def test_transformers_reads_the_policy(trained, tmp_path):
    folder = export(trained, tmp_path / "hf", "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    policy = adapted(
        load_model(resolve_model("embedded", "embedded", None)[0]), compose(WORDS.split()).model
    )
    before = policy.norm.weight.detach().clone()
    checkpoint.restore_weights(checkpoint.newest(trained / "checkpoints"), policy)
    assert not torch.equal(before, policy.norm.weight)
    ours = dict(load_model(folder).named_parameters())
    for name, parameter in merged_parameters(policy):
        torch.testing.assert_close(ours[name], parameter, rtol=0, atol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        theirs.generation_config.eos_token_id == tokenizer.eos_token_id and tokenizer.chat_template
    )
    card = (folder / "README.md").read_text()
    assert (
        "\n# embedded, clinic\n" in card
        and "after 1 of 1 steps" in card
        and "<answer1>" in card
        and "| coverage@3 |" in card
    )


KEYS = [*KNOWN]


def test_an_export_is_asked_as_its_run_was(trained, tmp_path, capsys):
    folder = export(trained, tmp_path / "hf", "float32")
    capsys.readouterr()
    theirs = open_policy(str(trained), [])
    assert capsys.readouterr().err == ""
    ours = open_policy(str(folder), ["model.max_completion_tokens=64"])
    said = capsys.readouterr().err
    assert (
        said.startswith(f"as {folder}/mar.json says: data.task=clinic ") and said.count("\n") == 1
    )
    assert "model.thinking=false model.explain_decimals=false reward.objective=multi_rlcr" in said
    asked, told = (flatten(policy.config.to_dict()) for policy in (ours, theirs))
    assert [asked[key] for key in KEYS] == [told[key] for key in KEYS]
    question = "Female, 20 to 29. Reports cough. What is the condition?"
    texts = [[one.text for one in policy.ask(question, 2, seed=0)] for policy in (ours, theirs)]
    assert texts[0] == texts[1], "the same words, the same draws"


def test_the_command_line_wins_over_the_folder(trained, tmp_path, capsys):
    folder = export(trained, tmp_path / "hf", "float32")
    assert asked_as(folder, ["reward=rlcr_single", "model.thinking=true", "+experiment=jsonl"]) == [
        "data.request_first=false",
        "model.explain_decimals=false",
    ]
    words = ["+experiment=clinic", "reward.num_answers=2", "eval.num_items=2"]
    target = find_target(str(folder), words, None, None, Display("plain", 0, 0))
    reward, model = target.config.reward, target.config.model
    assert reward.num_answers == 2 and not model.thinking and not model.explain_decimals


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "cannot be read"),
        ("\xff", "cannot be read"),
        ("[" * 9000, "cannot be read"),
        ("[1]", "is no JSON object"),
        ('{"out": "/x"}', "has 'out', which mar does not write"),
        ('{"model.thinking": 1}', "says model.thinking=1, which cannot be"),
        ('{"reward.num_answers": true}', "reward.num_answers=True"),
        ('{"reward.num_answers": 11}', "reward.num_answers=11"),
        ('{"reward.objective": ["multi_rlcr"]}', "reward.objective="),
        ('{"data.task": "clinic data.path=x"}', "data.task="),
    ],
)
def test_a_damaged_mar_json_is_one_sentence(content, fault, tmp_path):
    (tmp_path / "mar.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(fault)):
        asked_as(tmp_path, [])


def test_what_starts_from_a_folder_says_where_it_asks_otherwise(trained, tmp_path):
    folder = export(trained, tmp_path / "hf", "float32")
    display = Display("plain", 0, 0)
    words = ["+experiment=clinic", "model=hf", f"model.path={folder}"]
    with display.console.capture() as same:
        announce(compose([*words, "model.thinking=false", "model.explain_decimals=false"]), display)
    assert same.get() == ""
    with display.console.capture() as other:
        announce(compose([*words, "model.thinking=true", "model.explain_decimals=false"]), display)
    said = " ".join(other.get().split())
    assert said.endswith("was asked with model.thinking=false before, and is not now")
    (folder / "mar.json").write_text("{")
    with pytest.raises(UserError, match=re.escape(f"{folder}/mar.json cannot be read")):
        announce(compose(words), display)


def test_rows_without_a_token_are_not_drawn_from_an_export(tmp_path):
    """Another program knows the embedding's padding by the generation config alone."""
    padded = Path(shutil.copytree(EMBEDDED, tmp_path / "padded"))
    tensors = load_file(padded / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embedding, 9 * embedding[:20]])
    save_file(tensors, padded / "model.safetensors", metadata={"format": "pt"})
    shape = json.loads((padded / "config.json").read_text()) | {"vocab_size": 1200}
    (padded / "config.json").write_text(json.dumps(shape))
    source = ["model=hf", f"model.path={padded}", "model.thinking=false", "model.lr=1e-4"]
    assert run(compose([*WORDS.split(), *source, f"out={tmp_path}"])) == 0
    folder = export(tmp_path / "clinic" / "seed0", tmp_path / "hf", "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert theirs.generation_config.suppress_tokens == list(range(1180, 1200))
    drawn = theirs.generate(torch.tensor([[2, 37, 75]]), max_new_tokens=24, num_return_sequences=8)
    assert int(drawn.max()) < 1180


def test_mistakes_are_one_sentence(trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for place in ("full", "full/x"):
        with pytest.raises(UserError, match="is no empty folder"):
            export(trained, tmp_path / place, "bfloat16")
    with pytest.raises(UserError, match="cannot be read"):
        export(tmp_path / "nothing", tmp_path / "out", "bfloat16")
    command = [sys.executable, "-m", "mar.export", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_export_says_how_its_run_sampled(tmp_path):
    words = ["algo.temperature=0.7", "algo.top_k=3", "algo.top_p=0.9", "algo.min_p=0.1"]
    _save_generation_config(tmp_path, compose([*WORDS.split(), *words], check=False), {}, [])
    said = json.loads((tmp_path / "generation_config.json").read_text())
    named = {key: said[key] for key in ("temperature", "top_k", "top_p", "min_p")}
    assert named == {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.1}


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_a_damaged_eval_json_leaves_nothing_half_exported(content, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "eval.json").write_text(content)
    with pytest.raises(UserError, match=r"eval\.json is damaged"):
        export(folder, tmp_path / "hf", "bfloat16")
    assert not (tmp_path / "hf").exists()


def test_the_card_has_the_numbers_of_the_exported_step(tmp_path):
    (tmp_path / "eval.json").write_text(
        json.dumps(
            {
                "num_items": 9,
                "before": {"top1": 0.1},
                "after": {"top1": 0.3},
                "history": [{"step": 0, "top1": 0.1}, {"step": 5, "top1": 0.2}],
            }
        )
    )
    found = {step: _measured_at(tmp_path, step, steps=8) for step in (5, 7, 8)}
    assert found == {5: (9, {"top1": 0.2}), 7: (9, {}), 8: (9, {"top1": 0.3})}
    assert _measured_at(tmp_path / "nothing", 8, steps=8) == (0, {})


def test_an_export_ends_where_its_source_does_and_has_its_files(trained, tmp_path, monkeypatch):
    source = Path(shutil.copytree(EMBEDDED, tmp_path / "source"))
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    options = json.loads((source / "tokenizer_config.json").read_text())
    options |= {"tokenizer_class": "PreTrainedTokenizerFast", "local_files_only": True}
    (source / "tokenizer_config.json").write_text(json.dumps(options))
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").write_text(template + "{{ strftime_now('%d') }}")
    monkeypatch.setattr("mar.export.model_of", lambda *_: (source, {}))
    folder = export(trained, tmp_path / "hf", "float32")
    for name in ("generation_config.json", "config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == [1, 3]
    options.pop("local_files_only")
    assert json.loads((folder / "tokenizer_config.json").read_text()) == options
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert "in training it was told 26 July 2024" in (folder / "README.md").read_text()
    theirs = transformers.GenerationConfig.from_pretrained(folder)
    assert theirs.eos_token_id == [1, 3]

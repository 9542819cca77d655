"""Adapters change nothing at first, equal their merged weights, and are saved in peft's format."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mar.errors import UserError
from mar.export import export
from mar.policy.families import ARCHITECTURES
from mar.policy.lora import (
    adapted,
    add_adapters,
    load_adapters,
    merge,
    save_adapters,
    trainable_pattern,
)
from mar.policy.model import Decoder, ModelConfig
from mar.policy.packing import pack_groups
from mar.policy.sources import resolve_model
from mar.policy.weights import layout, load_model, split_state
from mar.run import checkpoint
from mar.run.answering import Target, load_weights
from mar.run.compose import compose
from mar.train import run

EMBEDDED = resolve_model("embedded", "embedded", None)[0]
WORDS = """
+experiment=clinic train.steps=2 eval.num_items=2 algo.prompts_per_step=2 algo.group_size=3
model.lora_rank=3 model.lora_layers='qkv|down' model.lr=1e-2 model.trainable=
checkpoint.every=1 logger.console=plain
""".split()


def shape(architecture: str) -> ModelConfig:
    hf = {
        "architectures": [architecture],
        "vocab_size": 31,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "tie_word_embeddings": True,
        "sliding_window": None,
    }
    return ModelConfig.from_hf(hf)


def with_random_adapters(config: ModelConfig, where: str) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config).double()
    add_adapters(model, 3, 0.7, where)
    for name, parameter in model.named_parameters():
        if "lora_b" in name or name.endswith("bias"):
            parameter.data.normal_()
    return model


def columns(model: Decoder) -> tuple[torch.Tensor, ...]:
    return model(pack_groups([[1, 2, 3], [4]], [[[5, 6], [7]], [[8, 9, 10]]]), 0.8)


def test_adapters_change_nothing_before_they_are_trained():
    plain, model = load_model(EMBEDDED), load_model(EMBEDDED)
    add_adapters(model, 4, 2.0, "")
    num_adapters = sum("lora_a" in name for name, _ in model.named_parameters())
    assert num_adapters == 4 * plain.config.num_layers
    for ours, theirs in zip(columns(model), columns(plain), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("where", ["", r"blocks\.1\.(o|gate_up)"])
def test_the_merged_model_computes_the_same(architecture, where):
    model = with_random_adapters(shape(architecture), where)
    merged = merge(model)
    names = [name for name, _ in Decoder(shape(architecture)).named_parameters()]
    assert [name for name, _ in merged.named_parameters()] == names
    for ours, theirs in zip(columns(model), columns(merged), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_what_is_trained_is_what_was_asked_for_else_the_adapters_else_everything():
    options = compose(WORDS).model
    for trainable, rank, pattern in (("^norm", 3, "^norm"), ("", 3, "lora_"), ("", 0, "")):
        asked = replace(options, trainable=trainable, lora_rank=rank)
        assert trainable_pattern(asked) == pattern


def test_peft_files_add_up_to_the_merged_weights(tmp_path):
    """peft adds lora_alpha / r * B @ A to the weight of each module that it names."""
    model = with_random_adapters(shape("Qwen3ForCausalLM"), r"blocks\.1\.(qkv|gate_up|down)")
    save_adapters(model, tmp_path, "owner/base")
    adapter_config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    projections = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    target_modules = adapter_config["target_modules"]
    assert set(target_modules) == {f"model.layers.1.{name}" for name in projections}
    without_adapters = {n: p for n, p in model.state_dict().items() if n in layout(model.config)}
    plain = split_state(model.config, without_adapters)
    merged = split_state(model.config, merge(model).state_dict())
    for name in plain:
        module = name.removesuffix(".weight")
        delta = torch.zeros_like(plain[name])
        if module in target_modules:
            a, b = (tensors.pop(f"base_model.model.{module}.lora_{x}.weight") for x in "AB")
            delta = adapter_config["lora_alpha"] / adapter_config["r"] * b @ a
            assert a.shape[0] == adapter_config["r"] and delta.abs().max() > 0.01
        torch.testing.assert_close(plain[name] + delta, merged[name], rtol=0, atol=1e-12)
    assert not tensors
    # not among the dependencies: where it happens to be installed
    peft = pytest.importorskip("peft")
    assert peft.PeftConfig.from_pretrained(tmp_path).r == 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert run(compose([*WORDS, f"out={out}"])) == 0
    return out / "clinic" / "seed0"


def policy_of(trained: Path) -> Decoder:
    policy = adapted(load_model(EMBEDDED), compose(WORDS).model)
    checkpoint.restore_weights(checkpoint.newest(trained / "checkpoints"), policy)
    return policy


@pytest.mark.slow
def test_only_the_adapters_train_and_the_run_resumes(trained, tmp_path):
    policy = dict(policy_of(trained).named_parameters())
    base = dict(load_model(EMBEDDED).named_parameters())
    assert all(torch.equal(policy[name], base[name]) for name in base)
    added = [name for name in policy if name not in base]
    expected = {"qkv.lora_a", "qkv.lora_b", "down.lora_a", "down.lora_b"}
    assert {name.split(".", 2)[2] for name in added} == expected
    # b began at zero
    assert all(policy[name].abs().max() > 0 for name in added)
    for stop in ("train.stop_at=1", "train.stop_at=null"):
        assert run(compose([*WORDS, f"out={tmp_path}", stop])) == 0
    again = dict(policy_of(tmp_path / "clinic/seed0").named_parameters())
    assert all(torch.equal(policy[name], again[name]) for name in policy)


def test_what_is_measured_and_exported_is_the_adapted_policy(trained, tmp_path):
    config = compose(WORDS)
    target = Target("x", config, EMBEDDED, {}, checkpoint.newest(trained / "checkpoints"), tmp_path)
    measured, _ = load_weights(target, torch.device("cpu"))
    folder = export(trained, tmp_path / "hf", "float32")
    for ours in (measured, load_model(folder)):
        for got, expected in zip(columns(ours), columns(policy_of(trained)), strict=True):
            # float32: merged and apart round differently
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-5)
    assert not torch.equal(columns(measured)[0], columns(load_model(EMBEDDED))[0])
    folder = export(trained, tmp_path / "adapters", "float32", adapters=True)
    files = {file.name for file in folder.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_export_says_where_merging_rounds(trained, tmp_path, capsys):
    for dtype, said in (("float32", False), ("bfloat16", True)):
        export(trained, tmp_path / dtype, dtype)
        assert ("take adapters=true or dtype=float32" in capsys.readouterr().err) == said


def test_mistakes_are_one_sentence(trained, tmp_path):
    with pytest.raises(
        UserError,
        match=r"model.lora_layers='head' is found in no linear layer's name; they are blocks.0.qkv",
    ):
        run(compose([*WORDS, f"out={tmp_path}", "model.lora_layers=head"]))
    with pytest.raises(UserError, match="is no regular expression"):
        compose([*WORDS, "model.lora_layers='('"])
    one = """train.steps=1 eval.num_items=1 algo.prompts_per_step=1 algo.group_size=2
    logger.console=plain""".split()
    for words, reason in (
        (["model.lora_rank=0"], "has no adapters"),
        (["model.trainable='lora|^norm'"], "trained norm.weight too"),
    ):
        out = tmp_path / reason.split()[0]
        assert run(compose([*WORDS, *one, f"out={out}", *words])) == 0
        with pytest.raises(UserError, match=f"{reason}: leave adapters=true out"):
            export(out / "clinic/seed0", tmp_path / "peft", "float32", adapters=True)


def test_adapters_come_back_from_the_folder(tmp_path: Path) -> None:
    config = shape("LlamaForCausalLM")
    saved = with_random_adapters(config, "qkv|down")
    save_adapters(saved, tmp_path, "base")
    again = Decoder(config).double()
    again.load_state_dict(saved.state_dict(), strict=False)
    add_adapters(again, 3, 0.7, "qkv|down")
    load_adapters(again, tmp_path)
    for name, parameter in again.named_parameters():
        assert "lora_" not in name or torch.equal(parameter, saved.get_parameter(name))


@pytest.mark.parametrize(
    "rank, scale, layers, sentence",
    [
        (4, 0.7, "qkv|down", "no adapter of rank 4 for"),
        (3, 0.5, "qkv|down", "not rank \\* model.lora_scale = 1.5"),
        (3, 0.7, "", "no adapter of rank 3 for"),
        (3, 0.7, "qkv", "for which the model has no adapter"),
    ],
)
def test_other_adapters_are_refused(
    rank: int, scale: float, layers: str, sentence: str, tmp_path: Path
) -> None:
    config = shape("LlamaForCausalLM")
    save_adapters(with_random_adapters(config, "qkv|down"), tmp_path, "base")
    other = Decoder(config)
    add_adapters(other, rank, scale, layers)
    with pytest.raises(UserError, match=sentence):
        load_adapters(other, tmp_path)


def test_adapters_of_another_program_are_refused(tmp_path: Path) -> None:
    config = shape("LlamaForCausalLM")
    model = with_random_adapters(config, "qkv")
    save_adapters(model, tmp_path, "base")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    k = "base_model.model.model.layers.0.self_attn.k_proj"
    save_file(tensors | {f"{k}.lora_A.weight": tensors[f"{k}.lora_A.weight"] + 1}, file)
    with pytest.raises(UserError, match="a lora_A of its own for each part of blocks.0.qkv"):
        load_adapters(model, tmp_path)
    del tensors[f"{k}.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match="no adapter of rank 3 for blocks.0.qkv"):
        load_adapters(model, tmp_path)


def test_adapters_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    config = shape("LlamaForCausalLM")
    model = with_random_adapters(config, "qkv")
    with pytest.raises(UserError, match="adapter_config.json does not exist"):
        load_adapters(model, tmp_path)
    save_adapters(model, tmp_path, "base")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="adapter_model.safetensors cannot be read"):
        load_adapters(model, tmp_path)


def test_weights_in_bfloat16_merge_into_wide_ones() -> None:
    model = Decoder(shape("LlamaForCausalLM"))
    add_adapters(model, 3, 0.7, "qkv", torch.bfloat16)
    assert model.blocks[0].qkv.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in merge(model).parameters()} == {torch.float32}

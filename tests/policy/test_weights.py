"""Checkpoints in and out: exact round trips, and errors that name what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mar.errors import UserError
from mar.policy.model import Decoder, ModelConfig
from mar.policy.sources import weight_hashes
from mar.policy.weights import load_model, save_model

TIED = ModelConfig(
    "Qwen2ForCausalLM", 31, 24, 40, 2, 3, 1, 8, attention_bias=True, tied_embeddings=True
)
UNTIED = ModelConfig(
    "LlamaForCausalLM", 31, 24, 40, 1, 6, 2, 10, attention_bias=True, mlp_bias=True
)


def saved(config, folder, **options):
    torch.manual_seed(0)
    model = Decoder(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    save_model(model, folder, **options)
    return model


def assert_same(model, other):
    assert model.config == other.config
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("config", (TIED, UNTIED))
def test_round_trip_is_exact(config, tmp_path):
    model = saved(config, tmp_path)
    assert_same(model, load_model(tmp_path))
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != config.tied_embeddings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert all(parameter.requires_grad for parameter in load_model(tmp_path).parameters())


def test_config_and_dtype(tmp_path):
    model = saved(TIED, tmp_path, dtype=torch.bfloat16, extra={"eos_token_id": 7})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["Qwen2ForCausalLM"] and written["model_type"] == "qwen2"
    assert written["torch_dtype"] == written["dtype"] == "bfloat16" and written["eos_token_id"] == 7
    loaded = load_model(tmp_path, torch.float64)
    assert torch.equal(loaded.norm.weight, model.norm.weight.to(torch.bfloat16).double())


def shard(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_indexed_files(tmp_path):
    model = saved(UNTIED, tmp_path)
    shard(tmp_path)
    assert_same(model, load_model(tmp_path))
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2\.safetensors does not exist"):
        load_model(tmp_path)
    save_model(model, tmp_path)  # over the old index
    assert_same(model, load_model(tmp_path))


@pytest.mark.parametrize("keep", (4, 300, -8))
def test_truncated_file_is_named(keep, tmp_path):
    saved(TIED, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
        load_model(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ')
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        load_model(tmp_path)
    saved(TIED, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        load_model(tmp_path)


def test_weights_that_cannot_be_opened_are_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read \(.*No such file"):
        weight_hashes(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"),
            r"model\.layers\.1\.self_attn\.k_proj\.bias is missing",
        ),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), r"no tensor model\.extra"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(41, 24)}),
            r"up_proj\.weight has shape \[41, 24\], but config\.json asks for \[40, 24\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(31, 24)}),
            r"lm_head\.weight differs from the embedding",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(24).to(torch.float8_e4m3fn)}),
            r"norm\.weight is stored as float8_e4m3fn, which are codes of quantised numbers",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)}),
            r"norm\.weight is stored as int8",
        ),
    ),
)
def test_wrong_tensors_are_named(change, message, tmp_path):
    saved(TIED, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_a_tied_head_and_old_buffers_may_be_present(tmp_path):
    model = saved(TIED, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(model, load_model(tmp_path))


# --- folders that are damaged, or mean harm ------------------------------------------------------


@pytest.mark.parametrize(
    "weight_map",
    (
        None,
        [],
        {},
        ["model-1.safetensors"],
        "model-1.safetensors",
        {"model.norm.weight": 1},
        {"model.norm.weight": ["model-1.safetensors"]},
        {"model.norm.weight": "../model-1.safetensors"},
        {"model.norm.weight": "/tmp/model-1.safetensors"},
        {"model.norm.weight": "below/model-1.safetensors"},
        {"model.norm.weight": "./model-1.safetensors"},
        {"model.norm.weight": ".."},
        {"model.norm.weight": ""},
        {"model.norm.weight": "model-1.bin"},
    ),
)
def test_an_index_names_files_beside_it(weight_map, tmp_path):
    """The hashes that a run records are of the files in the folder."""
    folder = tmp_path / "model"
    saved(UNTIED, folder)
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json: (weight_map must|model\.norm\.weight is)"):
        load_model(folder)


def test_a_tensor_in_two_files_is_named(tmp_path):
    saved(UNTIED, tmp_path)
    shard(tmp_path)
    both = load_file(tmp_path / "model-1.safetensors") | load_file(tmp_path / "model-2.safetensors")
    save_file(both, tmp_path / "model-2.safetensors")
    with pytest.raises(UserError, match="which another file of the index holds too"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", (b"\xff\xfe", b"[" * 100_000, b"[1]", b"3", b""))
def test_a_config_that_is_no_object_is_named(content, tmp_path):
    saved(TIED, tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is not"):
        load_model(tmp_path)


def test_a_padded_embedding_keeps_its_rows(tmp_path):
    """`num_tokens` is about the distribution; what is saved again has all rows."""
    model = saved(TIED, tmp_path)
    loaded = load_model(tmp_path, num_tokens=29)
    assert loaded.head_weight.shape == (29, 24) and loaded.embed.weight.shape == (31, 24)
    save_model(loaded, tmp_path / "again")
    assert_same(model, load_model(tmp_path / "again"))
    assert_same(model, load_model(tmp_path, num_tokens=31))
    with pytest.raises(ValueError, match="num_tokens=32 of 31 rows"):
        load_model(tmp_path, num_tokens=32)

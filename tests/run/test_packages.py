"""What works without the packages that a GPU machine may not have, and what is said where one is
asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mar.errors import OPTIONAL_PACKAGES

ROOT = Path(__file__).resolve().parents[2]
# Python runs this at its start: these packages are not found, as if they were not installed.
BLOCK = """import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


@pytest.fixture
def without_packages(tmp_path):
    """A function that runs `python -m words` where no optional package can be imported."""
    site = tmp_path / "site"
    site.mkdir()
    blocked = {*OPTIONAL_PACKAGES, "beartype", "liger_kernel"}
    (site / "sitecustomize.py").write_text(BLOCK.format(names=sorted(blocked)))
    path = os.pathsep.join([str(site), str(ROOT), str(ROOT / "kernels")])
    surroundings = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            env=surroundings,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.slow
def test_a_run_needs_none_of_them(without_packages, tmp_path):
    words = ["+experiment=clinic", "train.steps=1", "eval.num_items=2", f"out={tmp_path}"]
    done = without_packages("mar.train", *words, "algo.prompts_per_step=2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "clinic/seed0/eval.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "package,words",
    [
        (
            "datasets",
            ("mar.tasks", "medqa", "data.source=hub", "data.hub_id=a/b", "model=embedded"),
        ),
        ("matplotlib", ("mar.report", str(ROOT / "experiments"))),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(without_packages, package, words):
    done = without_packages(*words)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: this needs the package {package}, which is not installed: pip install {package}\n"
    )

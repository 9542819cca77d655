"""Every file of conf/sweep names keys and values that the schema takes, and its jobs get folders that say what they are."""

from itertools import product
from pathlib import Path

import pytest
import yaml

from mar.run.compose import compose
from mar.run.folder import variant

SWEEPS = sorted(Path("conf/sweep").glob("*.yaml"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda f: f.stem)
def test_a_sweep_is_valid(file: Path) -> None:
    params = yaml.safe_load(file.read_text())["hydra"]["sweeper"]["params"]
    jobs = [
        [f"{key}={value}" for key, value in zip(params, values, strict=True)]
        for values in product(*(str(v).split(",") for v in params.values()))
    ]
    for job in jobs:
        words = ["+experiment=clinic", f"+sweep={file.stem}", *job]
        assert compose(words)
        assert variant(words) == variant(word for word in job if not word.startswith("seed="))
    assert (
        len({(variant(job), next(w for w in job if w.startswith("seed="))) for job in jobs})
        == len(jobs)
        > 1
    )


def test_there_are_sweeps() -> None:
    assert {file.stem for file in SWEEPS} >= {"seeds", "credit", "size"}

"""Folders of runs: one per job, resumed, put aside or refused."""

import json
import os
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from mar.config import Config
from mar.errors import UserError
from mar.run.compose import CONF_DIR, compose
from mar.run.evaluation_folder import claimed
from mar.run.folder import RunDir, differing_keys, find, lock, prepare, swept_keys, variant


@cache
def composed(*words: str) -> Config:
    return compose(["+experiment=clinic", *words])


def config(out: Path, *words: str) -> dict[str, Any]:
    tree = composed(*words)
    return tree.to_dict() | {"out": str(out), "run_dir": f"{out}/{tree.name}/seed{tree.seed}"}


def finish(path: Path) -> None:
    (path / "eval.json").write_text(
        json.dumps({"before": {"coverage@3": 0.5}, "after": {"coverage@3": 0.6}})
    )


def test_single_run() -> None:
    assert compose(["+experiment=medqa", "seed=3"]).run_dir == "runs/medqa/seed3"
    assert compose(["+experiment=medqa", "name=mine", "out=/tmp/x"]).run_dir == "/tmp/x/mine/seed0"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ""),
        (
            [
                "+experiment=medqa",
                "seed=1",
                "name=x",
                "out=/a/b",
                "data.path=/c/d.jsonl",
                "logger.console=plain",
            ],
            "",
        ),
        (["train.stop_at=3"], ""),
        (["reward=multi_rlvr", "seed=1"], "reward=multi_rlvr"),
        (["++b=2", "a=1"], "a=1,b=2"),
        (["a=1", "b=2"], "a=1,b=2"),
    ],
)
def test_variant(words: list[str], expected: str) -> None:
    assert variant(words) == expected


def test_variant_is_one_short_folder_name() -> None:
    awkward = [
        ["model.path=a/b"],
        ["model.path=a-b"],
        ["x=[1,2]"],
        ["x=" + "9" * 200],
        ["x=" + "9" * 201],
        ["x=a b"],
    ]
    names = [variant(words) for words in awkward]
    assert len(set(names)) == len(names)
    for name in names:
        assert 0 < len(name) <= 80
        assert "/" not in name and " " not in name


def jobs_of(words: list[str]) -> list[list[str]]:
    """The command lines of a multirun's jobs."""
    choices = [
        [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in OverridesParser.create().parse_overrides(words)
    ]
    return [list(job) for job in product(*choices)]


def test_eight_jobs_have_eight_folders(tmp_path: Path) -> None:
    words = [
        "+experiment=medqa",
        "seed=0,1",
        "reward.num_answers=2,3",
        "reward=multi_rlcr,multi_rlvr",
    ]
    folders = {
        f"{variant(job)}/{next(w for w in job if w.startswith('seed'))}" for job in jobs_of(words)
    }
    assert len(folders) == 8


@pytest.mark.parametrize(
    "swept",
    [
        "data.path=/c/a.jsonl,/c/b.jsonl",
        "data.path=a.jsonl,b/a.jsonl",
        "train.stop_at=1,2",
        "logger.wandb=off,offline",
        "+experiment=medqa,clinic",
        "train.steps=range(1,3)",
        "data.path='choice(a.jsonl,b.jsonl)'",
    ],
)
def test_every_swept_key_makes_folders(swept: str) -> None:
    words = ["name=x", "data.train_split=train", swept.replace("'", "")]
    jobs = jobs_of(words)
    folders = {variant(job, swept_keys(["-m", *words])) for job in jobs}
    assert len(folders) == len(jobs) == 2
    assert variant(jobs[0]) == variant(jobs[0], swept_keys(jobs[0])), "a single job is no sweep"


def test_swept_keys_that_the_path_has_are_not_repeated() -> None:
    words = ["seed=0,1", "name=a,b", "out=x,y", "run_dir=c,d", "reward.num_answers=2"]
    assert swept_keys(words) == {"seed", "name", "out", "run_dir"}
    assert {variant(job, swept_keys(words)) for job in jobs_of(words)} == {"reward.num_answers=2"}


@pytest.mark.slow
def test_multirun_by_hydra_itself(tmp_path: Path) -> None:
    """Eight jobs, eight folders, and nothing beside them but the record of the multirun."""
    script = tmp_path / "main.py"
    script.write_text(
        "import hydra\n"
        "from mar.run.compose import from_omegaconf, validate\n"
        "from mar.run.folder import prepare\n"
        f"@hydra.main(config_path={str(CONF_DIR)!r}, config_name='config', version_base='1.3')\n"
        "def main(tree): prepare(validate(from_omegaconf(tree)).to_dict())\n"
        "main()\n"
    )
    words = [
        "+experiment=medqa",
        "seed=0,1",
        "reward.num_answers=2,3",
        "reward=multi_rlcr,multi_rlvr",
        "--multirun",
    ]
    work = tmp_path / "work"
    work.mkdir()
    subprocess.run(
        [sys.executable, script, *words],
        cwd=work,
        env={"PYTHONPATH": str(CONF_DIR.parent)},
        check=True,
        timeout=120,
    )
    files = sorted(str(f.relative_to(work)) for f in work.rglob("*") if f.is_file())
    assert len([f for f in files if f.endswith("/config.yaml")]) == 8
    assert len(files) == 9 and "runs/medqa/multirun.yaml" in files
    assert (work / "runs/medqa/reward=multi_rlvr,reward.num_answers=2/seed1/config.yaml").is_file()


@pytest.mark.slow
def test_a_sweep_over_files_by_hydra_itself(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import hydra\n"
        "from mar.run.compose import from_omegaconf\n"
        "from mar.run.folder import prepare\n"
        f"@hydra.main(config_path={str(CONF_DIR)!r}, config_name='config', version_base='1.3')\n"
        "def main(tree): prepare(from_omegaconf(tree).to_dict())\n"
        "main()\n"
    )
    words = ["+experiment=jsonl", "data.path=a.jsonl,b.jsonl", "name=x", "--multirun"]
    subprocess.run(
        [sys.executable, script, *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(CONF_DIR.parent)},
        check=True,
        timeout=120,
    )
    folders = sorted(path.parent.parent.name for path in tmp_path.rglob("config.yaml"))
    assert folders == ["data.path=a.jsonl", "data.path=b.jsonl"]


def test_new_then_resume_then_aside(tmp_path: Path) -> None:
    wanted = config(tmp_path)
    path = tmp_path / "clinic" / "seed0"
    assert find(wanted) == RunDir(path, resume=False)
    assert not path.exists(), "find touches nothing"
    assert prepare(wanted) == RunDir(path, resume=False)
    assert yaml.safe_load((path / "config.yaml").read_text()) == wanted
    assert [f.name for f in path.parent.iterdir()] == ["seed0"]
    assert prepare(wanted) == RunDir(path, resume=True)

    (path / "eval.json").write_text(json.dumps({"before": {}}))
    assert prepare(wanted).resume, "measured before only: unfinished"
    for number in (1, 2):
        finish(path)
        run = prepare(wanted)
        assert run == RunDir(path, resume=False, archive=path.with_name(f"seed0~{number}"))
        assert not (path / "eval.json").exists()
        assert (path.with_name(f"seed0~{number}") / "eval.json").exists()


def test_a_finished_run_steps_aside_for_another_configuration(tmp_path: Path) -> None:
    finish(prepare(config(tmp_path)).path)
    run = prepare(config(tmp_path, "train.steps=5"))
    assert run.archive is not None and run.differs == ("train.steps",)
    finish(run.path)
    (run.path / "config.yaml").write_text("K: 3")
    run = prepare(config(tmp_path))
    assert run.archive is not None and len(run.differs) == 9 and run.differs[-1] == "...", (
        "one of another program steps aside, too"
    )


def test_a_finished_run_with_a_damaged_configuration_says_so(tmp_path: Path) -> None:
    path = prepare(config(tmp_path)).path
    finish(path)
    for content in ("{broken", "", "just text"):
        (path / "config.yaml").write_text(content)
        run = find(config(tmp_path))
        assert run.archive is not None and run.why == "its config.yaml is damaged"


def test_another_configuration_is_refused_by_its_keys(tmp_path: Path) -> None:
    path = prepare(config(tmp_path)).path
    before = (path / "config.yaml").read_text()
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path, "train.steps=5", "algo.credit=set"))
    assert "algo.credit, train.steps" in str(caught.value) and str(path) in str(caught.value)
    assert (path / "config.yaml").read_text() == before


def test_what_is_no_difference(tmp_path: Path) -> None:
    prepare(config(tmp_path, "train.stop_at=3") | {"provenance": {"sha256": "0"}})
    assert prepare(config(tmp_path, "logger.console=plain", "model.threads=1")).resume
    assert differing_keys({"a": 1, "b": {"c": 1}}, {"a": 1, "b": {"c": 2}, "d": None}) == [
        "b.c",
        "d",
    ]


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clinic" / "seed0"
    path.mkdir(parents=True)
    assert not prepare(config(tmp_path)).resume, "an empty folder is free"
    (path / "config.yaml").unlink()
    (path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        prepare(config(tmp_path))


@pytest.mark.parametrize("name", ["config.yaml", "eval.json"])
@pytest.mark.parametrize("content", ["{broken", "", "just text", '["a"'])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    path = prepare(config(tmp_path)).path
    (path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        prepare(config(tmp_path))


def test_the_resolver_is_silent_outside_hydra_main() -> None:
    assert not HydraConfig.initialized()
    assert compose().run_dir == "runs/run/seed0"


def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    """The kernel keeps the lock: of a process that was killed nothing is left to clear away."""
    folder = tmp_path / "runs" / "clinic" / "seed0"
    script = f"import pathlib, time, mar.run.folder as r; held = r.lock(pathlib.Path({str(folder)!r})); print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "1\n"
        with pytest.raises(
            UserError, match=r"seed0 is being written by another process: wait for it"
        ):
            lock(folder)
        with lock(folder.with_name("seed1")):
            pass
    finally:
        other.kill()
        other.communicate()
    with lock(folder):
        assert not folder.exists(), "the lock lies beside it"


def test_a_run_that_is_being_evaluated_does_not_move_aside(tmp_path: Path) -> None:
    path = prepare(config(tmp_path)).path
    (path / "eval.json").write_text('{"before": {}, "after": {"top1": 1}}')
    with claimed(path, {"seed": 0}, print):
        with pytest.raises(UserError, match="evaluation is being written by another process"):
            prepare(config(tmp_path))
        assert path.exists() and not path.with_name("seed0~1").exists()
    assert prepare(config(tmp_path)).archive == path.with_name("seed0~1")


def test_the_configuration_is_synced_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut right after a start would else leave an empty file, and such a folder is refused."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    path = prepare(config(tmp_path)).path
    assert synced == [(path / "config.yaml").stat().st_size]


def test_where_nothing_can_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        UserError,
        match=r"cannot write beside .*seed0 .*(Not a directory|File exists).*another out=",
    ):
        lock(tmp_path / "file" / "seed0")

"""A checkpoint comes back bit for bit, and whatever happens to the newest, an older one is found."""

import copy
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch

from mar.errors import UserError
from mar.learn.optim import make_optimizer
from mar.run import checkpoint


def trained(tiny_model, updates, seed=0):
    """A model and an AdamW that has made some updates."""
    model = tiny_model(dtype=torch.float32, layers=1, seed=seed)
    optimizer = make_optimizer(model, 0.01, (0.9, 0.95), 1e-8, 0.1)
    for step in range(updates):
        update(model, optimizer, step)
    return model, optimizer


def update(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def identical(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


def state(pair):
    model, optimizer = pair
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()])


def save(folder, step, pair, keep=2):
    return checkpoint.save(folder, step, *pair, keep).result()


def test_model_and_optimizer_come_back_bit_for_bit(tiny_model, tmp_path):
    pair = trained(tiny_model, 3)
    before = state(pair)
    path = save(tmp_path, 3, pair)
    assert identical(state(pair), before)  # saving changes nothing
    found = checkpoint.newest(tmp_path)
    assert (found.path, found.step) == (path, 3)
    fresh, used = trained(tiny_model, 0, seed=1), trained(tiny_model, 2, seed=2)
    for other in (fresh, used):
        assert not identical(state(other), before)
        checkpoint.restore(found, *other)
        assert identical(state(other), before)
    for other in (pair, fresh, used):
        update(*other, step=9)
    assert identical(state(fresh), state(pair)) and identical(state(used), state(pair))


def test_training_goes_on_while_a_copy_is_written(tiny_model, tmp_path, monkeypatch):
    pair, go_on, publish = trained(tiny_model, 3), threading.Event(), checkpoint._publish
    before = state(pair)
    monkeypatch.setattr(checkpoint, "_publish", lambda *args: go_on.wait(30) and publish(*args))
    write, moved = checkpoint._write, threading.Event()
    monkeypatch.setattr(checkpoint, "_write", lambda *args: moved.wait(30) and write(*args))
    behind = checkpoint.save(tmp_path, 3, *pair, 2)
    update(*pair, step=4)  # in place, before anything is written
    moved.set()
    assert not behind.done() and checkpoint.newest(tmp_path) is None
    go_on.set()
    assert behind.result() == checkpoint.newest(tmp_path).path
    resumed = trained(tiny_model, 0, seed=1)
    checkpoint.restore(checkpoint.newest(tmp_path), *resumed)
    assert identical(state(resumed), before) and not identical(state(pair), before)


def test_what_cannot_be_written_is_said_when_the_run_asks_for_it(tiny_model, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="checkpoints"):
        checkpoint.save(tmp_path / "checkpoints", 3, *trained(tiny_model, 1), 2).result()


def test_saving_before_the_first_update_changes_no_later_one(tiny_model, tmp_path):
    saved, other = trained(tiny_model, 0), trained(tiny_model, 0)
    save(tmp_path, 0, saved)
    resumed = trained(tiny_model, 0, seed=1)
    checkpoint.restore(checkpoint.newest(tmp_path), *resumed)
    for pair in (saved, other, resumed):
        update(*pair, step=0)
    assert identical(state(saved), state(other)) and identical(state(resumed), state(other))


def test_a_run_whose_updates_were_all_refused_comes_back(tiny_model, tmp_path):
    saved, resumed = trained(tiny_model, 0), trained(tiny_model, 0, seed=1)
    for parameter in saved[0].parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    save(tmp_path, 1, saved)
    checkpoint.restore(checkpoint.newest(tmp_path), *resumed)
    for pair in (saved, resumed):
        update(*pair, step=1)
    assert identical(state(resumed), state(saved))


def test_the_newest_n_are_kept(tiny_model, tmp_path):
    pair = trained(tiny_model, 1)
    assert checkpoint.newest(tmp_path / "nothing") is None
    for step in (1, 2, 10, 11):
        save(tmp_path, step, pair, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step000002", "step000010", "step000011"]
    save(tmp_path, 12, pair, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step000012"]


def damage(path, how):
    data = next(p for p in sorted(path.iterdir()) if p.suffix == ".distcp")
    if how == "truncated":
        data.write_bytes(data.read_bytes()[:-10])
    elif how == "altered":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "missing":
        data.unlink()
    elif how == "no manifest":
        (path / checkpoint.MANIFEST).unlink()
        return checkpoint.MANIFEST
    elif how == "half a manifest":
        text = (path / checkpoint.MANIFEST).read_text()
        (path / checkpoint.MANIFEST).write_text(text[: len(text) // 2])
        return checkpoint.MANIFEST
    elif how == "another manifest":
        (path / checkpoint.MANIFEST).write_text('{"files": []}')
        return checkpoint.MANIFEST
    return data.name


@pytest.mark.parametrize(
    "how", ["truncated", "altered", "missing", "no manifest", "half a manifest", "another manifest"]
)
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(how, tiny_model, tmp_path):
    pair = trained(tiny_model, 1)
    save(tmp_path, 1, pair)
    before = state(pair)
    update(*pair, step=1)
    path = save(tmp_path, 2, pair)
    name = damage(path, how)
    said = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found.step == 1 and len(said) == 1
    assert str(path / name) in said[0]
    checkpoint.restore(found, *pair)
    assert identical(state(pair), before)
    save(tmp_path, 2, pair)  # the run goes on from there and writes the damaged one anew
    assert checkpoint.newest(tmp_path) == checkpoint.Found(path, 2)


def test_with_none_left_there_is_nothing_to_resume_and_it_says_why(tiny_model, tmp_path):
    (save(tmp_path, 1, trained(tiny_model, 1)) / checkpoint.MANIFEST).unlink()
    with pytest.warns(UserWarning, match=r"step000001/manifest\.json is missing"):
        assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_passed_over_or_left_half_written_goes_after_the_next_save(
    keep, tiny_model, tmp_path
):
    pair = trained(tiny_model, 1)
    save(tmp_path, 1, pair)
    (save(tmp_path, 9, pair) / checkpoint.MANIFEST).unlink()
    (tmp_path / "step000003.tmp").mkdir()
    path = save(tmp_path, 4, pair, keep=keep)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step000001", "step000004"][-keep:]
    assert checkpoint.newest(tmp_path) == checkpoint.Found(path, 4)


def test_a_checkpoint_is_there_while_it_is_replaced(tiny_model, tmp_path, monkeypatch):
    """Of one that is saved again the old one stays until the new one has its name."""
    pair = trained(tiny_model, 1)
    save(tmp_path, 1, pair)
    original, seen = Path.rename, []

    def watched(path, target):
        original(path, target)
        if Path(target).parent == tmp_path:  # not the writer's own inside
            seen.append(checkpoint.newest(tmp_path))

    monkeypatch.setattr(Path, "rename", watched)
    path = save(tmp_path, 1, pair)
    assert [found.step for found in seen] == [1, 1] and seen[-1].path == path
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_is_found_whatever_its_name_and_other_folders_stay(tiny_model, tmp_path):
    """A crash between the two renames leaves the newest one under its other name; what somebody put there is not ours."""
    pair = trained(tiny_model, 1)
    for step in (4, 6):
        save(tmp_path, step, pair)
    (tmp_path / "step000006").rename(tmp_path / "old.step000006")
    found = checkpoint.newest(tmp_path)
    assert found is not None and (found.step, found.path.name) == (6, "old.step000006")
    (tmp_path / "step000004_best").mkdir()
    (tmp_path / "step000005.tmp").mkdir()
    save(tmp_path, 7, pair)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step000004",
        "step000004_best",
        "step000007",
    ]


def test_a_full_disk_is_an_os_error(tiny_model, tmp_path, monkeypatch):
    """What the writer of shards raises is no Exception, its text a page, and it hides the disk's own words."""
    pair = trained(tiny_model, 1)
    save(tmp_path, 1, pair)

    def full(*_):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            OSError, match=r"^cannot write .*step000002\.tmp: .Errno 28. No space left on device$"
        ):
            save(tmp_path, 2, pair)
    assert checkpoint.newest(tmp_path).step == 1


def test_room_is_asked_for_before_training(tiny_model, tmp_path, monkeypatch):
    model, _ = trained(tiny_model, 0)
    (tmp_path / "checkpoints/step000001").mkdir(parents=True)
    (tmp_path / "checkpoints/step000001/weights").write_bytes(b"12345")
    size = sum(p.numel() * 4 for p in model.parameters())
    # the last holds the trained weights of two earlier steps, too (algo.lag)
    for one, trainable, num_past in ((3 * size, True, 0), (size, False, 2), (5 * size, True, 2)):
        free = 3 * one - 5  # two are kept while the third is written, and five bytes are there
        model.requires_grad_(trainable)
        monkeypatch.setattr(
            checkpoint.shutil,
            "disk_usage",
            lambda _, free=free: shutil._ntuple_diskusage(free, 0, free),
        )
        checkpoint.require_room(tmp_path / "checkpoints", [model], keep=2, num_past=num_past)
        monkeypatch.setattr(
            checkpoint.shutil,
            "disk_usage",
            lambda _, free=free: shutil._ntuple_diskusage(free, 0, free - 1),
        )
        with pytest.raises(UserError, match="make room"):
            checkpoint.require_room(tmp_path / "checkpoints", [model], keep=2, num_past=num_past)


@pytest.mark.parametrize("moment", ["data", "manifest", "rename"])
def test_a_crash_while_saving_leaves_the_older_ones(moment, tiny_model, tmp_path, monkeypatch):
    pair = trained(tiny_model, 1)
    save(tmp_path, 1, pair, keep=1)

    owner, name = {
        "data": (checkpoint.dcp, "save"),
        "manifest": (json, "dumps"),
        "rename": (Path, "rename"),
    }[moment]
    original = getattr(owner, name)

    def crash(*args, **kwargs):
        if moment != "rename" or args[0].name == "step000002.tmp":
            raise OSError("no space left")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        with pytest.raises(OSError, match="no space left"):
            save(tmp_path, 2, pair, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step000001", "step000002.tmp"]
    assert checkpoint.newest(tmp_path) == checkpoint.Found(tmp_path / "step000001", 1)
    (tmp_path / "step000002.tmp" / "rubbish").write_text("x")
    path = save(tmp_path, 2, pair, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and not (path / "rubbish").exists()
    assert checkpoint.newest(tmp_path).step == 2

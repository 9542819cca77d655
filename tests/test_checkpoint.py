"""A checkpoint comes back bit for bit, and whatever happens to the newest, an older one is found."""

import copy
import json
from pathlib import Path

import pytest
import torch

from mar import checkpoint
from mar.optim import make_optimizer


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
    return checkpoint.save(folder, step, *pair, keep)


def test_model_and_optimizer_come_back_bit_for_bit(tiny_model, tmp_path):
    pair = trained(tiny_model, 3)
    before = state(pair)
    path = save(tmp_path, 3, pair)
    assert identical(state(pair), before)  # saving changes nothing
    found = checkpoint.newest(tmp_path)
    assert (found.path, found.step, found.broken) == (path, 3, ())
    fresh, used = trained(tiny_model, 0, seed=1), trained(tiny_model, 2, seed=2)
    for other in (fresh, used):
        assert not identical(state(other), before)
        checkpoint.restore(found, *other)
        assert identical(state(other), before)
    for other in (pair, fresh, used):
        update(*other, step=9)
    assert identical(state(fresh), state(pair)) and identical(state(used), state(pair))


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


@pytest.mark.parametrize("how", ["truncated", "altered", "missing", "no manifest", "half a manifest", "another manifest"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(how, tiny_model, tmp_path):
    pair = trained(tiny_model, 1)
    save(tmp_path, 1, pair)
    before = state(pair)
    update(*pair, step=1)
    path = save(tmp_path, 2, pair)
    name = damage(path, how)
    found = checkpoint.newest(tmp_path)
    assert found.step == 1 and len(found.broken) == 1
    assert str(path / name) in found.broken[0]
    checkpoint.restore(found, *pair)
    assert identical(state(pair), before)
    save(tmp_path, 2, pair)  # the run goes on from there and writes the damaged one anew
    assert checkpoint.newest(tmp_path) == checkpoint.Found(path, 2)


def test_with_none_left_there_is_nothing_to_resume(tiny_model, tmp_path):
    (save(tmp_path, 1, trained(tiny_model, 1)) / checkpoint.MANIFEST).unlink()
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("moment", ["data", "manifest", "rename"])
def test_a_crash_while_saving_leaves_the_older_ones(moment, tiny_model, tmp_path, monkeypatch):
    pair = trained(tiny_model, 1)
    save(tmp_path, 1, pair, keep=1)

    owner, name = {"data": (checkpoint.dcp, "save"), "manifest": (json, "dumps"), "rename": (Path, "rename")}[moment]
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

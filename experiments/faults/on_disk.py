"""Faults of files and disks: a save killed at every call, damaged and missing files, full and
read-only disks, two runs in one folder.
"""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from experiments.faults import kill_points
from experiments.faults.runs import (
    EVERY,
    Lab,
    Row,
    at_call,
    begin,
    run_dir,
    same,
    signal_itself,
    state,
    steps_saved,
    steps_written,
    train,
    until,
)
from mar.learn import batch
from mar.learn.optim import make_optimizer
from mar.policy.model import Decoder, ModelConfig
from mar.run import checkpoint
from mar.run import folder as rundir

SMALL = ModelConfig(
    "Qwen3ForCausalLM",
    64,
    16,
    24,
    1,
    2,
    num_kv_heads=1,
    head_dim=8,
    qk_norm=True,
    tied_embeddings=True,
)
NEW, AGAIN, MEND = "a new step", "the same step again", "a step whose checkpoint is damaged"


def _trained(seed: int) -> checkpoint.Trained:
    torch.manual_seed(seed)
    model = Decoder(SMALL)
    optimizer = make_optimizer(model, 0.01, (0.9, 0.95), 1e-8, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def _power_cut(calls: list[kill_points.Call], folder: Path) -> None:
    """What a disk may have forgotten: renames in a folder that was not synced, and what was written
    to files that were not.
    """
    for path in kill_points.unsynced(calls):
        if os.path.isfile(path):
            os.truncate(path, 0)
    synced = max(
        (i for i, call in enumerate(calls) if (call.name, call.path) == ("fsync", str(folder))),
        default=-1,
    )
    for call in reversed(calls[synced + 1 :]):
        if (
            call.name in kill_points.RENAMES
            and Path(call.path).parent == folder
            and os.path.exists(call.target)
        ):
            os.rename(call.target, call.path)


def save_killed(lab: Lab, row: Row) -> None:
    """For every n, a save killed when it is about to make its n-th call that changes files; then
    also as after a power cut.
    """
    old, new = _trained(0), _trained(1)
    known = [
        state(checkpoint.save(lab.folder / "known", step, *pair, 9).result())
        for step, pair in ((2, old), (4, new))
    ]
    counts: list[str] = []
    whole: dict[str, bool] = {}
    for variant, step in ((NEW, 4), (AGAIN, 2), (MEND, 4)):
        template, folder = lab.folder / variant.replace(" ", "_"), lab.folder / "killed"
        checkpoint.save(template, 2, *old, 1).result()
        if variant == MEND:
            (checkpoint.save(template, 4, *new, 2).result() / checkpoint.MANIFEST).unlink()
        shutil.copytree(template, folder)
        target = folder / f"step{step:06d}"

        def work(folder: Path = folder, step: int = step) -> object:
            return checkpoint.save(folder, step, *new, 1).result()

        calls, code = kill_points.run(work, folder)
        row.check(code == 0, f"{variant}: the traced save ends with {code}")
        for fault in kill_points.disorder(calls, target.with_suffix(".tmp"), target):
            row.check(False, f"{variant}: {fault}")
        for n in range(len(calls)):
            shutil.rmtree(folder)
            shutil.copytree(template, folder)
            made, code = kill_points.run(work, folder, kill_at=n)
            row.check(code == -signal.SIGKILL, f"{variant}, call {n}: not killed but {code}")
            for cut in (False, True):
                if cut:
                    _power_cut(made[:-1], folder)
                found = checkpoint.newest(folder, lambda _: None)
                content = (
                    (found.path / checkpoint.MANIFEST).read_text() if found else ""
                )  # a valid checkpoint is as its manifest says
                if found and content not in whole:
                    whole[content] = any(same(state(found.path), one) for one in known)
                row.check(
                    whole.get(content, False),
                    f"{variant}, before call {n} ({made[-1]}){', power cut' * cut}: no checkpoint is whole",
                )
        shutil.rmtree(folder)
        counts.append(f"{len(calls)} for {variant}")
    row.exit, row.steps_lost = -signal.SIGKILL, EVERY
    row.said = f"calls: {', '.join(counts)}; every fsync before the rename"


def _stopped_after(lab: Lab, step: int) -> Path:
    """A run that was killed in the step after this one."""
    out = lab.folder / "run"
    ended = train(out, fault=at_call(batch, "make_batch", step + 1, signal_itself(signal.SIGKILL)))
    if ended.code != -signal.SIGKILL:
        raise RuntimeError(f"the run was to be killed and ended with {ended.code}")
    return out


def _damaged(lab: Lab, row: Row, damage: str, step: int) -> None:
    """The newest checkpoint (of step 4) is damaged, that of step 2 is not."""
    out = _stopped_after(lab, step)
    folder = run_dir(out) / "checkpoints" / "step000004"
    shard = next(folder.glob("*.distcp"))
    if damage == "bit":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    else:
        (folder / checkpoint.MANIFEST).unlink()
    row.check(steps_saved(out) == 2, f"resumes from {steps_saved(out)}")
    ended = row.goes_on(lab.whole(), out)
    row.exit, row.said = ended.code, ended.said("passed over a checkpoint")
    row.check(str(folder) in row.said, "it does not name the file")


def corrupted_shard(lab: Lab, row: Row) -> None:
    """One bit of the newest checkpoint's shard is flipped after a kill -9 right behind the save of
    step 4.
    """
    _damaged(lab, row, "bit", 4)


def missing_manifest(lab: Lab, row: Row) -> None:
    """The newest checkpoint's manifest is removed (there is no pointer to a latest one that could
    be).
    """
    _damaged(lab, row, "manifest", 4)


def no_valid_checkpoint(lab: Lab, row: Row) -> None:
    """kill -9 in step 3, and the manifest of the only checkpoint is removed: the run begins anew
    and says why.
    """
    out = _stopped_after(lab, 2)
    (run_dir(out) / "checkpoints" / "step000002" / checkpoint.MANIFEST).unlink()
    row.steps_lost = steps_written(out)
    ended = train(out)
    row.struck(ended, 0, "passed over a checkpoint")
    row.compare(lab.whole(), out)


def truncated_line(lab: Lab, row: Row) -> None:
    """kill -9 in step 4, and the last lines of metrics.jsonl and completions.jsonl are cut in the
    middle.
    """
    out = _stopped_after(lab, 3)
    for name in ("metrics.jsonl", "completions.jsonl"):
        file = run_dir(out) / name
        os.truncate(file, file.stat().st_size - 40)
    row.exit, row.said = -signal.SIGKILL, ""
    row.goes_on(lab.whole(), out)
    row.steps_lost = 1  # the third step's line is the cut one


def half_written_folder(lab: Lab, row: Row) -> None:
    """Half a shard in a temporary folder, as a save leaves it that was killed, and one of a step
    that is not saved again.
    """
    out = _stopped_after(lab, 3)
    folder = run_dir(out) / "checkpoints"
    content = next((folder / "step000002").glob("*.distcp")).read_bytes()
    for name in ("step000004.tmp", "step000003.tmp"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_bytes(content[: len(content) // 2])
    row.exit = -signal.SIGKILL
    row.goes_on(lab.whole(), out)
    row.check(not list(folder.glob("*.tmp")), "temporary folders stay for ever")


def two_runs(lab: Lab, row: Row) -> None:
    """The same command while the first one is in step 3 (stopped there, so that both are alive)."""
    out = lab.folder / "run"
    first = begin(out, [], at_call(batch, "make_batch", 3, signal_itself(signal.SIGSTOP)))
    until(lambda: steps_written(out) == 2, "step 2")
    row.struck(train(out), 2, "is being written by another process")
    os.kill(first.pid, signal.SIGCONT)
    row.check(first.wait().code == 0, "the first run does not end well")
    row.steps_lost = 0
    row.compare(lab.whole(), out)


def two_starts(lab: Lab, row: Row) -> None:
    """The same command twice at once: the second waits before the lock while the first is killed in
    step 4, then goes on.
    """
    out = lab.folder / "run"
    second = begin(out, [], at_call(rundir, "lock", 1, signal_itself(signal.SIGSTOP)))
    until(
        lambda: Path(f"/proc/{second.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T",
        "the second run's start",
    )
    _stopped_after(lab, 3)
    row.steps_lost = steps_written(out) - steps_saved(out)
    os.kill(second.pid, signal.SIGCONT)
    row.struck(second.wait(), 0, "resuming after step 2")
    row.compare(lab.whole(), out)


def file_size_limit(lab: Lab, row: Row) -> None:
    """RLIMIT_FSIZE of 4 MB: the checkpoint (11.5 MB) cannot be written, everything else can."""
    out = lab.folder / "run"
    limit = 4 << 20
    ended = train(out, fault=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    row.struck(ended, 2, "^error: .*File too large")
    row.goes_on(lab.whole(), out)


def _without_privileges() -> None:
    """Drop the capabilities by which root writes where it may not."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def read_only_at_start(lab: Lab, row: Row) -> None:
    """The folder of all runs may not be written."""
    parent = lab.folder / "runs"
    parent.mkdir()
    parent.chmod(0o555)
    ended = train(parent / "run", fault=_without_privileges)
    parent.chmod(0o755)
    row.struck(ended, 2, "^error: .*Permission denied")
    row.check(
        "step 1/" not in ended.out and "eval before" not in ended.out, "it trains before it says so"
    )
    row.goes_on(lab.whole(), parent / "run")


def read_only_in_mid_run(lab: Lab, row: Row) -> None:
    """The folder of checkpoints may no longer be written from step 3 on."""
    out = lab.folder / "run"
    folder = run_dir(out) / "checkpoints"

    def fault() -> None:
        _without_privileges()
        at_call(batch, "make_batch", 3, lambda: folder.chmod(0o555))()

    ended = train(out, fault=fault)
    folder.chmod(0o755)
    row.struck(ended, 2, "^error: .*Permission denied")
    row.goes_on(lab.whole(), out)


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def disk_full_at_a_save(lab: Lab, row: Row) -> None:
    """A tmpfs of 60 MB: the third checkpoint has no room beside the two that are kept.

    Then it grows.
    """
    disk = lab.folder / "disk"
    with _mounted(disk, "size=30m"):
        row.struck(train(disk / "run"), 2, "^error: .*No space left")
        _remount(disk, "size=100m")
        row.goes_on(lab.whole(), disk / "run")


def disk_full_at_a_line(lab: Lab, row: Row) -> None:
    """A tmpfs of 60 MB that something else fills up in step 3: metrics.jsonl cannot grow.

    Then that is removed.
    """
    disk = lab.folder / "disk"

    def fill() -> None:
        with (disk / "filler").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(1 << 12))
                except OSError:
                    return

    with _mounted(disk, "size=60m"):
        row.struck(
            train(disk / "run", fault=at_call(batch, "make_batch", 3, fill)),
            2,
            "^error: .*No space left",
        )
        (disk / "filler").unlink()
        row.goes_on(lab.whole(), disk / "run")


def _refused_at_start(lab: Lab, row: Row, mount: str, says: str, mended: str) -> None:
    """What the disk cannot take is said before the first evaluation, and with another mount the
    same command runs.
    """
    disk = lab.folder / "disk"
    with _mounted(disk, mount):
        ended = train(disk / "run")
        row.struck(ended, 2, f"^error: .*{says}")
        row.check("eval before" not in ended.out, "it begins before it says so")
        _remount(disk, mended)
        row.goes_on(lab.whole(), disk / "run")


def disk_full_at_start(lab: Lab, row: Row) -> None:
    """A tmpfs of 8 MB: no checkpoint has room in it, which is said before training."""
    _refused_at_start(lab, row, "size=8m", "room", "size=100m")


def read_only_mount(lab: Lab, row: Row) -> None:
    """A tmpfs mounted read-only."""
    _refused_at_start(lab, row, "ro", "Read-only file system", "rw,size=100m")


CASES = (
    corrupted_shard,
    missing_manifest,
    no_valid_checkpoint,
    truncated_line,
    half_written_folder,
    two_runs,
    two_starts,
    file_size_limit,
    read_only_at_start,
    read_only_in_mid_run,
    save_killed,
)
MOUNTED = (disk_full_at_a_save, disk_full_at_a_line, disk_full_at_start, read_only_mount)

"""Faults of processes, numbers, data and services: kills and signals, NaN and infinity, a poisoned
row, a silent hub, wandb down, a dead rank.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from experiments.faults import kill_points
from experiments.faults.runs import (
    STEPS,
    WORDS,
    Ended,
    Lab,
    Row,
    at_call,
    before_call,
    differences,
    run_dir,
    signal_itself,
    state,
    steps_saved,
    steps_written,
    train,
    until,
)
from mar.files import read_jsonl
from mar.learn import batch, update
from mar.run import checkpoint
from mar.run import wandb_mirror as mirror
from mar.verify import sandbox

PPO = (
    "algo=ppo",
    "algo.epochs=2",
    "algo.minibatches=2",
    "algo.critic_warmup=1",
    "algo.critic_lr=1e-3",
)
ROOT = Path(__file__).resolve().parents[2]


def _killed_in(lab: Lab, row: Row, words: Sequence[str], fault: Any) -> None:
    out = lab.folder / "run"
    ended = train(out, words, fault)
    row.exit = ended.code
    row.check(ended.code == -signal.SIGKILL, f"not killed but {ended.code}: {ended.last}")
    row.goes_on(lab.whole(words), out, words)


def kill_in_mid_step(lab: Lab, row: Row) -> None:
    """kill -9 between sampling and the update of step 4."""
    _killed_in(lab, row, (), at_call(batch, "make_batch", 4, signal_itself(signal.SIGKILL)))


def kill_between_minibatches(lab: Lab, row: Row) -> None:
    """PPO, 2 epochs x 2 minibatches: kill -9 when half of the updates of step 4 are done."""
    updates_before = (
        3 * 4 * 2 - 4 + 5
    )  # critic and policy apply one each, four times a step; the policy not in step 1 (critic_warmup)
    _killed_in(
        lab,
        row,
        PPO,
        at_call(update, "_clip_and_step", updates_before, signal_itself(signal.SIGKILL)),
    )


def _killed_in_every_step(lab: Lab, row: Row, words: Sequence[str]) -> None:
    out, every = lab.folder / "run", (*words, "checkpoint.every=1")
    for step in range(1, STEPS):

        def once_saved(step: int = step) -> None:  # a thread writes it beside the next step
            until(lambda: steps_saved(out) == step, f"checkpoint of step {step}")
            os.kill(os.getpid(), signal.SIGKILL)

        ended = train(out, every, at_call(batch, "make_batch", 2, once_saved))
        row.check(
            ended.code == -signal.SIGKILL, f"step {step}: not killed but {ended.code}: {ended.last}"
        )
        row.check(
            (steps_written(out), steps_saved(out)) == (step, step),
            f"step {step}: not written or saved",
        )
        row.exit = ended.code
    row.goes_on(lab.whole(words), out, every)


def resumed_from_every_step(lab: Lab, row: Row) -> None:
    """checkpoint.every=1, and kill -9 in the second step of every process, once the first is saved:
    resumed from each step in turn.
    """
    _killed_in_every_step(lab, row, ())


def resumed_from_every_step_ppo(lab: Lab, row: Row) -> None:
    """The same with PPO: 2 epochs x 2 minibatches, a critic and a reference."""
    _killed_in_every_step(lab, row, PPO)


def power_cut(lab: Lab, row: Row) -> None:
    """kill -9 in step 4 of a traced run; then every file whose last write no fsync followed is
    emptied, as a power cut may leave it.
    """
    out = lab.folder / "run"
    fault = at_call(batch, "make_batch", 4, signal_itself(signal.SIGKILL))
    calls, row.exit = kill_points.run(lambda: _in_this_process(out, fault), run_dir(out).parent)
    row.check(row.exit == -signal.SIGKILL, f"not killed but {row.exit}")
    lost = [
        path
        for path in kill_points.unsynced(calls)
        if os.path.isfile(path) and not path.endswith(".lock")
    ]
    for path in lost:
        os.truncate(path, 0)
    row.said = f"{len(calls)} calls; without an fsync: {', '.join(Path(path).name for path in lost) or 'none'}"
    row.check(not lost, row.said)
    row.goes_on(lab.whole(), out)


def _in_this_process(out: Path, fault: Any) -> None:
    from mar.run.compose import compose
    from mar.train import run

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    fault()
    run(compose([*WORDS, f"out={out}"]))


def _signalled(lab: Lab, row: Row, step: int, kinds: Sequence[signal.Signals], saved: int) -> None:
    out = lab.folder / "run"
    ended = train(out, fault=at_call(batch, "make_batch", step, signal_itself(*kinds)))
    row.struck(ended, 130, f"checkpoint of step {saved} in")
    row.check(steps_saved(out) == saved, f"saved is step {steps_saved(out)}")
    row.goes_on(lab.whole(), out)


def sigterm(lab: Lab, row: Row) -> None:
    """SIGTERM in step 3: the step is finished and saved."""
    _signalled(lab, row, 3, (signal.SIGTERM,), 3)


def sigint_twice(lab: Lab, row: Row) -> None:
    """Ctrl-C twice in step 4: it stops at once, back to step 2."""
    _signalled(lab, row, 4, (signal.SIGINT, signal.SIGINT), 2)


def nan_gradient(lab: Lab, row: Row) -> None:
    """One gradient of step 3 becomes NaN: that update is left out, everything else happens."""
    out = lab.folder / "run"

    def poison(model: torch.nn.Module, *_: Any) -> None:
        next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = math.nan

    _left_out(lab, row, out, train(out, fault=before_call(update, "_clip_and_step", 3, poison)))


def infinite_reward(lab: Lab, row: Row) -> None:
    """One completion of step 3 earns infinity: that update is left out, everything else happens."""
    out = lab.folder / "run"

    def poison(groups: Any, *_: Any) -> None:
        groups[0][0].components[0] = math.inf

    _left_out(lab, row, out, train(out, fault=before_call(batch, "make_batch", 3, poison)))


def _left_out(lab: Lab, row: Row, out: Path, ended: Ended) -> None:
    row.struck(ended, 0, "step 3: a loss or gradient is not finite")
    rows, clean = ([*read_jsonl(run_dir(o) / "metrics.jsonl")[0]] for o in (out, lab.whole()))
    row.check(
        [r["optim/skipped"] for r in rows] == [0, 0, 1] + [0] * (STEPS - 3),
        "other updates were left out",
    )
    sampled = [r["sampler/decode_steps"] for r in clean[:3]]
    row.check(
        [r["sampler/decode_steps"] for r in rows[:3]] == sampled,
        "the steps before differ from those of a run without the fault",
    )
    row.check((run_dir(out) / "skipped.jsonl").exists(), "no skipped.jsonl")
    found = checkpoint.newest(run_dir(out) / "checkpoints")
    values = (
        [v for v in state(found.path)["model"].values() if isinstance(v, torch.Tensor)]
        if found
        else []
    )
    row.check(
        bool(values) and all(bool(v.isfinite().all()) for v in values), "a parameter is not finite"
    )


def poisoned_row(lab: Lab, row: Row) -> None:
    """A data file whose 7th line has a gold that is a number; then that line is mended."""
    file, out = lab.folder / "rows.jsonl", lab.folder / "run"
    rows: list[dict[str, Any]] = [
        {"question": f"Name a number below {n}.", "golds": [str(n - 1), str(n - 2)]}
        for n in range(3, 60)
    ]
    words = ("data=jsonl", "model=embedded", f"data.path={file}", "train.steps=2")
    good = [json.dumps(r) for r in rows]
    file.write_text("\n".join([*good[:6], json.dumps(rows[6] | {"golds": [5]}), *good[7:]]))
    row.struck(train(out, words), 2, r"^error: .*rows\.jsonl:7: 5 is no gold")
    row.check(not out.exists(), "it leaves a folder")
    file.write_text("\n".join(good))
    ended = train(out, words)
    row.check(ended.code == 0, f"with the line mended it ends with {ended.code}: {ended.last}")


@contextmanager
def _silent_server() -> Iterator[int]:
    """A server on the loopback that takes connections and never answers; gives its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        yield server.getsockname()[1]


def silent_hub(lab: Lab, row: Row) -> None:
    """The hub takes the connection and never answers (its own client's time limit set to 1 s)."""
    with _silent_server() as port:
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "MAR_CACHE": str(lab.folder / "cache"),
            "HF_HOME": str(lab.folder / "hf"),
        }
        environment |= {
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "0",
        }
        words = ("model=hf", "model.source=hub", "model.path=owner/name")
        row.struck(
            _apart([], lab.folder / "run", words, environment, patience=60),
            2,
            "^error: cannot fetch owner/name from the hub",
        )
    row.check(not (lab.folder / "run").exists(), "it leaves a folder")


def _command(launcher: Sequence[str], out: Path, words: Sequence[str]) -> list[str]:
    return [sys.executable, *launcher, "-m", "mar.train", *WORDS, *words, f"out={out}"]


def _apart(
    launcher: Sequence[str],
    out: Path,
    words: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    patience: float = 240,
) -> Ended:
    """A run that needs an environment of its own, in a new interpreter."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    done = subprocess.run(
        _command(launcher, out, words),
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def wandb_down(lab: Lab, row: Row) -> None:
    """wandb's server takes connections and never answers (the patience of mar/run/wandb_mirror.py
    set to 3 s).
    """
    out = lab.folder / "run"
    with _silent_server() as port:

        def fault() -> None:
            mirror.PATIENCE_S = 3.0
            os.environ |= {
                "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
                "WANDB_API_KEY": "0" * 40,
                "WANDB_DIR": str(lab.folder),
            }

        row.struck(train(out, ("logger.wandb=online",), fault), 0, "wandb is off from here on")
    row.compare(lab.whole(), out)


def children() -> set[int]:
    """The processes that this one has started and not yet waited for."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def worker_killed(lab: Lab, row: Row) -> None:
    """The process that runs a model-written program is killed before it has begun: the answer is
    left out, not paid 0, and the next is judged.
    """
    original, before = subprocess.Popen, children()

    def killed(*args: Any, **options: Any) -> Any:
        child = original(*args, **options)
        child.kill()
        return child

    unsafe, row.said = _sandbox()
    with mock.patch.object(sandbox.subprocess, "Popen", killed):
        reply = sandbox.run_program("x = 1", ["x"], unsafe=unsafe)
    row.check(reply.outcome == "infrastructure_error", f"outcome {reply.outcome}")
    row.said = f"{row.said}: {reply.outcome}"
    row.check(
        sandbox.run_program("x = 1", ["x"], unsafe=unsafe).values == (1,),
        "the next program is not judged",
    )
    row.check(children() == before, "a process is left over")


def _sandbox() -> tuple[bool, str]:
    import shutil

    return (
        (False, "in bubblewrap")
        if shutil.which("bwrap")
        else (True, "no bubblewrap here, so unsafe")
    )


def worker_hung(lab: Lab, row: Row) -> None:
    """A model-written program that never ends and starts others (time limit set to 1 s)."""
    unsafe, words = _sandbox()
    before, began = children(), time.monotonic()
    reply = sandbox.run_program(
        "import time\nwhile True: time.sleep(1)", ["x"], unsafe=unsafe, wall_s=1.0
    )
    took = time.monotonic() - began
    row.said = f"{words}: {reply.outcome}"
    row.check(
        reply.outcome == "timeout" and took < 5, f"outcome {reply.outcome} after {took:.1f} s"
    )
    row.check(
        sandbox.run_program("x = 1", ["x"], unsafe=unsafe).values == (1,),
        "the next program is not judged",
    )
    row.check(children() == before, "a process is left over")


def rank_killed(lab: Lab, row: Row) -> None:
    """kill -9 of rank 1 of two (torchrun, gloo) once step 3 is written; then both again.

    In float64, where ranks equal one process.
    """
    launcher, words = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        ("scale.dtype=float64",),
    )
    out, variables = lab.folder / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as said:
        pair = subprocess.Popen(
            _command(launcher, out, words),
            cwd=ROOT,
            env=variables,
            stdout=said,
            stderr=said,
            text=True,
        )
        until(lambda: steps_written(out) >= 3 or pair.poll() is not None, "step 3 of two ranks")
        for pid in Path(f"/proc/{pair.pid}/task/{pair.pid}/children").read_text().split():
            if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
        row.exit = pair.wait(120)
        said.seek(0)
        line = next((line for line in said if "Signal 9" in line or "exitcode: -9" in line), "")
    row.said = (
        line.rpartition("] ")[2].partition(" of binary")[0].strip()
    )  # without torchrun's prefix
    row.check(row.exit != 0 and bool(row.said), f"it ends with {row.exit}: {row.said}")
    row.steps_lost = steps_written(out) - steps_saved(out)
    ended = _apart(launcher, out, words)
    row.check(
        ended.code == 0 and "resuming after step" in ended.out,
        f"the pair again ends with {ended.code}: {ended.last}",
    )
    whole = lab.folder / "whole"
    row.check(_apart(launcher, whole, words).code == 0, "two ranks without a fault do not end well")
    found = differences(whole, out) if not row.problems else ["it did not go on"]
    row.equal = not found
    row.check(not found, f"differs from the uninterrupted run in {', '.join(found)}")


CASES = (
    kill_in_mid_step,
    power_cut,
    sigterm,
    sigint_twice,
    nan_gradient,
    infinite_reward,
    poisoned_row,
    silent_hub,
    wandb_down,
    worker_killed,
    worker_hung,
    kill_between_minibatches,
    resumed_from_every_step,
    resumed_from_every_step_ppo,
    rank_killed,
)

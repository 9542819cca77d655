"""experiments/launch/train.sbatch between a cluster that is played and a torchrun that is: what
reaches whom, and when the job is queued again.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments/launch/train.sbatch"
STUBS = {
    # as srun: a TERM kills the step, nothing is passed on
    "srun": 'shift\n"$@" &\nchild=$!\ntrap "kill -KILL $child" TERM\nwait $child',
    "scancel": '[ "$*" = "--signal=TERM 7" ] && kill -TERM $(cat running)',
    "scontrol": 'echo "scontrol $*" >> said\n[ "$1" = requeue ] || echo node1',
    # as torchrun: it passes TERM on, waits for its workers and fails, or they had just finished
    "torchrun": """echo "torchrun $*" >> said
trap 'sleep 0.3; echo saved >> said; [ "${@: -1}" = ending ]; exit $?' TERM
[ "${@: -1}" = broken ] && exit 1
echo $$ > running.new && mv running.new running
for _ in $(seq 200); do case "${@: -1}" in long|ending) sleep 0.05;; esac; done""",
}


@pytest.mark.parametrize(
    "word, code, requeued",
    [("long", 1, True), ("ending", 0, False), ("broken", 1, False), ("short", 0, False)],
)
def test_a_job_is_queued_again_when_its_time_is_up_and_not_when_it_fails(
    tmp_path, word, code, requeued
):
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "x",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
    }
    process = subprocess.Popen(
        ["bash", SCRIPT, "scale=h100x8", word], cwd=tmp_path, env=environment
    )
    if word in ("long", "ending"):
        for _ in range(200):
            if (tmp_path / "running").exists():
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
    assert process.wait(20) == code
    said = (tmp_path / "said").read_text().splitlines()
    (command,) = (line for line in said if line.startswith("torchrun"))
    assert (
        command.endswith(f"--shutdown-timeout 540 -m mar.train scale=h100x8 {word}")
        and "--rdzv-endpoint node1:29500" in command
    )
    assert (
        said[-2:] == ["saved", "scontrol requeue 7"]
        if requeued
        else "scontrol requeue 7" not in said
    )

"""What the benchmarks share: alternating runs, and a line per case in results/*.csv under the same
head.
"""

import csv
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
import transformers

HEAD = "date commit machine cores threads torch transformers case".split()


def quiet_machine() -> None:
    """Say so where other processes are busy: the times are then worth less."""
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"the load average is {load:.1f}: other processes are busy, and times will be noisy")


def idle_cores() -> int:
    """How many cores nothing else used during the last second, at least 1. All where /proc/stat is
    missing.

    Threads of PyTorch wait for each other: with one more than there are idle cores, each of them
    waits for the other processes too, and a step takes ten times as long.
    """
    stat = Path("/proc/stat")
    num_cores = os.cpu_count() or 1
    if not stat.exists():
        return num_cores

    def spent() -> list[int]:
        """Ticks of all cores: user, nice, system, idle, waiting for a disk, and others."""
        return [int(ticks) for ticks in stat.read_text().splitlines()[0].split()[1:9]]

    before = spent()
    time.sleep(1)
    ticks = [now - then for now, then in zip(spent(), before, strict=True)]
    idle = (ticks[3] + ticks[4]) / max(sum(ticks), 1)
    return max(round(idle * num_cores), 1)


def alternate(
    runs: int, sides: Mapping[str, Callable[[int], float]], limit_s: float = math.inf
) -> dict[str, list[float]]:
    """Call each side in turn, `runs` times, with the number of the run; what they return (units of
    work) per second. Warm them up before.

    After `limit_s` seconds no further run begins; each side has at least one.
    """
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    started = time.perf_counter()
    for run in range(runs):
        if run and time.perf_counter() - started > limit_s:
            break
        for name, side in sides.items():
            began = time.perf_counter()
            done = side(run)
            speeds[name].append(done / (time.perf_counter() - began))
    return speeds


def seconds(work: Callable[[], object], runs: int) -> float:
    """Median of `runs` calls."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def resident_bytes(key: str) -> int:
    """Of this process: VmRSS is now, VmHWM the peak. Linux."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """VmHWM starts again from now."""
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """By how much resident memory rose at its highest inside; in the list after the end."""
    reset_peak()
    before, peak = resident_bytes("VmRSS"), [0]
    yield peak
    peak[0] = resident_bytes("VmHWM") - before


def record(
    file: Path,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[float]],
    threads: Mapping[str, int] | None = None,
) -> None:
    """Append one line per case. `threads` of each case, where it is not this moment's."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=file.parents[1]
    ).stdout.strip()
    file.parent.mkdir(exist_ok=True)
    fresh = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.writer(out)
        if fresh:
            writer.writerow([*HEAD, *columns])
        where = [date.today(), commit, platform.machine(), os.cpu_count()]
        for case, values in rows.items():
            of_case = (threads or {}).get(case, torch.get_num_threads())
            writer.writerow(
                [
                    *where,
                    of_case,
                    torch.__version__,
                    transformers.__version__,
                    case,
                    *(f"{v:.4g}" for v in values),
                ]
            )

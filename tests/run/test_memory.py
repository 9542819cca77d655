"""Memory that a CPU run frees is used again."""

import subprocess
import sys

import pytest

CODE = """if 1:
    import resource
    import torch
    from mar.run.memory import keep_freed_memory

    {first}

    def step():
        for megabytes in (40, 60, 36):
            torch.ones(megabytes << 18)

    def num_mapped():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    for _ in range(3):
        step()
    before = num_mapped()
    for _ in range(3):
        step()
    print(num_mapped() - before)
"""


def pages_mapped(first: str) -> int:
    """Pages that the system maps in three steps, each of three blocks that are soon freed."""
    command = [sys.executable, "-c", CODE.format(first=first)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is asked")
def test_blocks_that_were_freed_are_not_mapped_again():
    assert pages_mapped("keep_freed_memory()") < pages_mapped("pass") / 10

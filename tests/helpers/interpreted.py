"""Tests of Triton kernels: interpreted in a child process on a CPU, compiled on a CUDA device by
`make gpu`.

TRITON_INTERPRET counts when triton is first imported, and no other test may see it: hence the
child. There torch.empty is filled with NaN, so that whatever a kernel forgets to write shows.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context

import pytest
import torch

on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def start_child() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.use_deterministic_algorithms(True)


@functools.cache
def child() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), start_child)


def run_check(module: str, name: str, case: dict) -> None:
    getattr(import_module(module), name).__wrapped__("cpu", **case)


def on_triton(check: Callable[..., None]) -> Callable[..., None]:
    """The test that runs `check(device, ...)` where triton can."""

    @on_devices
    @functools.wraps(check)
    def test(device: str, **case: object) -> None:
        if device == "cpu":
            return child().submit(run_check, check.__module__, check.__name__, case).result()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            check(device, **case)
        finally:
            torch.use_deterministic_algorithms(False)

    return test

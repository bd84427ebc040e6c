"""A plugin of pytest for processes in which Triton interprets its kernels on the CPU (TRITON_INTERPRET=1, from before
Triton is imported): tests that run on each compute backend of the CPU run on this one too, in place of plain torch."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from triton.runtime.interpreter import GridExecutor

from elasticmoe.common.layout import COMPUTES
from elasticmoe.services.worker.backends.accelerator.triton_kernels.products import product_kernel


def pytest_configure() -> None:
    """Before any test module reads which backends there are."""
    if type(product_kernel).__name__ != "InterpretedFunction":
        raise pytest.UsageError("start this process with TRITON_INTERPRET=1")
    COMPUTES["host"] = ("host", "triton")
    _run_one_at_a_time()


def _run_one_at_a_time() -> None:
    """The interpreter keeps the program that runs in one place for all threads; tests have a thread for each rank."""
    lock, launch = threading.Lock(), GridExecutor.__call__

    def launch_alone(*args: Any, **options: Any) -> Any:
        with lock:
            return launch(*args, **options)

    GridExecutor.__call__ = launch_alone

"""The kernels in Triton, in its interpreter on the CPU: in processes of their own, since Triton decides when it is
imported what becomes of kernels. The tests are those that every compute backend has to pass (tests/interpreter)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
OPERATIONS, ATTENTION = "tests/unit/test_backends.py", "tests/unit/test_backends_attention.py"
MODELS, ORACLE = "tests/unit/test_model_parity.py", "tests/unit/test_oracle_model.py"
REPLICAS = "tests/unit/test_tensor_parallel.py"
# The interpreter is slow: each operation once, and each kind of attention.
_COMPANY = "triton and company and bfloat16 and (linear or experts and not shared or rms_norm or make2)"
_CHUNKS = "triton and (grouped-bfloat16 or odd-float32 or whole or checked)"
FEW = {
    "kernels": ("tests/interpreter", "-m", "not slow"),
    "operations": (OPERATIONS, "-k", f"agree and bfloat16 or summed or {_COMPANY}"),
    "attention": (ATTENTION, "-k", f"{_CHUNKS} or agree and float32 and (partial or interleaved or norms)"),
}
ALL = {
    "graphs": ("tests/interpreter/test_graphs.py", "-m", "slow"),
    "operations": (OPERATIONS, "-k", "triton or agree or draws or summed"),
    "attention": (ATTENTION, "-k", "triton or agree"),
    "models": (MODELS, "-m", "not slow", "-k", "triton or agree"),
    "replicas": (REPLICAS, "-k", "triton"),
    "oracle": (ORACLE, "-k", "triton"),
    "sampling": ("tests/unit/test_sampler.py", "tests/unit/test_sampling_extremes.py", "-k", "triton"),
}


def run_interpreted(*arguments: str, num_processes: int = 0) -> None:
    """Run tests with Triton's interpreter, in so many processes (0: in one). Fails with what they have said, and where
    none was found."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(num_processes), "-p", "no:cacheprovider"]
    command += ["-p", "tests.interpreter.plugin", "--timeout", "600", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", ["operations", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kernels", "attention"))]
)
def test_some_of_each_kind(name: str) -> None:
    run_interpreted(*FEW[name])


@pytest.mark.accel
@pytest.mark.timeout(2_400)
@pytest.mark.parametrize("name", ALL)
def test_all(name: str) -> None:
    run_interpreted(*ALL[name], num_processes=os.cpu_count() or 1)  # nothing else runs beside: for an hour on one core

"""The vendors' own declarations, which stand-in drivers are compiled against: fetched from the package registry into
build/vendor, a wheel taken apart and never installed. Nothing of theirs is in this repository. Who may not write to the
checkout uses what is there, and has a folder in the home for the rest."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build"
FETCH_S = 120.0
OWN = Path("~/.cache/elasticmoe-tests")  # the home is another one in some tests


class Headers(NamedTuple):
    """Where a vendor's declarations come from: `requirement`, of which the members under `prefix`, or under one of
    several, are taken into a folder of `name`."""

    requirement: str
    prefix: str | tuple[str, ...]
    includes: tuple[str, ...]
    name: str = ""


ASCEND = Headers(
    "torch-npu==2.13.0",
    "torch_npu/include/third_party/acl/inc/",
    ("torch_npu/include/third_party/acl/inc", "torch_npu/include/third_party/acl/inc/acl"),
)
OPERATORS_FILE = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
OPERATORS = tuple(
    Headers(f"torch-npu=={version}", OPERATORS_FILE, (OPERATORS_FILE,), "-operators")
    for version in ("2.13.0", "2.12.0.post2")
)
GROUP_FILES = (  # the class of hccl's groups, and how the vendor's own code calls it
    "torch_npu/include/torch_npu/csrc/distributed/ProcessGroupHCCL.hpp",
    "torch_npu/distributed/distributed_c10d.py",
)
GROUPS = tuple(
    Headers(f"torch-npu=={version}", GROUP_FILES, GROUP_FILES, "-groups") for version in ("2.13.0", "2.12.0.post2")
)
CUDA = Headers("nvidia-cuda-runtime==13.3.29", "nvidia/cu13/include/cuda.h", ("nvidia/cu13/include",))


@contextmanager
def made_once(path: str) -> Iterator[tuple[Path, bool]]:
    """What `path` under `build` names, and whether the caller has to make it now: nobody else does meanwhile."""
    if os.access(BUILD / path, os.R_OK):
        yield BUILD / path, False
        return
    made = (BUILD if _is_writable(BUILD) else OWN.expanduser()) / path
    made.parent.mkdir(parents=True, exist_ok=True)
    with made.with_name(f"{made.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield made, not made.exists()


def _is_writable(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def headers(wanted: Headers) -> list[Path]:
    """Folders to include, or files to read. Skips the test that asks, with the reason, where they cannot be fetched."""
    with made_once(f"vendor/{wanted.requirement.replace('==', '-')}{wanted.name}") as (folder, is_new):
        if is_new:
            _fetch(wanted, folder)
    return [folder / part for part in wanted.includes]


def _fetch(wanted: Headers, folder: Path) -> None:
    download = folder.with_name(f"{folder.name}.download")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(download), wanted.requirement]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # pip needs no stand-in
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S, check=False, env=environment)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the declarations of {wanted.requirement} cannot be fetched: no answer in {FETCH_S:g} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        pytest.skip(f"the declarations of {wanted.requirement} cannot be fetched: {last}")
    (wheel,) = download.glob("*.whl")
    part = folder.with_name(f"{folder.name}.part")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(part, [name for name in archive.namelist() if name.startswith(wanted.prefix)])
    wheel.unlink()
    part.rename(folder)

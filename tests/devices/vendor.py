"""The vendors' own declarations, which stand-in drivers are compiled against: fetched from the package registry into
build/vendor, a wheel taken apart and never installed. Nothing of theirs is in this repository."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "build/vendor"


class Headers(NamedTuple):
    """Where a vendor's declarations come from: `requirement`, of which the members under `prefix` are taken."""

    requirement: str
    prefix: str
    includes: tuple[str, ...]


ASCEND = Headers(
    "torch-npu==2.13.0",
    "torch_npu/include/third_party/acl/inc/",
    ("torch_npu/include/third_party/acl/inc", "torch_npu/include/third_party/acl/inc/acl"),
)
CUDA = Headers("nvidia-cuda-runtime==13.3.29", "nvidia/cu13/include/cuda.h", ("nvidia/cu13/include",))


def headers(wanted: Headers) -> list[Path]:
    """Folders to include. Skips the test that asks, with the reason, where they cannot be fetched."""
    name = wanted.requirement.replace("==", "-")
    folder = FOLDER / name
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _fetch(wanted, folder)
    return [folder / part for part in wanted.includes]


def _fetch(wanted: Headers, folder: Path) -> None:
    download = folder.with_suffix(".download")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(download), wanted.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the declarations of {wanted.requirement} cannot be fetched: the index does not answer in 60 s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        pytest.skip(f"the declarations of {wanted.requirement} cannot be fetched: {last}")
    (wheel,) = download.glob("*.whl")
    part = folder.with_suffix(".part")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(part, [name for name in archive.namelist() if name.startswith(wanted.prefix)])
    wheel.unlink()
    part.rename(folder)

"""What `elasticmoe doctor --device` finds without a driver's calls: files, device nodes, packages, variables, limits.
Where nobody says, the answer is `unknown`. It reads named files and named variables only."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

from elasticmoe.cli.console import size
from elasticmoe.cli.finding import Finding

_FILE_BYTES_MAX: Final = 4096
_SMI_S: Final = 20.0
_TEXT_CHARS_MAX: Final = 200
_FILES_WISHED: Final = 65_536  # one descriptor a handle, in the HMM and in the keeper
_SHM_WISHED: Final = 1 << 30


class Vendor(NamedTuple):
    """What to look for. `versions`: for a name, files and the pattern whose group is the version; `nodes`: that must be
    there, and a pattern of one per device; `smi`: the vendor's tool, with arguments, and what to take of its output;
    `packages`: distributions, beside torch; `visible`: the variable that says which devices a driver shows, in their
    order."""

    versions: dict[str, tuple[tuple[str, ...], str]]
    nodes: tuple[str, ...]
    node_pattern: str
    smi: tuple[str, ...]
    smi_pattern: str
    packages: tuple[str, ...]
    visible: str
    variables: tuple[str, ...]


_CANN_FOLDERS = ("usr/local/Ascend/cann", "usr/local/Ascend/ascend-toolkit/latest")
VENDORS: Final[dict[str, Vendor]] = {
    "npu": Vendor(
        {
            "driver": (("usr/local/Ascend/driver/version.info",), r"(?m)^Version\s*=\s*(\S+)"),
            "firmware": (("usr/local/Ascend/firmware/version.info",), r"(?m)^Version\s*=\s*(\S+)"),
            "CANN": (
                tuple(
                    f"{folder}/{part}"
                    for folder in _CANN_FOLDERS
                    for part in ("*-linux/ascend_toolkit_install.info", "*-linux/ascend_cann_install.info")
                ),
                r"(?m)^version\s*=\s*(\S+)",
            ),
        },
        ("davinci_manager", "devmm_svm", "hisi_hdc"),
        r"davinci[0-9]+",
        ("npu-smi", "info", "-t", "board", "-i", "{index}"),
        r"(?m)^\s*((?:Software|Firmware) Version|Product Name|Model)\s*:\s*(\S.*?)\s*$",
        ("torch-npu", "triton-ascend"),
        "ASCEND_RT_VISIBLE_DEVICES",
        ("ASCEND_RT_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES", "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"),
    ),
    "cuda": Vendor(
        {
            "driver": (("proc/driver/nvidia/version",), r"Kernel Module(?: for \S+)?\s+([0-9]+(?:\.[0-9]+)+)"),
            "toolkit": (("usr/local/cuda/version.json",), r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"([0-9.]+)"'),
        },
        ("nvidiactl", "nvidia-uvm"),
        r"nvidia[0-9]+",
        (
            "nvidia-smi",
            "--id={index}",
            "--query-gpu=name,driver_version,vbios_version,memory.total,mig.mode.current",
            "--format=csv",
        ),
        r"(?m)^(.+)$",
        ("triton",),
        "CUDA_VISIBLE_DEVICES",
        ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"),
    ),
}
_OPTIONAL: Final = frozenset({"toolkit", "triton", "triton-ascend"})  # what the project does without
_EVERYWHERE: Final = ("LD_LIBRARY_PATH",)


def facts(kind: str, index: int, environment: Mapping[str, str], root: Path = Path("/")) -> list[Finding]:
    """All of a device kind's, and of the device `index` what the vendor's tool says. `root`: of the machine's file
    system."""
    vendor = VENDORS[kind]
    found = [_version(name, files, pattern, root) for name, (files, pattern) in vendor.versions.items()]
    found += [_smi(vendor, index, environment), *(_package(name) for name in ("torch", *vendor.packages))]
    if kind == "npu":
        found.append(check_pair(_installed("torch"), _installed("torch-npu")))
    found.append(_nodes(vendor, root))
    found += [_variable(name, environment) for name in (*vendor.variables, *_EVERYWHERE)]
    return [*found, _open_files(), _locked_memory(), _shared_memory(root)]


def _version(name: str, files: tuple[str, ...], pattern: str, root: Path) -> Finding:
    for place in files:
        for path in sorted(root.glob(place)):
            try:
                with path.open(errors="replace") as file:
                    match = re.search(pattern, file.read(_FILE_BYTES_MAX))
            except OSError:
                continue
            if match:
                return Finding(name, "ok", match[1][:_TEXT_CHARS_MAX])
    if name in _OPTIONAL:
        return Finding(name, "ok", "none, and none is needed")
    return Finding(name, "unknown", f"no file says it, such as /{files[0]}")


def _smi(vendor: Vendor, index: int, environment: Mapping[str, str]) -> Finding:
    """The tool numbers the machine's devices, the driver those that a variable lets it see."""
    name = vendor.smi[0]
    seen = environment.get(vendor.visible)
    if seen is not None:
        numbers = [one.strip() for one in seen.split(",")]
        if index >= len(numbers) or not numbers[index].isdecimal():
            return Finding(name, "unknown", f"{vendor.visible}={seen[:_TEXT_CHARS_MAX]} does not say its number there")
        index = int(numbers[index])
    if shutil.which(name) is None:
        return Finding(name, "unknown", "the tool is not there")
    try:
        done = subprocess.run(
            [word.format(index=index) for word in vendor.smi],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SMI_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(name, "fail", f"no answer in {_SMI_S:g} s", "look into the kernel's log: the driver hangs")
    except OSError as error:
        return Finding(name, "unknown", f"it cannot be run: {error.strerror}")
    lines = [" ".join(match.groups()) for match in re.finditer(vendor.smi_pattern, done.stdout)]
    if done.returncode or not lines:
        return Finding(name, "warn", f"it ends with status {done.returncode} and shows no device")
    return Finding(name, "ok", "; ".join(lines)[: 4 * _TEXT_CHARS_MAX])


def _installed(package: str) -> str:
    """Its version; empty where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _package(name: str) -> Finding:
    if version := _installed(name):
        return Finding(name, "ok", version)
    if name in _OPTIONAL:
        return Finding(name, "not run", "not installed")
    return Finding(name, "warn", "not installed", "docs/ascend.md says which version" if name == "torch-npu" else "")


def check_pair(torch: str, torch_npu: str) -> Finding:
    """Whether versions of torch and torch-npu are a pair; empty ones are not installed."""
    if not torch or not torch_npu:
        return Finding("torch and torch-npu", "unknown", "one of them is not installed")
    ours, theirs = (re.match(r"[0-9]+\.[0-9]+\.[0-9]+", version) for version in (torch, torch_npu))
    if ours is None or theirs is None:
        return Finding("torch and torch-npu", "unknown", f"{torch} and {torch_npu}")
    if ours[0] != theirs[0]:
        text = f"torch-npu {torch_npu} is of torch {theirs[0]}, and torch is {torch}"
        return Finding("torch and torch-npu", "fail", text, f"install torch=={theirs[0]}")
    return Finding("torch and torch-npu", "ok", f"both are of {ours[0]}")


def _nodes(vendor: Vendor, root: Path) -> Finding:
    folder = root / "dev"
    devices = sorted(path.name for path in folder.glob("*") if re.fullmatch(vendor.node_pattern, path.name))
    missing = [name for name in vendor.nodes if not (folder / name).exists()]
    shut = [name for name in (*vendor.nodes, *devices) if (folder / name).exists() and not _is_open(folder / name)]
    modes = ", ".join(f"{name} {_mode(folder / name)}" for name in (*vendor.nodes, *devices) if name not in missing)
    if shut:
        text = f"no right to read and write {', '.join(shut)} ({modes})"
        return Finding("device nodes", "fail", text, "join the nodes' group, or give the container the devices")
    if missing or not devices:
        lacks = [f"/dev/{name}" for name in missing] + ([] if devices else ["a node of a device"])
        return Finding("device nodes", "warn", f"missing: {', '.join(lacks)}", "in a container: hand the devices in")
    return Finding("device nodes", "ok", modes)


def _is_open(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


def _mode(path: Path) -> str:
    status = path.stat()
    return f"{status.st_mode & 0o777:04o} {status.st_uid}:{status.st_gid}"


def _variable(name: str, environment: Mapping[str, str]) -> Finding:
    value = environment.get(name)
    return Finding(name, "ok", "not set" if value is None else value[:_TEXT_CHARS_MAX])


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = float("inf") if hard == resource.RLIM_INFINITY else hard
    fix = "" if most >= _FILES_WISHED else f"raise the hard limit (ulimit -Hn) to {_FILES_WISHED}: one a handle"
    return Finding("open files", "warn" if fix else "ok", f"{_limit(soft)}, at most {_limit(hard)}", fix)


def _locked_memory() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Finding("locked memory", "ok", f"{_limit(soft, size)}, at most {_limit(hard, size)}")


def _limit(value: int, shown: Callable[[int], str] = str) -> str:
    return "any" if value == resource.RLIM_INFINITY else shown(value)


def _shared_memory(root: Path) -> Finding:
    try:
        status = os.statvfs(root / "dev/shm")
    except OSError as error:
        return Finding("/dev/shm", "unknown", str(error.strerror))
    total = status.f_blocks * status.f_frsize
    fix = "" if total >= _SHM_WISHED else f"in a container: shm_size of {size(_SHM_WISHED)}, for collective libraries"
    return Finding("/dev/shm", "warn" if fix else "ok", size(total), fix)

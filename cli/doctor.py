"""`elasticmoe doctor`: what this machine offers, and what to do where it is not enough."""

from __future__ import annotations

import argparse
import importlib
import mmap
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from elasticmoe.cli.console import size
from elasticmoe.cli.doctor_device import device_named, examine
from elasticmoe.cli.embedded_store import is_answering, server_binary
from elasticmoe.cli.finding import COLORS, Finding
from elasticmoe.cli.paths import default_run_dir
from elasticmoe.cli.probes import bind_once
from elasticmoe.cli.settings import DEFAULTS
from elasticmoe.cli.terminal import say, say_json, show
from elasticmoe.cli.version import version
from elasticmoe.common.config import HmmConfig
from elasticmoe.common.machine import available_bytes, usable_cores
from elasticmoe.common.private import UNSAFE, is_private
from elasticmoe.common.protocol.errors import ConfigError, ElasticMoEError, InvalidRequest

HELP = "check whether this machine can run a deployment"

_PYTHON_MIN = (3, 11)
_TORCH_MIN, _TORCH_BELOW = (2, 12), (2, 14)  # as pyproject.toml has them
_NATIVE = tuple(f"elasticmoe.native.{name}" for name in ("bus", "convert", "host", "kernels", "ledger"))
_MAP_COUNT_WISHED = 262_144
_FILES_WISHED = 8_192
_MEMORY_WISHED = 4 << 30
_HUGE_BYTES = 2 << 20
_MADV_COLLAPSE = 25
_STORE_SECONDS_MAX = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `doctor`."""
    parser.add_argument(
        "--json", action="store_true", help="a JSON list, or the report of --device, instead of a table"
    )
    parser.add_argument(
        "--device",
        metavar="KIND",
        help="test an accelerator and its memory instead: npu, cuda, or one such as npu:1 or npu:1/4",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="with --device: where its report goes (default elasticmoe-doctor-KIND.json)"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 1 when a check fails, else 0. Raises InvalidRequest for a device or file that cannot be."""
    if args.device is None:
        if args.report is not None:
            raise InvalidRequest("--report: it is of an accelerator: give --device, too")
        findings: Sequence[Finding] = [check() for check in CHECKS]
        if args.json:
            say_json([asdict(finding) for finding in findings])
        else:
            _show(findings)
    else:
        findings = _examine(*device_named(args.device), args.report, args.json)
    return 1 if any(finding.level == "fail" for finding in findings) else 0


def _examine(device: str, parts: int, report: str | None, as_json: bool) -> Sequence[Finding]:
    path = Path(report or f"elasticmoe-doctor-{device.replace(':', '-')}.json")
    findings, document = examine(device, parts, path)
    if as_json:
        say_json(document)
    else:
        _show(findings)
        say(f"report: {path}")
    return findings


def _show(findings: Sequence[Finding]) -> None:
    table = Table(header_style="bold")
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        level = Text(finding.level, style=COLORS[finding.level])
        table.add_row(finding.name, level, Text(finding.text), Text(finding.fix))
    show(table)


def check_python() -> Finding:
    """The interpreter."""
    text = f"elasticmoe {version()}, Python {platform.python_version()} on {platform.machine()}"
    if sys.version_info < _PYTHON_MIN:
        return Finding("python", "fail", text, f"use Python {'.'.join(map(str, _PYTHON_MIN))} or newer")
    return Finding("python", "ok", text)


def check_torch() -> Finding:
    """The tensor library, in the version that the package pins."""
    try:
        found = str(importlib.import_module("torch").__version__)
    except ImportError as error:
        return Finding("torch", "fail", str(error), "make install")
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if not _TORCH_MIN <= numbers < _TORCH_BELOW:
        least, below = (".".join(map(str, bound)) for bound in (_TORCH_MIN, _TORCH_BELOW))
        return Finding("torch", "fail", found, f"install torch>={least},<{below}")
    return Finding("torch", "ok", found)


def check_native() -> Finding:
    """Our own C++ modules."""
    for name in _NATIVE:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return Finding("native modules", "fail", f"{name}: {error}", "make install (needs a C++20 compiler)")
    return Finding("native modules", "ok", ", ".join(_NATIVE))


def check_cores() -> Finding:
    """Cores that this process may use, a control group's quota included."""
    cores = usable_cores()
    if cores < 2:
        return Finding("cores", "warn", f"{cores:g}", "two ranks share one core; give the machine or container more")
    return Finding("cores", "ok", f"{cores:g}")


def check_memory() -> Finding:
    """Memory that is available, the limits of control groups included."""
    available = available_bytes()
    if available < _MEMORY_WISHED:
        return Finding(
            "memory", "warn", f"{size(available)} available", f"the demo needs about {size(_MEMORY_WISHED)}; try tiny"
        )
    return Finding("memory", "ok", f"{size(available)} available")


def check_map_count() -> Finding:
    """Mappings per process: each record and each group of KV blocks is one."""
    count = int(Path("/proc/sys/vm/max_map_count").read_text())
    if count < _MAP_COUNT_WISHED:
        fix = f"large models: sysctl -w vm.max_map_count={_MAP_COUNT_WISHED}"
        return Finding("vm.max_map_count", "warn", str(count), fix)
    return Finding("vm.max_map_count", "ok", str(count))


def check_files() -> Finding:
    """Open files per process: each record is a descriptor of the HMM and of its ranks. `up` raises the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} (may be raised to {'any number' if hard == resource.RLIM_INFINITY else hard})"
    if hard != resource.RLIM_INFINITY and hard < _FILES_WISHED:
        return Finding("open files", "warn", text, f"large models: raise the hard limit to {_FILES_WISHED}")
    return Finding("open files", "ok", text)


def check_memfd() -> Finding:
    """Anonymous shared memory with seals: what host devices are made of."""
    try:
        fd = os.memfd_create("doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return Finding("memfd", "fail", str(error.strerror), "use a kernel (or a sandbox) with memfd_create")
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        mmap.mmap(fd, mmap.PAGESIZE).close()
    except OSError as error:
        return Finding("memfd", "fail", str(error.strerror), "use a kernel (or a sandbox) with memfd_create")
    finally:
        os.close(fd)
    return Finding("memfd", "ok", "works")


def check_huge_pages() -> Finding:
    """Huge pages for shared memory: fewer TLB misses in the kernels. Never needed."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    try:
        text = setting.read_text()
        chosen = text[text.index("[") + 1 : text.index("]")]
    except (OSError, ValueError):
        return Finding("huge pages", "warn", "this kernel has none for shared memory", "not needed; costs some speed")
    collapses = can_collapse()
    text = f"shmem_enabled is {chosen}, MADV_COLLAPSE {'works' if collapses else 'does not work'}"
    if not collapses and chosen in ("never", "deny"):
        return Finding("huge pages", "warn", text, f"for more speed: echo advise > {setting}")
    return Finding("huge pages", "ok", text)


def can_collapse() -> bool:
    """Whether the kernel makes large pages of small ones in shared memory, when asked."""
    try:
        from elasticmoe.native.host import Reservation
    except ImportError:
        return False  # check_native tells
    fd = os.memfd_create("doctor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _HUGE_BYTES)
        pages = Reservation(_HUGE_BYTES, _HUGE_BYTES)
        pages.map(0, fd, 0, _HUGE_BYTES, True, populate=True)
        try:
            return pages.collapse(0, _HUGE_BYTES)
        finally:
            pages.close()
    finally:
        os.close(fd)


def check_store() -> Finding:
    """The embedded store starts and answers."""
    try:
        binary = server_binary()
    except ElasticMoEError as error:
        return Finding("embedded store", "warn", error.message, "make install, or name a server with --store")
    with tempfile.TemporaryDirectory(prefix="em-") as folder:
        path = Path(folder) / "store.sock"
        conf = f'port 0\nunixsocket {path}\ndir {folder}\nsave ""\nrequirepass doctor\n'
        server = subprocess.Popen(
            [binary, "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
        )
        try:
            server.stdin.write(conf)  # type: ignore[union-attr]  # it is a pipe
            server.stdin.close()  # type: ignore[union-attr]
            deadline = time.monotonic() + _STORE_SECONDS_MAX
            while time.monotonic() < deadline and server.poll() is None:
                if is_answering(path, "doctor"):
                    return Finding("embedded store", "ok", "starts and answers")
                time.sleep(0.02)
        except BrokenPipeError:
            pass  # it ended before it read; reported below
        finally:
            server.kill()
            server.wait()
    fix = "name a Valkey or Redis server with --store"
    return Finding("embedded store", "warn", f"{binary.name} does not start here (code {server.returncode})", fix)


def check_port(port: int, flag: str) -> Finding:
    """A default port is free."""
    try:
        bind_once("127.0.0.1", port, flag)
    except ElasticMoEError as error:
        return Finding(f"port {port}", "warn", error.message, f"choose another with {flag}")
    return Finding(f"port {port}", "ok", "free")


def check_run_dir() -> Finding:
    """The default run directory can be made, is private to us, and its sockets' paths are short enough."""
    path = default_run_dir()
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("run directory", "fail", f"{folder} is not writable", "choose another with --run-dir")
    try:
        HmmConfig(run_dir=str(path)).socket("x" * 16)
        is_private(path)
    except ConfigError as error:
        if error.code == UNSAFE:
            return Finding("run directory", "fail", error.message, "remove it, or choose another with --run-dir")
        return Finding("run directory", "fail", error.message, "choose a shorter one with --run-dir")
    return Finding("run directory", "ok", str(path))


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_torch,
    check_native,
    check_cores,
    check_memory,
    check_map_count,
    check_files,
    check_memfd,
    check_huge_pages,
    check_store,
    lambda: check_port(DEFAULTS["port"], "--port"),
    lambda: check_port(DEFAULTS["admin_port"], "--admin-port"),
    check_run_dir,
)

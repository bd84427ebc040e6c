"""`elasticmoe doctor --device`: an accelerator's installation, and a self-test of its memory, in one report to send."""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from elasticmoe.cli.doctor_facts import VENDORS, facts
from elasticmoe.cli.doctor_selftest import SelfTest
from elasticmoe.cli.finding import Finding
from elasticmoe.cli.version import version
from elasticmoe.common.devices.names import DeviceId
from elasticmoe.common.machine import available_bytes, usable_cores
from elasticmoe.common.protocol.errors import InvalidRequest

_FORMAT = 1


def device_named(text: str) -> str:
    """`npu`, `cuda` or one device of these, such as `cuda:1`, as the device's name. Raises InvalidRequest."""
    try:
        device = DeviceId.parse(text if ":" in text else f"{text}:0")
    except ValueError:
        device = None
    if device is None or device.backend not in VENDORS or str(device) != f"{device.backend}:{device.index}":
        known = " or ".join(sorted(VENDORS))
        raise InvalidRequest(f"--device: has to be {known}, or one of them such as npu:1; it is {text!r:.80}")
    return str(device)


def examine(name: str, path: Path) -> tuple[list[Finding], dict[str, Any]]:
    """All findings of a device, and the report, which is in the file `path` then. Takes seconds to minutes. Raises
    InvalidRequest where the file cannot be written, before anything is done."""
    _write(path, b"")
    found = facts(DeviceId.parse(name).backend, os.environ)
    tested = SelfTest(name).run()
    report = {
        "format": _FORMAT,
        "device": name,
        "elasticmoe": version(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "cores": usable_cores(),
            "available_bytes": available_bytes(),
        },
        "found": [asdict(finding) for finding in found],
        "self_test": [asdict(finding) for finding in tested],
    }
    _write(path, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return found + tested, report


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all; without `data` only the try."""
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(fd, "wb") as file:
                file.write(data)
            if data:
                os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
    except OSError as error:
        raise InvalidRequest(f"--report: {path}: {error.strerror}") from None

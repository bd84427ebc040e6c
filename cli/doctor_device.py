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
from elasticmoe.common.devices.names import LOCAL_HOST, DeviceCount, DeviceId
from elasticmoe.common.machine import available_bytes, usable_cores
from elasticmoe.common.protocol.errors import InvalidRequest

_FORMAT = 1


def device_named(text: str) -> tuple[str, int]:
    """`npu`, `cuda`, or one device of these, such as `cuda:1`: the device's name, and into how many it is to be divided
    (`cuda:1/4`). Raises InvalidRequest."""
    try:
        found = DeviceCount.parse(text if ":" in text else f"{text}:0")
    except ValueError:
        found = None
    if found is None or found.backend not in VENDORS or len(found.indices) != 1:
        known = " or ".join(sorted(VENDORS))
        text = f"--device: has to be {known}, or one of them such as npu:1 or npu:1/4; it is {text!r:.80}"
        raise InvalidRequest(text)
    return str(DeviceId(LOCAL_HOST, found.backend, found.indices[0])), found.count


def examine(name: str, parts: int, path: Path) -> tuple[list[Finding], dict[str, Any]]:
    """All findings of a device, and the report, which is in the file `path` then. `parts`: into how many a deployment
    is to divide it. Takes seconds to minutes. Raises InvalidRequest where the file cannot be written, before anything
    is done."""
    _write(path, b"")
    device = DeviceId.parse(name)
    found = facts(device.backend, device.index, os.environ)
    tested = SelfTest(name, parts).run()
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

"""Docker Compose, in whichever of its forms is installed."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def compose_command() -> list[str]:
    """How it is called. Skips the test where there is none."""
    plugin = ["docker", "compose"]
    if shutil.which("docker") and not subprocess.run([*plugin, "version"], capture_output=True, check=False).returncode:
        return plugin
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.skip("there is neither docker compose nor docker-compose")

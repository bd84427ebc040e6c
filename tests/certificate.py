"""A certificate that nobody trusts, of 127.0.0.1, localhost and a name, made with openssl(1)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NAME = "llm.example.org"


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """The files of the certificate and of its key. Skips the test where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl(1) is not installed: no certificate can be made")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += [
        "-days",
        "2",
        "-subj",
        f"/CN={NAME}",
        "-addext",
        f"subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:{NAME}",
    ]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key

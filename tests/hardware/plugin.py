"""A plugin of pytest, for a machine with a GPU: what tests ask of compute backends on a CPU they ask of those on the
GPU beside the host's, and the contract of devices is that of the GPU's driver.

    python -m pytest -p tests.hardware.plugin tests/unit/test_backends.py tests/unit/test_devices_rules.py
"""

from __future__ import annotations

import pytest
import torch

from elasticmoe.common.layout import COMPUTES
from elasticmoe.services.worker.backends import factory
from tests.devices import backends
from tests.hardware.mirrored import mirrored


def pytest_configure() -> None:
    """Before any test module reads which backends there are."""
    if not torch.cuda.is_available():
        raise pytest.UsageError("there is no GPU that torch can use")
    device = torch.device("cuda:0")
    COMPUTES["host"] = ("host", *COMPUTES["cuda"])
    for name in COMPUTES["cuda"]:
        factory.BACKENDS[name] = mirrored(factory.BACKENDS[name], device)
    backends.ALL_KINDS = ("hardware",)

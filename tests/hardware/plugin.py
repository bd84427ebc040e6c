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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what runs on the host's kernels alone, as everywhere."""
    on_host = [item for item in items if isinstance(item, pytest.Function) and _is_of_host(item)]
    config.hook.pytest_deselected(items=on_host)
    items[:] = [item for item in items if item not in on_host]


def _is_of_host(item: pytest.Function) -> bool:
    called = getattr(item, "callspec", None)
    return called is not None and "host" in called.id.split("-")


def pytest_configure() -> None:
    """Before any test module reads which backends there are."""
    if not torch.cuda.is_available():
        raise pytest.UsageError("there is no GPU that torch can use")
    device = torch.device("cuda:0")
    COMPUTES["host"] = ("host", *COMPUTES["cuda"])
    for name in COMPUTES["cuda"]:
        factory.BACKENDS[name] = mirrored(factory.BACKENDS[name], device)
    backends.ALL_KINDS = ("hardware",)

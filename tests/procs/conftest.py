"""Tests that take many minutes run only where they are asked for: `pytest -m soak`. And the two listeners alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.procs.raw_http import Listener, admin_listener, router_listener
from tests.procs.router_fakes import layout_of
from tests.procs.router_harness import RouterProcess, write_model
from tests.procs.scaler_harness import ScalerProcess
from tests.procs.small_disk import mounted


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: takes many minutes; runs only where -m names it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" in config.option.markexpr:
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]


@pytest.fixture(scope="module")
def bare_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """A real router with its usual limits, and without ranks until a test starts one."""
    base = tmp_path_factory.mktemp("router")
    process = RouterProcess(base / "run", write_model(base / "model"), layout_of(0))
    yield process
    process.stop()


@pytest.fixture(scope="module")
def bare_scaler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScalerProcess]:
    """A real scaler that finds nothing else."""
    base = tmp_path_factory.mktemp("scaler")
    process = ScalerProcess(base / "run", write_model(base / "model"))
    yield process
    process.stop()


@pytest.fixture(params=["router", "admin"])
def listener(request: pytest.FixtureRequest, bare_router: RouterProcess, bare_scaler: ScalerProcess) -> Listener:
    """Either of both, for raw bytes."""
    return router_listener(bare_router) if request.param == "router" else admin_listener(bare_scaler)


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 96 MiB for run directories."""
    with mounted(96) as folder:
        if folder is None:
            pytest.skip("a file system for this test cannot be mounted here")
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        yield folder
        monkeypatch.undo()

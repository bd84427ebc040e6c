"""Unit tests share a process, and what one process may do with device memory depends on what it has done before. And
what many of them start from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import elasticmoe.common.store
from elasticmoe.common.devices.rules import PROCESS, ProcessRules
from elasticmoe.common.store import Store
from elasticmoe.native import kernels
from tests.devices import standins
from tests.unit.stores import Server

if TYPE_CHECKING:
    from elasticmoe.services.router.text.tokenizer import ServedModel
    from tests.unit.forms import Tensors
    from tests.unit.ranks import Ranks


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins as a process that has neither exported nor imported handles."""
    for name, value in vars(ProcessRules()).items():
        monkeypatch.setattr(PROCESS, name, value)


@pytest.fixture(scope="session", autouse=True)
def _one_thread_of_torch() -> None:
    """Several would meet after each small operation, and wait there for cores that are taken."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


INSTRUCTION_SETS = ("amx", "avx512bf16", "avx512", "avx2", "baseline")  # that kernels are built for, on any machine


def instruction_set_params() -> list[Any]:
    """Those of this machine, and those that it lacks as tests that are skipped: a run says what it has not tried."""
    present = kernels.instruction_sets()
    lacking = [name for name in INSTRUCTION_SETS if name not in present]
    skip = pytest.mark.skip
    return [*present, *(pytest.param(name, marks=skip(reason=f"this CPU has no {name}")) for name in lacking)]


@pytest.fixture(params=instruction_set_params())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test runs once on each set of kernels that this machine has."""
    assert request.param in INSTRUCTION_SETS, "machines without it would leave it out and say nothing"
    kernels.use_instruction_set(request.param)
    yield request.param
    kernels.use_instruction_set(kernels.instruction_sets()[0])


@pytest.fixture(params=standins.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Of accelerators, on the stand-in of their driver."""
    return str(request.param)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The memory of all stand-in devices of the test."""
    with standins.memory(monkeypatch) as made:
        yield made


@pytest.fixture
def no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names no setting."""
    for name in [name for name in os.environ if name.startswith("ELASTICMOE_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the oracle model, which tests only read."""
    from elasticmoe.cli.models import make_model

    return make_model("oracle", tmp_path_factory.mktemp("oracle") / "model", seed=7)


@pytest.fixture(scope="module")
def ranks(directory: Path) -> Ranks:
    """One rank of the oracle model."""
    from tests.unit.ranks import Ranks

    return Ranks(directory, 1, max_tokens=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """What a router knows of a model that has only a tokenizer."""
    from elasticmoe.services.router.text.tokenizer import ServedModel
    from tests.procs.router_harness import write_model  # loads torch, which most tests do not need

    return ServedModel(write_model(tmp_path_factory.mktemp("m") / "model"), "m")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensors]:
    """The tensors of a small model of each family, by the names of its checkpoint."""
    from tests.unit import forms

    root = tmp_path_factory.mktemp("bases")
    return {family: forms.base_tensors(root / family, family) for family in forms.BASES}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def store(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store on `server`, which may stand still for a while."""
    monkeypatch.setattr(elasticmoe.common.store, "CALL_SECONDS_MAX", 60.0)
    store = Store(server.url, "test")
    yield store
    store.close()

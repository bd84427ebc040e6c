"""Fixtures of all tests: models that are made once, whole deployments, and the proof that a test leaks nothing."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.hardware.memory import used_bytes
from tests.procs.deployment import HARDWARE, Deployment
from tests.procs.waiting import wait_until
from tests.shared_memory import shared_memory

# No test depends on the machine's speed: an example may take as long as it takes, and so may drawing one.
settings.register_profile("elasticmoe", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("elasticmoe")

# Marks of tests that are left out unless asked for, and what runs them. Of several marks of a test the first counts.
ELSEWHERE = {
    "soak": "pytest -m soak",
    "compose": "make compose-test",
    "accel": "make accel-standin",
    "slow": "make test-all",
}
_LEFT_OUT = pytest.StashKey[Counter[str]]()
_HAS_FAILED = pytest.StashKey[bool]()
_USED_BYTES = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "whole deployments of the tests have stand-ins of these accelerators for devices"
    parser.addoption("--accelerator", choices=("npu", "cuda"), help=text)
    text = "whole deployments of the tests have the first GPU of this machine for devices, with what computes so"
    parser.addoption("--hardware", choices=("torch", "triton"), help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEFT_OUT] = Counter()
    if config.getoption("--hardware") and config.getoption("--accelerator"):
        raise pytest.UsageError("--hardware and --accelerator: deployments have a GPU or stand-ins for devices")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Of the process that the others belong to: what is used of the GPU before anybody has a part of it."""
    if session.config.getoption("--hardware") and not hasattr(session.config, "workerinput"):
        session.config.stash[_USED_BYTES] = used_bytes()


@pytest.fixture(scope="session", autouse=True)
def _accelerator(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where the option asks for accelerators: they are there, and at the end nobody has any of their memory."""
    kind = request.config.getoption("--accelerator")
    if kind is None:
        yield
        return
    from tests.devices import standins

    with pytest.MonkeyPatch.context() as monkeypatch, standins.memory(monkeypatch) as folder:
        standins.install(kind, monkeypatch)
        monkeypatch.setenv("STANDIN_DEVICES", "8")  # some tests grow beyond the usual four
        yield
        assert not any(standins.used(kind, folder)), "memory of accelerators that nobody has given back"


@pytest.fixture(scope="session", autouse=True)
def _hardware(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where the option asks for the GPU, deployments are there."""
    compute = request.config.getoption("--hardware")
    if compute is None:
        yield
        return
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(HARDWARE, compute)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Leave out what runs only where -m names it, and count what the marks leave out of what was collected; not what
    `-k` does."""
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:  # each process would call them otherwise, and none could share them out
        raise pytest.UsageError(f"a test is named by an object's address; give it an id: {unstable[0]}")
    collected = list(items)
    yield
    for mark in ("soak", "accel"):
        left = [item for item in items if item.get_closest_marker(mark)]
        if left and mark not in config.option.markexpr:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item not in left]
    if config.option.keyword:
        return
    chosen = set(items)
    for item in collected:
        marks = [] if item in chosen else [mark for mark in ELSEWHERE if item.get_closest_marker(mark)]
        config.stash[_LEFT_OUT].update(marks[:1])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["left_out"] = dict(session.config.stash[_LEFT_OUT])
    if (before := session.config.stash.get(_USED_BYTES, None)) is not None:
        wait_until(lambda: used_bytes() <= before, "memory of the GPU is given back", 20.0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Each worker of xdist has collected the same."""
    node.config.stash[_LEFT_OUT] |= Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Nobody takes a part of the tests for all of them."""
    for mark, number in sorted(config.stash[_LEFT_OUT].items()):
        terminalreporter.write_line(f"left out: {number} {mark} tests, which `{ELSEWHERE[mark]}` runs")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_folder("oracle")`: the folder of a small named model, made at its first use."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        from elasticmoe.cli.models import make_model  # loads torch, which most tests do not need

        path = root / name
        return path if path.is_dir() else make_model(name, path)

    return folder


@pytest.fixture(scope="module")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a model of the smallest specification (tests/unit/specs.py), in float32."""
    from elasticmoe.cli.models import random_checkpoint
    from tests.unit.specs import TINY_MIXTRAL

    return random_checkpoint(tmp_path_factory.mktemp("m") / "m", TINY_MIXTRAL, seed=5, dtype="float32")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let fixtures know whether their test failed."""
    report = yield
    if report.failed:
        item.stash[_HAS_FAILED] = True
    return report


@pytest.fixture
def deploy(model_folder: Callable[[str], Path], request: pytest.FixtureRequest) -> Iterator[Callable[..., Deployment]]:
    """`deploy("oracle", replicas=3, kv_bytes=1 << 20)`: a deployment that serves. The test calls its `stop`; one that
    it leaves running is stopped here, with the same checks. Where the test failed the ends of all logs are shown."""
    deployments: list[Deployment] = []

    def start(model: str = "oracle", **settings: object) -> Deployment:
        deployments.append(Deployment(model_folder(model), **settings))  # type: ignore[arg-type]
        return deployments[-1].wait_ready()

    yield start
    if request.node.stash.get(_HAS_FAILED, False):
        for deployment in deployments:
            print(deployment.explain())
    running = [deployment for deployment in deployments if deployment.launcher.poll() is None]
    try:
        for deployment in running:
            deployment.stop()
    finally:
        for deployment in deployments:
            deployment.discard()


@pytest.fixture(autouse=True)
def _no_leak(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests with real processes leave no descriptor, thread, shared memory or child process in ours (promise P17)."""
    if request.node.get_closest_marker("procs") is None:
        yield
        return
    before = _resources()
    yield

    def leaked() -> dict[str, set[str]]:
        return {what: new - before[what] for what, new in _resources().items() if new - before[what]}

    try:
        # What was closed may take a moment to go: a thread that was told to end, a child that was killed.
        wait_until(lambda: not leaked(), "nothing leaked", 5.0)
    except AssertionError:
        pytest.fail(f"the test leaked {leaked()}")


def _resources() -> dict[str, set[str]]:
    """What this process holds: descriptors by number and target, threads, living children; and shared memory files."""
    descriptors = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            descriptors.add(f"{fd} -> {os.readlink(f'/proc/self/fd/{fd}')}")
        except OSError:
            continue  # the listing's own
    children = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            children |= set((task / "children").read_text().split())
        except OSError:
            continue  # the thread ended
    return {
        "descriptors": descriptors,
        "threads": {f"{thread.name}-{thread.ident}" for thread in threading.enumerate()},
        "shared memory": shared_memory(),
        "children": children,
    }

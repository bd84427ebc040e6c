"""Tests that take many minutes run only where they are asked for: `pytest -m soak`. And the two listeners alone:
a router whose ranks are scripted, a scaler that finds nothing."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

from elasticmoe.cli.models import random_checkpoint
from tests.procs.raw_http import Listener, admin_listener, router_listener
from tests.procs.router_fakes import WAIT_S, FakeRank
from tests.procs.router_harness import (
    ROOT,
    RouterProcess,
    StartRouter,
    plain_client,
    running_router,
    serving,
    write_model,
)
from tests.procs.scaler_harness import ScalerProcess
from tests.procs.small_disk import mounted
from tests.unit.specs import TINY_MIXTRAL

if TYPE_CHECKING:
    from scripts.browser import Browser
    from tests.procs.deployment import Deployment
    from tests.procs.launcher_run import Start
    from tests.procs.page import Page

_NPM_SECONDS_MAX = 300.0
_NO_NETWORK = ("ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "EAI_AGAIN", "ETIMEDOUT", "ERR_SOCKET_TIMEOUT")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser of the module's own; tests that ask for it are skipped where there is none."""
    from scripts.browser import Browser  # here: only its tests need selenium

    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the example for Node with what it needs."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("node")
    shutil.copytree(ROOT / "examples/node", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
    npm = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries", "1"]
    done = subprocess.run(npm, cwd=folder, capture_output=True, text=True, timeout=_NPM_SECONDS_MAX)
    if done.returncode and any(code in done.stderr for code in _NO_NETWORK):
        pytest.skip(f"npm's registry is not reached: {done.stderr.strip().splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def page(deployment: Deployment, browser: Browser) -> Iterator[Page]:
    """The page of the module's own `deployment`, loaded anew. In the end nothing was warned of."""
    from tests.procs.page import Page

    page = Page(browser, deployment.admin_url, deployment.token)
    browser.complaints()
    browser.forget_requests()
    page.open(forget=True)
    yield page
    page.check_quiet()


@pytest.fixture(scope="module")
def start_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartRouter]:
    """`start_router(requests_max=4)`: a real router that runs until the module's end, without ranks until a test starts
    one. What it serves is `model`, or a model of its own."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running_router(tmp_path_factory.mktemp("router"), **settings))


@pytest.fixture(scope="module")
def router(start_router: StartRouter) -> RouterProcess:
    """A router with its usual limits. A module whose router has others defines its own `router`."""
    return start_router()


@pytest.fixture
def rank(router: RouterProcess) -> Iterator[FakeRank]:
    """A rank behind `router`."""
    with serving(router) as rank:
        yield rank


@pytest.fixture
def client(router: RouterProcess) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of `router`."""
    with plain_client("") as http:
        yield openai.OpenAI(
            base_url=router.url + "/v1", api_key="none", max_retries=0, timeout=WAIT_S, http_client=http
        )


@pytest.fixture(scope="module")
def scaler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScalerProcess]:
    """A real scaler that finds nothing else."""
    base = tmp_path_factory.mktemp("scaler")
    process = ScalerProcess(base / "run", write_model(base / "model"))
    yield process
    process.stop()


@pytest.fixture(params=["router", "admin"])
def listener(request: pytest.FixtureRequest, router: RouterProcess, scaler: ScalerProcess) -> Listener:
    """Either of both, for raw bytes."""
    return router_listener(router) if request.param == "router" else admin_listener(scaler)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of a few kilobytes in two files, for an HMM alone."""
    return random_checkpoint(tmp_path_factory.mktemp("m") / "m", TINY_MIXTRAL, seed=5, dtype="float32", shards=2)


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 96 MiB for run directories."""
    with mounted(96) as folder:
        if folder is None:
            pytest.skip("a file system for this test cannot be mounted here")
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        yield folder
        monkeypatch.undo()


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """Where a run directory may be made, at a short path: those of sockets have a limit."""
    folder = Path(tempfile.mkdtemp(prefix="em-"))
    yield folder / "run"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where launchers of the module's tests make and find models."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def start(home: Path, run_dir: Path) -> Iterator[Start]:
    """`start(ALL, "--fresh")`: a launcher with stand-ins, in `run_dir` unless it says where."""
    from tests.procs.launcher_run import ALL, Run

    runs: list[Run] = []

    def go(behaviours: dict[str, str] = ALL, *flags: str, at: Path = run_dir, **settings: object) -> Run:
        runs.append(Run(home, at, behaviours, *flags, **settings))
        return runs[-1]

    yield go
    for run in runs:
        run.close()


@pytest.fixture
def up(model_folder: Callable[[str], Path]) -> Iterator[Callable[..., Deployment]]:
    """`up(...)`: a deployment in one and the same run directory, whatever earlier ones have left there."""
    from tests.procs.deployment import Deployment
    from tests.procs.elastic import SETTINGS

    folder = Path(tempfile.mkdtemp(prefix="em-"))
    (folder / "points").mkdir()
    deployments: list[Deployment] = []

    def begin(**settings: Any) -> Deployment:
        values = {**SETTINGS, "devices": 4, "failpoint_dir": folder / "points", **settings}
        deployments.append(Deployment(model_folder("oracle"), folder=folder, **values))
        return deployments[-1]

    yield begin
    for deployment in reversed(deployments):
        deployment.discard()
    shutil.rmtree(folder, ignore_errors=True)

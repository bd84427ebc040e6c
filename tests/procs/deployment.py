"""A whole deployment as a test wants it: `elasticmoe up` on free ports in a run directory of its own, and a `stop` that
proves that nothing was left behind and that every accepted request ended exactly once."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from elasticmoe.common.config import environment_of
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.record import DeploymentRecord, read_record
from tests.history import Report, check_history
from tests.procs.waiting import processes_of, wait_until
from tests.shared_memory import shared_memory

ROOT = Path(__file__).parent.parent.parent
READY_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 60.0
STALL_S = 20.0  # a busy machine may let a rank stand still for seconds: it is to be replaced only in tests of that
ADMIN_SECONDS_MAX = 60.0
HARDWARE = "TESTS_ON_HARDWARE"  # what computes where deployments of the tests have a GPU that is there, else not set
_LOG_TAIL_LINES = 30


class Deployment:
    """One deployment. Owns its launcher and its run directory until `stop` or `discard`.

    `settings` are fields of common.config by name (`kv_bytes=1 << 20`); `flags` are further flags of `up`. The history
    is on, and a rank may stand still for STALL_S.
    The launcher is a child of the test, in the foreground, so that its end is seen at once. `folder`: of a
    deployment that was cut off or stopped, to go on in its run directory; else one of its own. `program`: another
    version's `elasticmoe`.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        replicas: int = 2,
        devices: int | str | None = None,
        dtype: str = "float32",
        flags: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        program: Path | None = None,
        **settings: Any,
    ) -> None:
        self._folder = folder or Path(tempfile.mkdtemp(prefix="em-"))  # short: socket paths have a limit
        self.run_dir = self._folder / "run"
        self.output_path = self._folder / "output"
        self.report: Report | None = None
        self._shared_memory = shared_memory()
        fixed = {"history": "true", "replicas": replicas, "devices": _named(devices or replicas), "dtype": dtype}
        fixed |= {"kv_bytes": 16 << 20, "device_bytes": 512 << 20, "rank_stall_s": STALL_S}
        if HARDWARE in os.environ:
            fixed["compute"] = os.environ[HARDWARE]
        if "STANDIN_KIND" in os.environ or HARDWARE in os.environ:
            fixed["device_bytes"] = 0  # the driver says what a device has; handles have 2 MiB at least
            if "device_bytes" in settings:
                settings["device_bytes"] = max(settings["device_bytes"], 256 << 20)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ELASTICMOE_")}
        up = ["up", "--model", str(model), "--run-dir", str(self.run_dir), "--port", "0", "--admin-port", "0"]
        up += ["--keep-logs", "--ready-timeout", str(READY_SECONDS_MAX), *flags]
        with open(self.output_path, "wb") as output:
            self.launcher = subprocess.Popen(
                [*([sys.executable, "-m", "elasticmoe.cli.main"] if program is None else [program]), *up],
                cwd=ROOT,
                env=inherited | environment_of({**fixed, **settings}) | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_ready(self) -> Deployment:
        """Wait until it serves. Fails the test with the logs' ends when it does not."""

        def is_ready() -> bool:
            if self.launcher.poll() is not None:
                raise AssertionError(f"`up` ended with code {self.launcher.returncode}\n{self.explain()}")
            record = read_record(self.run_dir)
            is_ours = record is not None and record.launcher.pid == self.launcher.pid
            return record is not None and is_ours and record.state == "serving"

        try:
            wait_until(is_ready, "deployment ready", READY_SECONDS_MAX + 30)
        except AssertionError:
            self.discard()
            raise
        return self

    # ---- what a test asks -------------------------------------------------------------------------------------------

    @property
    def record(self) -> DeploymentRecord:
        """What the launcher wrote last."""
        record = read_record(self.run_dir)
        assert record is not None, "there is no deployment.json"
        return record

    @property
    def base_url(self) -> str:
        """The router's address, without /v1."""
        return self.record.url

    @property
    def admin_url(self) -> str:
        """The scaler's address."""
        return self.record.admin_url

    @property
    def token(self) -> str:
        """The admin token."""
        return (self.run_dir / "secrets/admin.token").read_text().strip()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the launcher's children by name: store, keeper, hmm, pool, scaler, router."""
        return {process.name: process.pid for process in self.record.processes}

    def admin(self, path: str) -> Any:
        """GET a JSON document of the admin listener. One that has not heard whom it asks (an HMM that stands still) is
        asked again, as its Retry-After says."""
        headers = {"Authorization": f"Bearer {self.token}"}

        def answered() -> httpx.Response | None:
            answer = httpx.get(self.admin_url + path, headers=headers, timeout=ADMIN_SECONDS_MAX, trust_env=False)
            return None if answer.status_code == 503 else answer.raise_for_status()

        answer = wait_until(answered, f"an answer to GET {path}", ADMIN_SECONDS_MAX)
        assert answer is not None
        return answer.json()

    def admin_call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Any request to the admin listener: status and JSON."""
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = httpx.request(
            method, self.admin_url + path, headers=headers, json=body, timeout=ADMIN_SECONDS_MAX, trust_env=False
        )
        return answer.status_code, answer.json()

    def scale(self, **body: Any) -> dict[str, Any]:
        """Start a scale operation and wait for its end; the operation as /v1/operations shows it."""
        return self.wait_operation(self.order(**body))

    def order(self, **body: Any) -> str:
        """Start a scale operation; its op_id. A scaler that says that it is not ready (its HMM has just died, it has
        not read the journal) is asked again, as its Retry-After asks a client to do."""

        def accepted() -> str:
            status, answer = self.admin_call("POST", "/v1/scale", body)
            if status == 503 and answer["error"]["code"] == "not_ready":
                return ""
            assert status == 202, f"{body}: {status} {answer}"
            return str(answer["op_id"])

        return str(wait_until(accepted, f"the order {body} to be accepted", ADMIN_SECONDS_MAX))

    def wait_operation(self, op_id: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait until an operation has ended; as /v1/operations shows it."""

        def ended() -> dict[str, Any] | None:
            status, shown = self.admin_call("GET", f"/v1/operations/{op_id}")
            if status == 503:
                return None  # a restarted scaler that has not read the journal yet
            assert status == 200, shown
            return shown if shown["phase"] in ("done", "aborted") else None

        try:
            operation = wait_until(ended, f"operation {op_id}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.explain()}") from None
        assert operation is not None
        return operation

    def rank_pids(self) -> dict[str, int]:
        """Process ids of the ranks that are ready, by name (`r0t0`). Waits until some is: a scaler that has not heard
        the pool for a while knows of none."""

        def found() -> dict[str, int]:
            ranks = self.admin("/v1/layout")["ranks"]
            return {f"r{rank['replica']}t{rank['tp']}": rank["pid"] for rank in ranks if rank["ready"]}

        return wait_until(found, "a rank that is ready", ADMIN_SECONDS_MAX)

    def metric(self, name: str) -> float:
        """The sum of a metric of the router over its labels."""
        text = httpx.get(self.base_url + "/metrics", timeout=60, trust_env=False).text
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)}\{{.*\}} (\S+)$", text, re.MULTILINE))

    def log(self, name: str) -> str:
        """What a child logged so far."""
        path = self.run_dir / "logs" / f"{name}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def output(self) -> str:
        """What the launcher printed so far; nothing once its folder is gone."""
        return self.output_path.read_text(errors="replace") if self.output_path.is_file() else ""

    def history(self, *, is_running: bool = True) -> Report:
        """The router's history so far, checked."""
        return check_history(self.run_dir / "logs/history-router.jsonl", is_running=is_running)

    def explain(self) -> str:
        """The ends of all logs, for a failing test."""
        parts = [f"--- launcher\n{_tail(self.output())}"]
        for path in sorted((self.run_dir / "logs").glob("*.log")):
            parts.append(f"--- {path.stem}\n{_tail(path.read_text(errors='replace'))}")
        return "\n".join(parts)

    # ---- what a test does -------------------------------------------------------------------------------------------

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a child of the launcher, or to a rank by its name. Returns the process id."""
        pid = self.pids.get(name) or self.rank_pids()[name]
        os.kill(pid, number)
        return pid

    def wait_restarted(self, name: str, old_pid: int, timeout_s: float = 30.0) -> int:
        """Wait until the launcher has started `name` again; its new process id."""

        def new_pid() -> int | None:
            pid = self.pids.get(name)
            return pid if pid != old_pid else None

        pid = wait_until(new_pid, f"{name} restarted", timeout_s)
        assert pid is not None
        return pid

    def device(self, index: int) -> str:
        """The name of its device of that number."""
        return DeviceCount.parse(self.record.devices).names()[index]

    @property
    def takes_over(self) -> bool:
        """Whether an HMM's successor has the memory of its predecessor, and ranks so outlive it (ADR 32)."""
        return not self.record.devices.startswith("npu:")

    def wait_serving(self, timeout_s: float = 60.0) -> None:
        """Wait until both listeners say that they are ready, as after a restart."""

        def are_ready() -> bool:
            try:
                urls = (f"{self.admin_url}/ready", f"{self.base_url}/ready")
                return all(httpx.get(url, timeout=5, trust_env=False).status_code == 200 for url in urls)
            except httpx.HTTPError:
                return False

        wait_until(are_ready, "both listeners ready", timeout_s)

    def stop(self, *, is_clean: bool = True) -> Report:
        """SIGTERM, and what must hold then: exit status 0, no process, no socket, no shared memory, no state, every
        accepted request ended once. `is_clean` False: children may end with another code than 0. Removes everything.
        """
        try:
            self._end(lambda: self.launcher.send_signal(signal.SIGTERM))
            assert {entry.name for entry in self.run_dir.iterdir()} == {"launcher.lock", "logs"}
            if is_clean:
                stopping = self.output().rpartition("stopping router")[2]
                assert " ended with " not in stopping, f"a child did not stop cleanly\n{self.explain()}"
            self.report = self.history(is_running=False)
            return self.report
        finally:
            self.discard()

    def stop_keeping(self, order: Callable[[], object] | None = None) -> None:
        """As `stop`, but what the next deployment in its folder goes on with stays, and nothing else: no socket and no
        process. `order` ends it; None: SIGTERM, for one that was started with --keep-state."""
        self._end(order or (lambda: self.launcher.send_signal(signal.SIGTERM)))
        kept = {"deployment.json", "launcher.lock", "logs", "secrets", "state", "store"}
        assert {entry.name for entry in self.run_dir.iterdir()} == kept
        assert self.record.processes == ()
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (self.run_dir / "secrets").iterdir()}
        assert set(modes.values()) == {0o600}, modes
        stopping = self.output().rpartition("stopping router")[2]
        assert " ended with " not in stopping, f"a child did not stop cleanly\n{self.explain()}"
        self.report = self.history(is_running=False)

    def _end(self, order: Callable[[], object]) -> None:
        """End it by `order`: exit status 0, no process and no shared memory is left."""
        order()
        code = self.launcher.wait(STOP_SECONDS_MAX)
        assert code == 0, f"the launcher ended with code {code}\n{self.explain()}"
        assert not processes_of(self.run_dir), f"left running: {processes_of(self.run_dir)}"
        self._wait_no_shared_memory()

    def _wait_no_shared_memory(self) -> None:
        """Wait until nothing in shared memory is new since its start; others may have something there for a moment."""

        def left() -> set[str]:
            return shared_memory() - self._shared_memory

        try:
            wait_until(lambda: not left(), "nothing left in /dev/shm", 10.0)
        except AssertionError as error:
            raise AssertionError(f"{error}: {left()}") from None

    def cut_off(self) -> None:
        """SIGKILL to every process, the launcher first. The run directory stays as it is."""
        self.launcher.kill()
        self.launcher.wait()
        for pid in processes_of(self.run_dir):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not processes_of(self.run_dir), "no process left", 30.0)

    def discard(self) -> None:
        """Kill and remove whatever is left. Idempotent."""
        if self.launcher.poll() is None:
            self.launcher.kill()
            self.launcher.wait()
        wait_until(lambda: not processes_of(self.run_dir), "no process left", 30.0)
        shutil.rmtree(self._folder, ignore_errors=True)


def in_force(deployment: Deployment) -> dict[str, Any]:
    """What a user expects to find again where it was stopped with its state: size, name, policy, operations, token."""
    policy = deployment.admin("/v1/policy")
    return {
        "replicas": deployment.admin("/v1/layout")["replicas"],
        "instance": deployment.admin("/v1/scale")["instance_id"],
        "policy": (policy["version"], policy["policy"]),
        "operations": deployment.admin("/v1/operations")["operations"],
        "token": deployment.token,
    }


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:])


def _named(devices: int | str) -> str:
    """The setting for so many devices: of this machine, or accelerators where the test runs on them."""
    kind = os.environ.get("STANDIN_KIND")
    if isinstance(devices, str):
        return devices
    if HARDWARE in os.environ:
        return "cuda:0" if devices == 1 else f"cuda:0/{devices}"
    return f"host:{devices}" if kind is None else f"{kind}:0-{devices - 1}"

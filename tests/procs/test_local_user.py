"""Another local user: what they plant is not even looked at, what is ours is out of their reach, and no port of a
living deployment can be had (SECURITY.md). Becoming another user takes root: elsewhere these tests are skipped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.cli.main import main
from elasticmoe.common.private import is_private, read_private
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.record import read_record, start_ticks
from tests.procs.another_user import unused_uid
from tests.procs.deployment import Deployment
from tests.procs.waiting import wait_until

pytestmark = [
    pytest.mark.procs,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another local user"),
]

SECRET = "root-s-secret-of-another-kind"
ESCAPE = "\x1b]0;owned\x07\x9b31m"
COMMANDS = [
    ("status",),
    ("status", "--json"),
    ("scale", "--replicas", "1"),
    ("scale", "--cancel", "op"),
    ("plan", "--replicas", "1"),
    ("rebalance",),
    ("events",),
    ("chat", "--once", "hello"),
    ("down",),
    ("up", "--model", "oracle", "--port", "0", "--admin-port", "0"),
]


OTHER = unused_uid()


# The interpreter may lie in a folder of root's: it is started, and has imported what follows, before it becomes OTHER.
BECOME = f"""
import encodings.idna, http.client, json, os, signal, socket, sys, urllib.error, urllib.request
os.setgroups([])
os.setresgid({OTHER}, {OTHER}, {OTHER})
os.setresuid({OTHER}, {OTHER}, {OTHER})
os.chdir("/")
assert os.geteuid() == {OTHER}
"""


def other(program: str, *arguments: str) -> list[str]:
    """The command that runs a Python program as another user."""
    return [sys.executable, "-I", "-S", "-c", BECOME + program, *arguments]


def as_other(program: str, *arguments: str) -> Any:
    """Run a Python program as another user; what it prints as JSON."""
    done = subprocess.run(other(program, *arguments), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout or "null")


class Trap:
    """What an attacker would gain: a listener that notes who connects, and a process of ours that could be ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.victim = subprocess.Popen(["sleep", "600"])
        self.secret = folder / "secret"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o600)
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def record(self) -> str:
        """A deployment.json that would send the token to the listener and SIGTERM to the victim."""
        launcher = {"name": "launcher", "pid": self.victim.pid, "start_ticks": start_ticks(self.victim.pid)}
        url = f"http://127.0.0.1:{self.port}"
        fields = {"state": "serving", "launcher": launcher, "processes": [], "model": "/m", "dtype": "float32"}
        fields |= {"served_name": ESCAPE, "devices": "host:2", "url": url, "admin_url": url, "started_at": 0.0}
        return json.dumps(fields | {"port": self.port, "admin_port": self.port})

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join()
        self.victim.kill()
        self.victim.wait()


@pytest.fixture
def trap() -> Iterator[Trap]:
    folder = Path(tempfile.mkdtemp(prefix="em-", dir="/tmp"))
    folder.chmod(0o1777)  # as /tmp itself
    trap = Trap(folder)
    yield trap
    trap.close()
    shutil.rmtree(folder)


# Plants a run directory: its path, its deployment.json, what its token links to, and the mode of its folders.
PLANT = """
where, record, secret, mode = sys.argv[1:]
os.umask(0)
for name in ("", "logs", "secrets", "sockets"):
    os.makedirs(os.path.join(where, name), int(mode, 8), exist_ok=True)
open(os.path.join(where, "deployment.json"), "w").write(record)
open(os.path.join(where, "launcher.lock"), "w").close()
os.symlink(secret, os.path.join(where, "secrets/admin.token"))
os.symlink(secret, os.path.join(where, "logs/failure.txt"))
"""


def plant_all(trap: Trap, run_dir: Path) -> None:
    """The attacker makes everything, as it was on the product before."""
    as_other(PLANT, str(run_dir), trap.record(), str(trap.secret), "0777")


def plant_private(trap: Trap, run_dir: Path) -> None:
    """The same with modes that look right."""
    as_other(PLANT, str(run_dir), trap.record(), str(trap.secret), "0755")


def plant_a_link(trap: Trap, run_dir: Path) -> None:
    """The path leads, by the attacker's link, to a folder that is ours and has been used otherwise."""
    elsewhere = trap.folder / "ours"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "deployment.json").write_text(trap.record())
    as_other(
        "os.mkdir(sys.argv[1]); os.symlink(*sys.argv[2:])",
        str(run_dir.parent),
        str(elsewhere),
        str(run_dir),
    )


def plant_the_parent(trap: Trap, run_dir: Path) -> None:
    """The attacker's link stands in place of the folder above."""
    plant_all(trap, trap.folder / "theirs" / "default")
    as_other("os.symlink(*sys.argv[1:])", str(trap.folder / "theirs"), str(run_dir.parent))


def plant_in_ours(trap: Trap, run_dir: Path) -> None:
    """The folder is ours, and anybody could write to it."""
    run_dir.mkdir(parents=True)
    run_dir.parent.chmod(0o755)  # whatever the umask is
    run_dir.chmod(0o777)
    as_other(PLANT, str(run_dir), trap.record(), str(trap.secret), "0777")


def plant_beside_ours(trap: Trap, run_dir: Path) -> None:
    """The folder is ours and private; the one above is ours, and anybody could have put this one in its place."""
    run_dir.mkdir(mode=0o700, parents=True)
    (run_dir / "deployment.json").write_text(trap.record())
    run_dir.parent.chmod(0o777)


@pytest.mark.parametrize(
    "plant", [plant_all, plant_private, plant_a_link, plant_the_parent, plant_in_ours, plant_beside_ours]
)
def test_no_command_trusts_a_run_directory_that_others_could_have_made(
    plant: Callable[[Trap, Path], None], trap: Trap, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(trap.folder))
    monkeypatch.delenv("ELASTICMOE_RUN_DIR", raising=False)
    run_dir = trap.folder / f"elasticmoe-{os.geteuid()}" / "default"
    plant(trap, run_dir)
    for command in COMMANDS:
        assert main(command) == 1, command
        out, err = capsys.readouterr()
        assert err.startswith("elasticmoe: unsafe_run_dir: run directory "), (command, out, err)
        assert err.count("\n") == 1
        assert SECRET not in out + err
        assert "\x1b" not in out + err
    assert trap.connections == 0
    assert trap.victim.poll() is None


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "large", "foreign", "writable"])
@pytest.mark.parametrize("name", ["deployment.json", "secrets/admin.token", "logs/failure.txt"])
def test_what_is_read_is_a_small_file_of_ours(name: str, kind: str, trap: Trap) -> None:
    """Within a run directory that is ours: nothing hangs, nothing is followed, nothing large is read."""
    path = trap.folder / "run" / name
    path.parent.mkdir(parents=True, mode=0o700)
    (trap.folder / "run").chmod(0o700)
    if kind == "link":
        path.symlink_to(trap.secret)
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        path.write_bytes(b"x" * 5_000_000)
    else:
        path.write_text("x")
        path.chmod(0o666 if kind == "writable" else 0o600)
        os.chown(path, OTHER if kind == "foreign" else 0, 0)
    assert is_private(path.parent)
    with pytest.raises(ConfigError):
        read_private(path, 1024 * 1024)


def test_a_record_that_names_what_no_launcher_writes_is_damaged(trap: Trap) -> None:
    run_dir = trap.folder / "run"
    run_dir.mkdir(mode=0o700)
    good = json.loads(trap.record())
    (run_dir / "deployment.json").write_text(json.dumps(good))
    assert read_record(run_dir) is not None
    port = good["port"]
    bad: list[dict[str, Any]] = [
        {"url": f"http://user@127.0.0.1:{port}"},
        {"url": f"https://127.0.0.1:{port}"},
        {"admin_url": f"http://127.0.0.1:{port}/x"},
        {"admin_url": f"http://127.0.0.1:{port}?x"},
        {"admin_url": "http://127.0.0.1"},
        {"admin_url": f"http://127.0.0.1:{port + 1}"},
        {"admin_url": f"http://:{port}"},
        {"admin_url": "file:///etc/passwd"},
        {"port": 0},
        {"launcher": {"name": "x", "pid": -1, "start_ticks": 1}},
        {"launcher": {"name": "x", "pid": 0, "start_ticks": 1}},
        {"served_name": "x" * 1_000},
        {"state": "burning"},
        {"processes": None},
    ]
    for change in bad:
        (run_dir / "deployment.json").write_text(json.dumps(good | change))
        with pytest.raises(ConfigError, match="damaged"):
            read_record(run_dir)


# Tries everything that a local user has: argv[1] is JSON. Prints what succeeded.
WALK = """
asked = json.loads(sys.argv[1])
found = {"read": [], "listed": [], "connected": [], "answered": {}, "bound": [], "processes": []}
def tried(kind, what, action):
    try:
        action()
    except OSError:
        return
    found[kind].append(what)
for path in asked["paths"]:
    tried("read", path, lambda: open(path, "rb").read(1))
    tried("listed", path, lambda: os.listdir(path))
    tried("connected", path, lambda: socket.socket(socket.AF_UNIX).connect(path))
    tried("bound", path, lambda: socket.socket(socket.AF_UNIX).bind(path + ".mine"))
for port in asked["ports"]:
    for option in (None, socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        for host in ("127.0.0.1", "0.0.0.0"):
            thief = socket.socket()
            if option is not None:
                thief.setsockopt(socket.SOL_SOCKET, option, 1)
            tried("bound", [host, port, option], lambda: thief.bind((host, port)) or thief.listen())
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
for url in asked["urls"]:
    try:
        found["answered"][url] = opener.open(url, timeout=60).status
    except urllib.error.HTTPError as error:
        found["answered"][url] = error.code
for pid in asked["pids"]:
    for name in ("environ", "fd", "maps", "mem", "cwd", "fdinfo"):
        path = f"/proc/{pid}/{name}"
        tried("processes", path, lambda: os.listdir(path) if name.startswith("fd") else open(path, "rb").read(1))
    tried("processes", f"signal {pid}", lambda: os.kill(pid, signal.SIGTERM))
    tried("processes", f"pidfd {pid}", lambda: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGTERM))
print(json.dumps(found))
"""


def test_a_living_deployment_is_out_of_another_users_reach(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy("oracle", flags=("--keep-logs",))
    run_dir = deployment.run_dir
    run_dir.parent.chmod(0o755)  # as /tmp: the run directory itself has to do
    paths = [str(run_dir), *(str(path) for path in run_dir.rglob("*"))]
    assert len([path for path in paths if path.endswith(".sock")]) >= 7
    pids = [deployment.launcher.pid, *deployment.pids.values(), *deployment.rank_pids().values()]
    admin, router = deployment.admin_url, deployment.base_url
    urls = [f"{admin}/v1/layout", f"{admin}/v1/config", f"{admin}/metrics", f"{admin}/health", f"{router}/health"]
    record = deployment.record
    walked = as_other(
        WALK, json.dumps({"paths": paths, "ports": [record.port, record.admin_port], "urls": urls, "pids": pids})
    )
    answered = walked.pop("answered")
    assert [answered[url] for url in urls] == [401, 401, 401, 200, 200]
    assert walked == {"read": [], "listed": [], "connected": [], "bound": [], "processes": []}
    # While a process restarts its port is nobody's, and the token has gone to nobody.
    for name, port in (("scaler", record.admin_port), ("router", record.port)):
        old = deployment.kill(name)
        with pytest.raises(AssertionError, match="in use"):
            as_other("socket.create_server(('127.0.0.1', int(sys.argv[1])))", str(port))
        deployment.wait_restarted(name, old)
    deployment.wait_serving()
    assert main(["status", "--run-dir", str(run_dir)]) == 0
    deployment.stop()


# Listens on its stdin, and prints what the first connection says.
IMPOSTOR = """
listener = socket.socket(fileno=0)
listener.listen(8)
print(listener.accept()[0].recv(100), flush=True)
"""


def test_the_token_goes_to_no_listener_of_another_user(
    deploy: Callable[..., Deployment], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even where one took the place of the socket: which only we and root could do."""
    deployment = deploy("oracle")
    path = deployment.run_dir / "sockets" / "admin.sock"
    deployment.kill("scaler", signal.SIGSTOP)
    path.rename(path.with_suffix(".kept"))
    with socket.socket(socket.AF_UNIX) as impostor:
        impostor.bind(str(path))
        os.chmod(path, 0o666)
        command = other(IMPOSTOR)
        listening = subprocess.Popen(command, stdin=impostor.fileno(), stdout=subprocess.PIPE)
        wait_until(lambda: impostor.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN), "the impostor listens")
        for command in (("scale", "--replicas", "1"), ("events",), ("rebalance",)):
            assert main([*command, "--run-dir", str(deployment.run_dir)]) == 1
            assert f"unsafe_run_dir: uid {OTHER} listens on {path}" in capsys.readouterr().err
        assert listening.communicate(timeout=60)[0] == b"b''\n"
    path.unlink()
    path.with_suffix(".kept").rename(path)
    deployment.kill("scaler", signal.SIGCONT)
    deployment.wait_serving()
    deployment.stop()

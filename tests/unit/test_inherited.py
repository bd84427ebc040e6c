"""Listening sockets that are handed down: by number, by name, to the process that they are meant for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe.cli.children import tied_to_us
from elasticmoe.common.config import listen_fds
from elasticmoe.common.inherited import inherited
from elasticmoe.common.protocol.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent


def variables(monkeypatch: pytest.MonkeyPatch, pid: str, count: str, names: str) -> None:
    for name, value in (("LISTEN_PID", pid), ("LISTEN_FDS", count), ("LISTEN_FDNAMES", names)):
        monkeypatch.setenv(name, value)


def test_sockets_are_for_one_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listen_fds() == {}
    variables(monkeypatch, str(os.getpid()), "2", "router:admin")
    assert listen_fds() == {"router": 3, "admin": 4}
    monkeypatch.setenv("LISTEN_PID", str(os.getppid()))
    assert listen_fds() == {}
    assert inherited("router") is None


@pytest.mark.parametrize(
    ("count", "names"), [("", "a"), ("x", "a"), ("-1", "a"), ("2", "a"), ("1", "a:b"), ("17", ":" * 16)]
)
def test_variables_that_say_nothing_sensible_stop_the_start(
    count: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables(monkeypatch, str(os.getpid()), count, names)
    with pytest.raises(ConfigError, match="LISTEN_FDS"):
        listen_fds()


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    made = [socket.create_server(("127.0.0.1", 0)), socket.socket(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)]
    yield made
    for sock in made:
        sock.close()


PROGRAM = """
import os, sys
from elasticmoe.common.inherited import inherited
from elasticmoe.common.protocol.errors import ConfigError
for name in ("good", "bound", "datagram", "none"):
    try:
        sock = inherited(name)
        print(name, sock and (sock.getsockname()[1], os.get_inheritable(sock.fileno())))
    except ConfigError as error:
        print(name, error.message)
"""


def test_a_child_gets_them_in_order_whatever_their_numbers_are(sockets: list[socket.socket]) -> None:
    good, bound, datagram = sockets
    bound.bind(("127.0.0.1", 0))
    fds = (datagram.fileno(), good.fileno(), bound.fileno())
    names = {"LISTEN_FDS": "3", "LISTEN_FDNAMES": "datagram:good:bound", "PYTHONPATH": str(ROOT)}
    command = tied_to_us([sys.executable, "-c", PROGRAM], fds)
    done = subprocess.run(command, env=os.environ | names, pass_fds=fds, capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"good ({good.getsockname()[1]}, False)",
        "bound socket bound, descriptor 5, does not listen for streams",
        "datagram socket datagram, descriptor 3, does not listen for streams",
        "none None",
    ]

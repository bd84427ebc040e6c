"""The deployment's listening sockets, held by the launcher and handed to its children.

They are bound before anything starts and stay open while a child restarts: nobody else can take a port meanwhile, and
connections wait instead of being refused. `common/inherited.py` is where a child takes them over.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from elasticmoe.cli.probes import listen
from elasticmoe.cli.settings import Settings
from elasticmoe.common.protocol.errors import ConfigError

ROUTER, ADMIN, ADMIN_LOCAL = "router", "admin", "admin.sock"
_BACKLOG = 128


class Listeners:
    """Owns the sockets until `close`; children have copies."""

    def __init__(self, settings: Settings) -> None:
        """Bind the ports of `settings`; a port 0 becomes a free one. Raises InvalidRequest for one that is taken."""
        self.sockets: dict[str, socket.socket] = {}
        try:
            self.sockets[ROUTER] = listen(settings.router.host, settings.router.port, "--port")
            self.sockets[ADMIN] = listen(settings.scaler.admin_host, settings.scaler.admin_port, "--admin-port")
        except BaseException:
            self.close()
            raise

    def add_local(self, path: Path) -> None:
        """Bind the admin listener's Unix socket in the run directory, for this user alone. Raises ConfigError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            sock.bind(os.fspath(path))
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            raise ConfigError(f"socket {path}: {error.strerror}") from None
        finally:
            os.umask(before)
        self.sockets[ADMIN_LOCAL] = sock

    def port(self, name: str) -> int:
        """The number of a TCP socket's port."""
        return int(self.sockets[name].getsockname()[1])

    def close(self) -> None:
        """Close our copies: who connects from now on is refused, once the children have closed theirs. Idempotent."""
        for sock in self.sockets.values():
            sock.close()

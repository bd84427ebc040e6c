"""Listening sockets that outlive the process that serves them: whoever started it holds them and hands them down.

Nobody else can take the port while the process restarts, and connections that are made meanwhile wait in the socket's
queue instead of being refused. A process that was handed none makes its own.
"""

from __future__ import annotations

import os
import socket

from elasticmoe.common.config import listen_fds
from elasticmoe.common.protocol.errors import ConfigError


def inherited(name: str) -> socket.socket | None:
    """The listening stream socket called `name`, owned by the caller, or None when none was handed down.

    Raises ConfigError for a descriptor that is no such socket. Call once for each name: the descriptor is taken over.
    """
    fd = listen_fds().get(name)
    if fd is None:
        return None
    try:
        os.set_inheritable(fd, False)  # not for our own children
        sock = socket.socket(fileno=fd)
        is_listening = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ConfigError(f"socket {name}, descriptor {fd}: {error.strerror}") from None
    if not is_listening:
        sock.close()
        raise ConfigError(f"socket {name}, descriptor {fd}, does not listen for streams")
    return sock

"""`python -m elasticmoe.cli.chaos_prober HOST PORT`: asks a router for its health until standard input ends.

It says `BEGUN SECONDS` for each answer, on the clock that all processes share. A process of its own, so that what the
honest clients do in the meantime is not what it measures.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import time

from elasticmoe.cli.terminal import say

PAUSE_S = 0.05
_ANSWER_S_MAX = 10.0
_REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def probe(host: str, port: int) -> None:
    """Ask once, as an orchestrator does, by a connection of its own. Raises OSError where nobody answers."""
    with socket.create_connection((host, port), _ANSWER_S_MAX) as connection:
        connection.sendall(_REQUEST)
        while connection.recv(65_536):
            pass


def main() -> None:
    """Until standard input ends."""
    host, port = sys.argv[1], int(sys.argv[2])
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        begun = time.monotonic()
        with contextlib.suppress(OSError):  # a killed router; whether requests failed is the honest clients' to say
            probe(host, port)
            say(f"{begun} {time.monotonic() - begun}")


if __name__ == "__main__":
    main()

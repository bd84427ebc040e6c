"""A store as a real server."""

from __future__ import annotations

import subprocess
from pathlib import Path

from elasticmoe.cli.embedded_store import is_answering, server_binary


class Server:
    """A Valkey server on a Unix socket of its own, in `directory`. `kept`: a folder with what another one has written
    down, which it goes on with; else it keeps nothing."""

    def __init__(self, directory: Path, kept: Path | None = None) -> None:
        self.socket = directory / "store.sock"
        self._kept = kept
        self.url = f"unix://:secret@{self.socket}"
        self._directory = directory
        self.start()

    def start(self) -> None:
        flags = ["--port", "0", "--unixsocket", str(self.socket), "--requirepass", "secret", "--save", ""]
        flags += ["--appendonly", "yes"] if self._kept is not None else []
        self._process = subprocess.Popen(
            [server_binary(), *flags],
            cwd=self._kept or self._directory,
            stdout=subprocess.DEVNULL,
        )
        while not is_answering(self.socket, "secret"):
            assert self._process.poll() is None, "the server ended"

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)

"""A process that holds memory of a stand-in device: `python -m tests.devices.holder KIND LIBRARY SOCKET`. It does what
each line of its input says, a JSON array, and answers with one: until it is killed. Descriptors go by the socket
with that number."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from elasticmoe.common.devices.base import Device, FdToken, Handle, KeyToken, Range, Token
from elasticmoe.common.protocol.errors import ElasticMoEError
from tests.devices import standins

PAGE = standins.GRANULARITY


class Held:
    """The orders that a holder knows, each a method."""

    def __init__(self, device: Device, descriptors: socket.socket) -> None:
        self.device, self.descriptors = device, descriptors
        self.handle: Handle | None = None
        self.range: Range | None = None

    def number(self) -> int:
        """By what the owner admits this process."""
        return self.device.importer_number(0)

    def share(self, text: str, importer: int) -> int:
        """Make a handle with a text in it, and the key to import it by. Its descriptor, if it has one, is sent."""
        self.handle = self.device.create(PAGE, "kv")
        self._map()
        self.device.write_bytes(self._address(), text.encode())
        self.device.admit([importer])
        token = self.device.export(self.handle)
        if isinstance(token, FdToken):
            socket.send_fds(self.descriptors, [b"."], [token.fd])
        return token.key

    def take(self, key: int) -> None:
        """Import a handle and map it. Its descriptor, if it has one, has been sent."""
        token: Token = KeyToken(key, PAGE)
        if self.device.token_kind is FdToken:
            token = FdToken(received(self.descriptors), 0, PAGE, key)
        self.handle = self.device.import_(token)
        if isinstance(token, FdToken):
            os.close(token.fd)
        self._map()

    def read(self, nbytes: int) -> str:
        """What is at its beginning."""
        return self.device.read_bytes(self._address(), nbytes).decode()

    def _map(self) -> None:
        assert self.handle is not None
        self.range = self.device.reserve(PAGE)
        self.device.map(self.range, 0, self.handle, True)

    def _address(self) -> int:
        assert self.range is not None
        return self.range.base


def received(descriptors: socket.socket) -> int:
    """The descriptor that has been sent, the caller's to close."""
    _, (fd,), _, _ = socket.recv_fds(descriptors, 1, 1)
    return fd


class Holder:
    """The parent's end of one."""

    def __init__(self, kind: str, library: Path, settings: Mapping[str, str]) -> None:
        root, pipe = Path(__file__).parent.parent.parent, subprocess.PIPE
        self._descriptors, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.devices.holder", kind, str(library), str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, cwd=root, env=dict(settings), stdin=pipe, stdout=pipe, text=True, pass_fds=[theirs.fileno()]
            )

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.kill()

    def ask(self, *order: Any) -> Any:
        """Its answer to an order. Raises AssertionError with the code and the text of its error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def receive(self) -> int:
        """The descriptor of what it has shared, the caller's to close."""
        return received(self._descriptors)

    def send(self, fd: int) -> None:
        """Before it takes what a descriptor is of."""
        socket.send_fds(self._descriptors, [b"."], [fd])

    def kill(self) -> None:
        """With SIGKILL; its memory is as it is then. Idempotent."""
        self._process.kill()
        self._process.communicate()
        self._descriptors.close()


def main() -> None:
    """Do as the input says."""
    kind, library, number = sys.argv[1:]
    device = standins.device_class(kind, Path(library))(f"{kind}:0", PAGE, 8 * PAGE)
    held = Held(device, socket.socket(fileno=int(number)))
    for line in sys.stdin:
        name, *args = json.loads(line)
        try:
            answer = {"value": getattr(held, name)(*args)}
        except ElasticMoEError as error:
            answer = {"error": f"{error.code}: {error.message}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""A process that holds memory of a stand-in device: `python -m tests.devices.holder KIND LIBRARY`. It does what each
line of its input says, a JSON array, and answers with one: until it is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from elasticmoe.common.devices.base import Device, Handle, KeyToken, Range
from elasticmoe.common.protocol.errors import ElasticMoEError
from tests.devices import standins

PAGE = standins.GRANULARITY


class Held:
    """The orders that a holder knows, each a method."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.handle: Handle | None = None
        self.range: Range | None = None

    def number(self) -> int:
        """By what the owner admits this process."""
        return self.device.importer_number(0)

    def share(self, text: str, importer: int) -> int:
        """Make a handle with a text in it, and the number to import it by."""
        self.handle = self.device.create(PAGE, "kv")
        self._map()
        self.device.write_bytes(self._address(), text.encode())
        self.device.admit([importer])
        token = self.device.export(self.handle)
        assert isinstance(token, KeyToken)
        return token.key

    def take(self, key: int) -> None:
        """Import a handle and map it."""
        self.handle = self.device.import_(KeyToken(key, PAGE))
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


class Holder:
    """The parent's end of one."""

    def __init__(self, kind: str, library: Path, settings: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "tests.devices.holder", kind, str(library)]
        root = Path(__file__).parent.parent.parent
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=root, env=dict(settings), stdin=pipe, stdout=pipe, text=True)

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

    def kill(self) -> None:
        """With SIGKILL; its memory is as it is then."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Do as the input says."""
    held = Held(standins.device_class(sys.argv[1], Path(sys.argv[2]))(f"{sys.argv[1]}:0", PAGE, 8 * PAGE))
    for line in sys.stdin:
        name, *args = json.loads(line)
        try:
            answer = {"value": getattr(held, name)(*args)}
        except ElasticMoEError as error:
            answer = {"error": f"{error.code}: {error.message}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

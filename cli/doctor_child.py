"""Run by commands that use a device and load no driver, `elasticmoe doctor --device` above all: one process that uses a
device as an HMM or a rank does. It does what is asked of it by the socket with the number of its second argument, until
that is closed or somebody kills it.

An order and its answer are one packet each, in JSON, and at most one descriptor beside it.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from elasticmoe.cli.doctor_graph import captured, remap_under_graph
from elasticmoe.common.devices.base import Device, FdToken, Handle, KeyToken, Range, Token
from elasticmoe.common.devices.factory import backend_of, granularity_of, importer_number, memory_of, open_device
from elasticmoe.common.devices.names import DeviceCount, DeviceId
from elasticmoe.common.devices.telling import ask_driver
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit, ElasticMoEError

PACKET_BYTES_MAX = 1 << 16
_BUDGET = 8 << 30
_COPY_BYTES_MAX, _COPY_BYTES_MIN = 256 << 20, 4 << 20
_COPIES = 20
Answered = tuple[Any, int | None]  # a value, and a descriptor to go with it


class Tester:
    """The orders, each a public method. `name`: of the device."""

    def __init__(self, name: str) -> None:
        self._name, self._kind = name, DeviceId.parse(name).backend
        self._opened: Device | None = None
        self._held: list[tuple[Handle, Range]] = []

    @property
    def _device(self) -> Device:
        assert self._opened is not None, "`open` was the first order"
        return self._opened

    def open(self) -> Answered:
        """The granularity, and what the driver says of itself and of the device's memory; -1 for bytes of which it
        says nothing."""
        count = DeviceCount.of(self._kind, [DeviceId.parse(self._name).index])
        self._opened = open_device(self._name, granularity_of(count, 0), _BUDGET)
        free, total = self._memory()
        told = {"granularity": self._device.granularity, "free_bytes": free, "total_bytes": total}
        return told | ask_driver(self._kind)._asdict(), None

    def _memory(self) -> tuple[int, int]:
        try:
            told = backend_of(self._kind).memory(DeviceId.parse(self._name).index)
        except ElasticMoEError:
            told = None
        return told or (-1, -1)

    def memory(self, names: list[str]) -> Answered:
        """Free bytes and all bytes of each of these devices, by its name."""
        return memory_of(names), None

    def reaches(self) -> Answered:
        """Of each other device that the driver shows, by its name, whether this one can access its memory."""
        own, found = DeviceId.parse(self._name), dict[str, bool]()
        backend, index = backend_of(self._kind), 0
        while True:
            try:
                backend.check(index)
            except DeviceError:
                return found, None
            if index != own.index:
                other = str(DeviceId(own.host, own.backend, index))
                found[other] = self._device.reaches(other)
            index += 1

    def number(self) -> Answered:
        """By what an owner admits this process."""
        return importer_number(self._name), None

    def free(self) -> Answered:
        """Bytes of the device that nobody has; -1: the driver does not say."""
        return self._memory()[0], None

    def calls(self, num: int) -> Answered:
        """Median microseconds of what an owner does with one handle of the least size."""
        device, took = self._device, _Stopwatch()
        range_ = device.reserve(device.granularity)
        for _ in range(num):
            handle = took("create_us", partial(device.create, device.granularity, "kv"))
            took("export_us", partial(device.export, handle))
            took("map_us", partial(device.map, range_, 0, handle, True))
            took("unmap_us", partial(device.unmap, range_, 0))
            took("release_us", partial(_end, device, handle))
        device.unreserve(range_)
        return took.medians(), None

    def copies(self) -> Answered:
        """Bytes per second of copies within the device, as large as there is room for."""
        device, nbytes = self._device, _COPY_BYTES_MAX
        while True:
            made: list[Handle] = []
            try:
                made = [device.create(nbytes, "kv")]
                made.append(device.create(nbytes, "kv"))
                break
            except DoesNotFit:
                for handle in made:
                    _end(device, handle)
                if nbytes <= _COPY_BYTES_MIN:
                    raise
                nbytes //= 2
        range_ = device.reserve(2 * nbytes)
        device.map_many(range_, [(0, made[0]), (nbytes, made[1])], True)
        device.copy(range_.base + nbytes, range_.base, nbytes)
        begun = time.perf_counter()
        for _ in range(_COPIES):
            last = device.copy_async([(range_.base + nbytes, range_.base, nbytes)])
        last.wait()
        seconds = time.perf_counter() - begun
        for offset in (0, nbytes):
            device.unmap(range_, offset)
        device.unreserve(range_)
        for handle in made:
            _end(device, handle)
        return {"copy_bytes": nbytes, "copy_bytes_per_s": _COPIES * nbytes / seconds}, None

    def make(self, texts: list[str]) -> Answered:
        """A handle for each text, which is at its beginning; mapped."""
        device = self._device
        for text in texts:
            handle = device.create(device.granularity, "kv")
            self._hold(handle)
            device.write_bytes(self._held[-1][1].base, text.encode())
        return None, None

    def admit(self, numbers: list[int]) -> Answered:
        """Let processes import what is held."""
        self._device.admit(numbers)
        for handle, _ in self._held:
            self._device.export(handle)
        return None, None

    def export(self, at: int) -> Answered:
        """What another process imports the handle number `at` by."""
        token = self._device.export(self._held[at][0])
        if isinstance(token, KeyToken):
            return {"key": token.key, "nbytes": token.nbytes}, None
        return {"key": token.key, "nbytes": token.nbytes, "offset": token.offset}, token.fd

    def take(self, token: dict[str, int], fd: int | None = None) -> Answered:
        """Import a handle and map it: microseconds of both."""
        device, took = self._device, _Stopwatch()
        named: Token = KeyToken(token["key"], token["nbytes"])
        if fd is not None:
            named = FdToken(fd, token["offset"], token["nbytes"], token["key"])
        handle = took("import_us", partial(device.import_, named))
        took("map_us", partial(self._hold, handle))
        return took.medians(), None

    def read(self, at: int, nbytes: int) -> Answered:
        """What is at the beginning of the handle number `at`."""
        found = self._device.read_bytes(self._held[at][1].base, nbytes)
        return found.decode("latin-1"), None

    def write(self, at: int, text: str) -> Answered:
        """Put a text there."""
        self._device.write_bytes(self._held[at][1].base, text.encode())
        self._device.fence()
        return None, None

    def graph(self) -> Answered:
        """Replays of a captured graph before and after its weights' address was mapped anew; or why there were none."""
        import torch

        if self._kind == "npu":
            try:
                importlib.import_module("torch_npu")  # it makes itself known to torch
            except ImportError as error:
                return {"reason": f"torch_npu cannot be imported: {error}"[:300]}, None
        accelerator = getattr(torch, self._kind, None)
        if accelerator is None or not accelerator.is_available():
            return {"reason": f"torch {torch.__version__} has no {self._kind} device here"}, None
        accelerator.set_device(DeviceId.parse(self._name).index)
        self.open()
        before, after = remap_under_graph(self._device, captured(accelerator))
        return {"before": before, "after": after}, None

    def _hold(self, handle: Handle) -> None:
        range_ = self._device.reserve(handle.nbytes)
        self._device.map(range_, 0, handle, handle.writable)
        self._held.append((handle, range_))


class _Stopwatch:
    """Calls and how long they took, by name."""

    def __init__(self) -> None:
        self._took: dict[str, list[float]] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        made = call()
        self._took.setdefault(name, []).append((time.perf_counter() - begun) * 1e6)
        return made

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(all_), 1) for name, all_ in self._took.items()}


def _end(device: Device, handle: Handle) -> None:
    """As owners end a handle."""
    device.retire(handle)
    device.reclaim(handle, 0, handle.nbytes)
    device.release(handle)


def main() -> None:
    """Do as the socket says."""
    tester = Tester(sys.argv[1])
    with socket.socket(fileno=int(sys.argv[2])) as orders:
        while True:
            packet, fds, _, _ = socket.recv_fds(orders, PACKET_BYTES_MAX, 1)
            if not packet:
                return
            name, *args = json.loads(packet)
            try:
                value, fd = getattr(tester, name)(*args, *fds)
                answer: dict[str, Any] = {"value": value}
            except ElasticMoEError as error:
                answer, fd = {"code": error.code, "message": error.message}, None
            for received in fds:
                os.close(received)
            socket.send_fds(orders, [json.dumps(answer).encode()], [] if fd is None else [fd])


if __name__ == "__main__":
    main()

"""A keeper and an HMM as real processes, and a test that plays the scaler and the ranks towards them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from elasticmoe.common.config import HmmConfig, environment_of
from elasticmoe.common.devices.base import FdToken, Handle, KeyToken, ProcessRules, Range
from elasticmoe.common.devices.factory import granularity_of, importer_number, open_device
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.families import load_spec, parse_spec, records
from elasticmoe.common.fdchannel import Channel, connect
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.layout import Layout, RankId, initial_layout
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol import scaler
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.handles import (
    TO_RANK,
    Applied,
    Attach,
    AttachReply,
    FromHmm,
    SeatMemory,
    SharedHandle,
    SharedKey,
    ShareHandles,
)
from elasticmoe.common.protocol.hmm import CheckIntegrity, GetHmmStatus, LoadModel, SetMembership
from elasticmoe.common.protocol.keeper import FROM_KEEPER
from elasticmoe.common.protocol.replies import Ack, Refused
from elasticmoe.common.protocol.scaler import HmmStatus, Integrity
from elasticmoe.common.transport import Client, new_identity
from elasticmoe.native.bus import Bus
from elasticmoe.native.ledger import Ledger
from tests.procs.waiting import wait_until

ROOT = Path(__file__).parent.parent.parent
CALL_MS = 60_000


class Deployment:
    """One run directory. `close` ends every process and removes it."""

    def __init__(self, **settings: Any) -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="em-"))
        defaults = {"run_dir": str(self.run_dir), "devices": "host:2", "device_bytes": 64 << 20}
        self.settings: dict[str, Any] = {**defaults, **settings}
        self.config = msgspec.convert(self.settings, HmmConfig)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._clients: list[Client[Any]] = []
        self.ranks: list[Rank] = []
        self.keeper: subprocess.Popen[bytes] | None = None
        self.hmm: subprocess.Popen[bytes] | None = None

    def spawn(self, module: str, **settings: Any) -> subprocess.Popen[bytes]:
        """Start a service; what it writes to stderr is `log_of` it."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ELASTICMOE_")}
        with open(self.run_dir / f"err-{len(self._processes)}", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=ROOT,
                env=environment | environment_of({**self.settings, **settings}),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def log_of(self, process: subprocess.Popen[bytes]) -> str:
        """What a process wrote to stderr so far."""
        return (self.run_dir / f"err-{self._processes.index(process)}").read_text()

    def start_keeper(self) -> None:
        """Start a keeper and wait until it listens."""
        self.keeper = process = self.spawn("elasticmoe.services.hmm.keeper")
        wait_until(lambda: "keeper ready" in self.log_of(process), "the keeper starts")

    def start_hmm(self, **settings: Any) -> None:
        """Start an HMM and wait until it serves."""
        self.hmm = process = self.spawn("elasticmoe.services.hmm", **settings)
        wait_until(lambda: "hmm ready" in self.log_of(process) or process.poll() is not None, "the HMM starts")
        assert process.poll() is None, self.log_of(process)

    def kill_hmm(self) -> None:
        """kill -9."""
        assert self.hmm is not None
        self.hmm.kill()
        self.hmm.wait(60)

    def client(self, epoch: int = 1) -> Client[Any]:
        """A new scaler."""
        client = Client(self.config.socket("hmm"), new_identity("scaler"), scaler.CODEC)
        client.epoch = epoch
        self._clients.append(client)
        return client

    def call(self, body: Message, epoch: int = 1) -> Any:
        """One question of a new scaler. Raises the refusal."""
        return self.client(epoch).call(body, deadline_ms=CALL_MS)[0]

    def refusal(self, body: Message, epoch: int = 1) -> str:
        """The code with which the HMM refuses."""
        try:
            self.call(body, epoch)
        except ElasticMoEError as error:
            return error.code
        raise AssertionError(f"{body} was not refused")

    def status(self) -> HmmStatus:
        """The HMM's status, its figures checked."""
        status = self.call(GetHmmStatus())
        assert isinstance(status, HmmStatus)
        for device in status.devices:
            assert device.weights + device.kv + device.other + device.free == device.budget
        return status

    def wait_phase(self, phase: str) -> HmmStatus:
        """Wait until the HMM is in `phase`."""

        def reached() -> HmmStatus | None:
            status = self.status()
            assert status.phase in ("loading", phase), status
            return status if status.phase == phase else None

        return wait_until(reached, f"phase {phase}", 30.0)

    def integrity(self, checksums: bool = False) -> Integrity:
        """The HMM's findings."""
        answer = self.call(CheckIntegrity(checksums))
        assert isinstance(answer, Integrity)
        return answer

    def load(self, directory: Path, **changes: Any) -> LoadModel:
        """Load a checkpoint on both devices and wait until it is ready."""
        request = load_message(directory, **changes)
        assert isinstance(self.call(request), Ack)
        self.wait_phase("ready")
        return request

    def members(self, *slots: int, running: bool = True, epoch: int = 1) -> Any:
        """Publish membership."""
        return self.call(SetMembership(slots, running), epoch)

    def stop(self, process: subprocess.Popen[bytes] | None) -> int:
        """SIGTERM and wait; the exit code."""
        assert process is not None
        process.send_signal(signal.SIGTERM)
        return process.wait(60)

    def close(self) -> None:
        """End all."""
        for rank in self.ranks:
            rank.close()
        for client in self._clients:
            client.close()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait(60)
        shutil.rmtree(self.run_dir)


def load_message(directory: Path, **changes: Any) -> LoadModel:
    """A LoadModel for two devices."""
    counts = load_spec(directory, "float32").num_experts_by_layer if (directory / "config.json").exists() else (2,)
    layout: Layout = initial_layout(counts, ["host:0", "host:1"])
    request = LoadModel("load-1", str(directory), "float32", layout, 16, 4 << 20, 32, 4, 64)
    return msgspec.structs.replace(request, **changes)


class Rank:
    """One seat's memory as a rank maps it, in the test's own process. It follows what the HMM sends only when it is
    told to (`follow`). `close` is its death."""

    def __init__(self, deployment: Deployment, slot: int, **changes: Any) -> None:
        """Attach, map everything, and say so. Raises the HMM's refusal."""
        self.request = msgspec.structs.replace(
            Attach(RankId(slot, 0), slot, f"host:{slot}", f"r{slot}:{os.urandom(4).hex()}"),
            importer=importer_number(f"host:{slot}"),
            **changes,
        )
        self.device = open_device(
            self.request.device, granularity_of(DeviceCount("host", 1), 4096), rules=ProcessRules()
        )
        self.fds: list[int] = []
        self.records: dict[RecordKey, Range] = {}
        self.kv: list[Range] = []
        self.received: list[SeatMemory] = []
        self._handles: dict[int, Handle] = {}
        self._ranges: dict[int, Range] = {}
        self.channel = connect(deployment.config.socket("handles"), new_identity("rank"), TO_RANK)
        try:
            self.reply, fds = receive(self.channel, self.request)
        except BaseException:
            self.channel.close()
            raise
        deployment.ranks.append(self)
        segments = (self.reply.bus, self.reply.ledger)
        self._shared = [HostShared.open(os.dup(fds[segment.fd]), segment.nbytes) for segment in segments]
        self.bus = Bus(self._shared[0].address, self._shared[0].nbytes, slot)
        self.ledger = Ledger(self._shared[1].address, self._shared[1].nbytes)
        for fd in fds:
            os.close(fd)
        self.apply(*self.next_seat())

    @property
    def seat(self) -> SeatMemory:
        """What the HMM sent last."""
        return self.received[-1]

    def _map(self, name: int, writable: bool) -> Range:
        if name not in self._ranges:
            handle = self._handles[name]
            range_ = self.device.reserve(handle.nbytes)
            self.device.map(range_, 0, handle, writable)
            self._ranges[name] = range_
        return self._ranges[name]

    def _import(self, message: ShareHandles, fds: list[int]) -> None:
        for shared in message.handles:
            if shared.id not in self._handles:
                self._handles[shared.id] = self.device.import_(_token(shared, fds))
        for fd in fds:
            os.close(fd)

    def handle(self, name: int) -> Handle:
        """An imported handle by its id."""
        return self._handles[name]

    def take(self, seat: SeatMemory, fds: list[int]) -> None:
        """Map and unmap as `seat` says, without an answer."""
        for fd in self.fds:
            os.close(fd)
        self.fds = fds
        self.received.append(seat)
        self.records = {item.key: self._map(item.handle, False) for item in seat.records}
        self.kv = [self._map(name, True) for name in seat.kv]
        named = {*(item.handle for item in seat.records), *seat.kv}
        for name in set(self._handles) - named:
            if (range_ := self._ranges.pop(name, None)) is not None:
                self.device.unmap(range_, 0)
                self.device.unreserve(range_)
            self.device.release(self._handles.pop(name))

    def apply(self, seat: SeatMemory, fds: list[int]) -> None:
        """`take`, and answer."""
        self.take(seat, fds)
        self.channel.send(Applied(seat.revision))

    def next_seat(self) -> tuple[SeatMemory, list[int]]:
        """The next goal of the HMM, to be applied later; handles that come before it are imported."""
        while True:
            received, fds = self.channel.receive(deadline_ms=CALL_MS)
            if not isinstance(received.body, ShareHandles):
                break
            self._import(received.body, fds)
        assert isinstance(received.body, SeatMemory)
        return received.body, fds

    def follow(self) -> None:
        """Apply all that the HMM has sent by now."""
        poller = select.poll()
        poller.register(self.channel.fileno(), select.POLLIN)
        while poller.poll(0):
            self.apply(*self.next_seat())

    def resume(self, deployment: Deployment, *, silent: bool = False) -> None:
        """Introduce the living rank to a restarted HMM, and do as it says. `silent`: without an answer."""
        self.channel.close()
        self.channel = connect(deployment.config.socket("handles"), new_identity("rank"), TO_RANK)
        reply, fds = receive(self.channel, msgspec.structs.replace(self.request, resume=True))
        assert reply.memory_id == self.reply.memory_id
        for fd in fds:
            os.close(fd)
        (self.take if silent else self.apply)(*self.next_seat())

    def checksums(self) -> dict[str, int]:
        """Hash of each record as this process sees it, named as the HMM names them."""
        return {
            f"{self.request.device}/{key}": self.device.checksum(range_.base, range_.nbytes)
            for key, range_ in self.records.items()
        }

    def bytes_of(self, key: RecordKey, offset: int, nbytes: int) -> bytes:
        """A part of a record."""
        return self.device.read_bytes(self.records[key].address(offset), nbytes)

    def block(self, number: int) -> bytes:
        """One KV block."""
        return self.device.read_bytes(self._block(number), self.reply.kv_geometry.block_bytes)

    def write_block(self, number: int, data: bytes) -> None:
        """Put `data` at the beginning of a KV block."""
        self.device.write_bytes(self._block(number), data)

    def _block(self, number: int) -> int:
        geometry = self.reply.kv_geometry
        handle, index = divmod(number, geometry.blocks_per_handle)
        return self.kv[handle].address(index * geometry.block_stride)

    def is_rung(self) -> bool:
        """Whether the own doorbell rang since it was last asked."""
        fd = self.fds[self.seat.doorbells[self.seat.slots.index(self.request.slot)]]
        try:
            return os.eventfd_read(fd) > 0
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Die. Idempotent."""
        self.channel.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        for shared in self._shared:
            shared.close()
        self.device.close()


def _token(shared: SharedHandle, fds: list[int]) -> FdToken | KeyToken:
    if isinstance(shared.token, SharedKey):
        return KeyToken(shared.token.key, shared.nbytes)
    return FdToken(fds[shared.token.fd], shared.token.offset, shared.nbytes, shared.token.key)


def receive(channel: Channel[FromHmm], request: Attach) -> tuple[AttachReply, list[int]]:
    """Ask to be attached. Raises the refusal."""
    channel.send(request)
    received, fds = channel.receive(deadline_ms=CALL_MS)
    if isinstance(received.body, Refused):
        raise ElasticMoEError(received.body.message, code=received.body.code)
    assert isinstance(received.body, AttachReply)
    return received.body, fds


def hollow_checkpoint(directory: Path, config: dict[str, Any], stored: str = "F32") -> Path:
    """A checkpoint of zeros that takes no disk space, however large: for loads that last a while."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    size = 4 if stored == "F32" else 2
    for record in records(parse_spec(config, "float32")):
        for source in (source for tensor in record.tensors for source in tensor.sources):
            nbytes = size
            for dim in source.shape:
                nbytes *= dim
            header[source.name] = {"dtype": stored, "shape": list(source.shape), "data_offsets": [at, at + nbytes]}
            at += nbytes
    raw = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return directory


def keeper_channel(deployment: Deployment):  # type: ignore[no-untyped-def]
    return connect(deployment.config.socket("keeper"), new_identity("hmm"), FROM_KEEPER)


def kept_bytes(deployment: Deployment) -> int:
    """Real memory behind everything that the keeper holds."""
    assert deployment.keeper is not None
    total = 0
    for fd in Path(f"/proc/{deployment.keeper.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if "memfd:" in os.readlink(fd):
                total += fd.stat().st_blocks * 512
    return total


def peak_bytes(pid: int) -> int:
    """Peak resident memory of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024

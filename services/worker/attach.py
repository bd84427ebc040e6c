"""Attach to a seat's memory: map what the HMM hands over, wrap it in tensors, copy nothing.

One virtual range for the base and layer records; one per MoE layer with a slot for *every* expert of the model at
`expert * stride`, of which only the held ones are mapped, so that an expert's address never changes; one for the KV
blocks, reserved for the most that the device could hold; one each for the bus and the ledger.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common import fdchannel
from common.devices.base import Range, Token
from common.devices.host import HostDevice
from common.families import record
from common.model_spec import DTYPE_BYTES, ModelSpec, RecordKey, RecordSpec, round_up
from common.protocol.errors import ElasticMoEError, ProtocolError
from common.protocol.handles import TO_RANK, Attach, AttachReply, Extent
from common.protocol.pool import StartRank
from common.protocol.replies import Refused
from native.bus import Bus
from native.ledger import Ledger
from services.worker.model.weights import KvCache, RankWeights

ATTACH_MS = 10_000
RESUME_MS = 2_000  # the HMM listens only once it can answer; meanwhile this rank, and so all, do not step


@dataclass(slots=True)
class Memory:
    """What a rank has mapped. Owned by the rank; `close` unmaps everything, after which no tensor may be touched.

    `doorbells`: eventfd of each slot; the rank sleeps on its own. `channel`: its end tells the HMM that the rank died.
    """

    device: HostDevice
    reply: AttachReply
    weights: RankWeights
    bus: Bus
    ledger: Ledger
    doorbells: dict[int, int]
    channel: fdchannel.Channel[AttachReply | Refused]
    attach_ms: float

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self.channel.close()
        for fd in self.doorbells.values():
            os.close(fd)
        self.doorbells.clear()
        self.device.close()


def attach(socket_path: Path, seat: StartRank, identity: str) -> Memory:
    """Attach to the memory of `seat`. Blocks for the HMM's answer, at most ATTACH_MS.

    Raises the HMM's refusal, Unavailable without an HMM, DeviceError for a hand-over that breaks the device's rules.
    Nothing stays mapped or open after an error.
    """
    started = time.perf_counter()
    channel = fdchannel.connect(socket_path, identity, TO_RANK)
    try:
        reply, fds = _request(channel, seat)
    except BaseException:
        channel.close()
        raise
    device = HostDevice(seat.device, reply.granularity)
    doorbells: dict[int, int] = {}
    try:
        doorbells = {slot: os.dup(fds[index]) for slot, index in zip(reply.slots, reply.doorbells, strict=True)}
        weights = _map_weights(device, reply, fds)
        bus = Bus(*_map_one(device, reply.bus, fds), seat.slot)
        ledger = Ledger(*_map_one(device, reply.ledger, fds))
    except BaseException:
        channel.close()
        for fd in doorbells.values():
            os.close(fd)
        device.close()
        raise
    finally:
        for fd in fds:
            os.close(fd)
    return Memory(
        device, reply, weights, bus, ledger, doorbells, channel, attach_ms=(time.perf_counter() - started) * 1e3
    )


def resume(socket_path: Path, seat: StartRank, identity: str) -> fdchannel.Channel[AttachReply | Refused]:
    """Introduce a living rank to a restarted HMM, which watches the returned channel. The mappings stay as they are.

    Raises Unavailable while there is no HMM, or its refusal.
    """
    channel = fdchannel.connect(socket_path, identity, TO_RANK, deadline_ms=200)
    try:
        _, fds = _request(channel, seat, resuming=True)
        for fd in fds:
            os.close(fd)
    except BaseException:
        channel.close()
        raise
    return channel


def _request(
    channel: fdchannel.Channel[AttachReply | Refused], seat: StartRank, *, resuming: bool = False
) -> tuple[AttachReply, list[int]]:
    channel.send(Attach(seat.rank, seat.slot, seat.device, seat.incarnation, resuming))
    received, fds = channel.receive(deadline_ms=RESUME_MS if resuming else ATTACH_MS)
    if isinstance(received.body, Refused):
        for fd in fds:
            os.close(fd)
        received.body.raise_()
        raise AssertionError("unreachable")
    return received.body, fds


def _token(extent: Extent, fds: list[int]) -> Token:
    if not 0 <= extent.fd < len(fds):
        raise ProtocolError(f"extent names descriptor {extent.fd} of {len(fds)}")
    return Token(fds[extent.fd], extent.offset, extent.nbytes)


def _map_one(device: HostDevice, extent: Extent, fds: list[int]) -> tuple[int, int]:
    """Map one handle read-write in a range of its own: (address, bytes)."""
    range_ = device.reserve(extent.nbytes)
    device.map(range_, 0, device.import_(_token(extent, fds)), True)
    return range_.base, extent.nbytes


def _map_weights(device: HostDevice, reply: AttachReply, fds: list[int]) -> RankWeights:
    spec = reply.spec
    extents = {item.key: item.extent for item in reply.records}
    base = _map_record(device, record(spec, RecordKey("base")), extents, fds)
    layers = [
        _map_record(device, record(spec, RecordKey("layer", layer)), extents, fds) for layer in range(spec.num_layers)
    ]
    experts = [_map_experts(device, spec, layer, count, extents, fds) for layer, count in _moe_layers(spec)]
    return RankWeights(spec, base, layers, experts, _map_kv(device, reply, fds))


def _moe_layers(spec: ModelSpec) -> list[tuple[int, int]]:
    return list(enumerate(spec.num_experts_by_layer))


def _map_record(
    device: HostDevice, described: RecordSpec, extents: dict[RecordKey, Extent], fds: list[int]
) -> dict[str, torch.Tensor]:
    extent = extents.get(described.key)
    if extent is None or extent.nbytes < described.nbytes:
        raise ElasticMoEError(f"record {described.key} was not handed over, or too small", code="missing_record")
    range_ = device.reserve(extent.nbytes)
    device.map(range_, 0, device.import_(_token(extent, fds)), False)
    return {
        tensor.name: device.wrap(range_, tensor.offset, tensor.shape, None, tensor.dtype)
        for tensor in described.tensors
    }


def _map_experts(
    device: HostDevice, spec: ModelSpec, layer: int, count: int, extents: dict[RecordKey, Extent], fds: list[int]
) -> dict[str, torch.Tensor]:
    """Reserve a slot for every expert of the layer, map those that were handed over, wrap all as strided tensors."""
    if count == 0:
        return {}
    described = record(spec, RecordKey("expert", layer, 0))
    stride = round_up(described.nbytes, device.granularity)
    range_ = device.reserve(count * stride)
    held = [(expert, extents.get(RecordKey("expert", layer, expert))) for expert in range(count)]
    device.map_many(
        range_,
        [(expert * stride, device.import_(_token(extent, fds))) for expert, extent in held if extent is not None],
        False,
    )
    return {
        tensor.name: _wrap_slots(device, range_, tensor.offset, count, stride, tensor.shape, tensor.dtype)
        for tensor in described.tensors
    }


def _wrap_slots(
    device: HostDevice, range_: Range, offset: int, count: int, stride: int, shape: tuple[int, ...], dtype: str
) -> torch.Tensor:
    strides: list[int] = [1]
    for dim in reversed(shape[1:]):
        strides.insert(0, strides[0] * dim)
    return device.wrap(range_, offset, (count, *shape), (stride // DTYPE_BYTES[dtype], *strides), dtype)


def _map_kv(device: HostDevice, reply: AttachReply, fds: list[int]) -> KvCache:
    geometry = reply.kv_geometry
    range_ = device.reserve(max(reply.kv_bytes_reserved, len(reply.kv) * geometry.handle_bytes))
    device.map_many(
        range_,
        [(i * geometry.handle_bytes, device.import_(_token(extent, fds))) for i, extent in enumerate(reply.kv)],
        True,
    )
    return KvCache(range_.base, len(reply.kv) * geometry.blocks_per_handle, geometry)

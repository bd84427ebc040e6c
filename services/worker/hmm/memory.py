"""What a rank has mapped, and how it follows what the HMM says the seat shall have.

One virtual range for each of the base and layer records; one per MoE layer with a slot for *every* expert of the model
at `expert * stride`, of which only the held ones are mapped, so that an expert's address never changes; one for the KV
blocks, reserved for the most that the device could hold; one for the mailbox of each seat of the host, where the
exchange needs them. Bus and ledger are memory of the host.

A SeatMemory is a goal: what is named and not mapped is mapped, what is mapped and not named is unmapped, all else stays
untouched. The rank works at it between its steps, a slice at a time, so that serving goes on; experts that come or go
are in no routing table that a step uses, and KV blocks that go are vacated first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import torch

from elasticmoe.common.devices.base import FdToken, Handle, KeyToken, Range
from elasticmoe.common.devices.factory import open_device
from elasticmoe.common.devices.rules import Token
from elasticmoe.common.families import record
from elasticmoe.common.families.fingerprint import fingerprint
from elasticmoe.common.fdchannel import close_all
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.model_spec import DTYPE_BYTES, RecordKey, round_up
from elasticmoe.common.protocol.errors import DeviceError, ElasticMoEError, ProtocolError
from elasticmoe.common.protocol.handles import (
    AttachReply,
    Routing,
    SeatMemory,
    Segment,
    SharedHandle,
    SharedKey,
    ShareHandles,
)
from elasticmoe.common.sharding import shard_of
from elasticmoe.native.bus import Bus
from elasticmoe.native.ledger import Ledger
from elasticmoe.services.worker.hmm.link import Handed
from elasticmoe.services.worker.hmm.mailboxes import Mailboxes
from elasticmoe.services.worker.model.weights import KvCache, RankWeights

SLICE_BYTES = 64 << 20  # mapped or unmapped between two steps: populating it takes some 8 ms


@dataclass(frozen=True, slots=True)
class _Mapping:
    """One record or KV handle in its place; `id` is the handle's."""

    range_: Range
    offset: int
    handle: Handle
    id: int


@dataclass(slots=True)
class _Goal:
    """A SeatMemory that is not reached yet."""

    seat: SeatMemory
    unmap: list[RecordKey]
    map: list[tuple[RecordKey, int]]


class RankMemory:
    """A seat's memory in this process. Owned by the rank's thread; `close` unmaps everything, after which no tensor may
    be touched.

    `doorbells`: eventfd of each slot; the rank sleeps on its own. `mailboxes`: by slot, of the own seat and all that it
    may exchange tokens with; empty where `exchange` needs none. `routings`: owners of the experts, by epoch.
    `replica`: slots of the ranks of its replica, by tp index. `revision`: of the latest goal that was reached.
    """

    def __init__(
        self, reply: AttachReply, fds: list[int], device: str, slot: int, handed: Iterable[Handed], tp_index: int = 0
    ) -> None:
        """Map what `reply` and the messages `handed` say, the last of which is a SeatMemory; all descriptors are closed
        and their lists emptied. `tp_index`: whose shards of base and layers they are.

        Raises DeviceError for a hand-over that breaks the device's rules, or where the device is other hardware than
        the HMM's (other_hardware), ProtocolError (version_mismatch for memory
        that means something else to this version), ElasticMoEError missing_record; nothing stays mapped or open then.
        """
        self.memory_id = reply.memory_id
        self.spec = reply.spec
        self._num_experts = reply.spec.num_experts_by_layer
        self._described = cache(partial(record, reply.spec))  # each is asked for several times
        self.exchange = reply.exchange
        try:
            self._check_version(reply)
            self.device = open_device(device, reply.granularity)
        except BaseException:
            _close(fds)
            raise
        self.doorbells: dict[int, int] = {}
        self.routings: dict[int, Routing] = {}
        self.replica: tuple[int, ...] = ()
        self._slot = slot
        self._shard = tp_index
        self._records: dict[RecordKey, _Mapping] = {}
        self._kv: list[_Mapping] = []
        self._geometry = reply.kv_geometry
        self.revision = 0
        self._goal: _Goal | None = None
        self._shared: list[HostShared] = []  # of the host: bus and ledger
        self._handles: dict[int, Handle] = {}  # imported ones, by id
        self._offered: set[int] = set()  # ids that were shared since the latest goal
        try:
            self._open_all(reply, fds)
            for message in handed:
                self.take(*message)
            while not self.advance(self._set_num_blocks, populate=False):
                pass
            self.weights = self._wrap()
        except BaseException:
            self.close()
            raise
        finally:
            _close(fds)

    def _check_version(self, reply: AttachReply) -> None:
        """Fields of a spec that this version does not know were dropped by now: the fingerprint tells of them, too."""
        if reply.fingerprint != fingerprint(reply.spec, self._described):
            raise ProtocolError(
                "the HMM's memory was laid out by a version that lays it out in another way", code="version_mismatch"
            )

    def _open_all(self, reply: AttachReply, fds: list[int]) -> None:
        self.device.check_identity(reply.identity)
        self._experts = [self._reserve_experts(layer) for layer in range(self.spec.num_layers)]
        self._kv_range = self.device.reserve(reply.kv_bytes_reserved)
        self.kv = KvCache(self._wrap_kv(), 0, self._geometry, self.device, self._kv_range.base)
        bus, ledger = (self._open(segment, fds) for segment in (reply.bus, reply.ledger))
        self.bus = Bus(bus.address, bus.nbytes, self._slot)
        self.ledger = Ledger(ledger.address, ledger.nbytes)
        self.mailboxes = Mailboxes(self.device, self.bus)

    def _set_num_blocks(self, num_blocks: int) -> bool:
        self.kv.num_blocks = num_blocks
        return True

    @property
    def held(self) -> list[list[int]]:
        """Experts that are mapped, ascending, by layer."""
        held: list[list[int]] = [[] for _ in range(self.spec.num_layers)]
        for key in sorted(self._records):
            if key.kind == "expert":
                held[key.layer].append(key.expert)
        return held

    # ---- Goals

    def take(self, message: ShareHandles | SeatMemory, fds: list[int]) -> None:
        """Import handles, or take a new goal in place of the one in progress. `fds` are closed, also after an error,
        and the list is emptied.

        Raises ProtocolError, or DeviceError: `record_moved` where something mapped is said to lie elsewhere, or a
        handle to be another one."""
        try:
            if isinstance(message, ShareHandles):
                self._import(message, fds)
            else:
                self._begin(message, fds)
        finally:
            _close(fds)

    def _import(self, message: ShareHandles, fds: list[int]) -> None:
        for shared in message.handles:
            known = self._handles.get(shared.id)
            if known is None:
                self._handles[shared.id] = self.device.import_(_token(shared, fds))
            elif known.nbytes != shared.nbytes:
                text = f"handle {shared.id} of {known.nbytes} bytes is said to have {shared.nbytes}"
                raise DeviceError(text, code="record_moved")
            elif not self.device.is_named(known, _token(shared, fds)):
                # Its memory was given back while this rank was away, and the id is another's now.
                raise DeviceError(f"handle {shared.id} is said to be another one", code="record_moved")
            self._offered.add(shared.id)

    def _begin(self, seat: SeatMemory, fds: list[int]) -> None:
        wanted = {item.key: item.handle for item in seat.records}
        named = {*wanted.values(), *seat.kv}
        if missing := named - self._handles.keys():
            raise ProtocolError(f"handle {min(missing)} is named, but was not shared")
        for key, mapping in self._records.items():
            if mapping.id != wanted.get(key, mapping.id):
                raise DeviceError(f"record {key} cannot move while it is mapped", code="record_moved")
        for at, (mapping, name) in enumerate(zip(self._kv, seat.kv, strict=False)):
            if mapping.id != name:
                raise DeviceError(f"KV handle {at} cannot move while it is mapped", code="record_moved")
        mapped = {mapping.id for mapping in (*self._records.values(), *self._kv)}
        for name in self._handles.keys() - named - mapped:  # a goal that was replaced had named them
            self.device.release(self._handles.pop(name))
        self._offered.clear()
        self._goal = _Goal(
            seat,
            [key for key in self._records if key not in wanted],
            [(key, name) for key, name in wanted.items() if key not in self._records],
        )
        self.replica = seat.replica
        self._take_doorbells(seat, fds)
        self.mailboxes.follow({shared.slot: _token(shared.handle, fds) for shared in seat.mailboxes})
        self.routings.clear()
        self.routings.update((routing.epoch, routing) for routing in seat.routings)

    def _take_doorbells(self, seat: SeatMemory, fds: list[int]) -> None:
        for slot in set(self.doorbells) - set(seat.slots):
            os.close(self.doorbells.pop(slot))
        for slot, index in zip(seat.slots, seat.doorbells, strict=True):
            # A slot that was given to another rank has a new doorbell; the own one is being slept on and never changes.
            if slot != self._slot or slot not in self.doorbells:
                new = os.dup(_fd(fds, index))
                if slot in self.doorbells:
                    os.close(self.doorbells[slot])
                self.doorbells[slot] = new

    @property
    def is_changing(self) -> bool:
        """Whether a goal is being worked at."""
        return self._goal is not None

    def advance(self, resize_kv: Callable[[int], bool], *, populate: bool = True) -> int:
        """Work at the goal, between two steps: at most SLICE_BYTES are mapped or unmapped. `resize_kv(num_blocks)` sets
        the number of blocks in use, and vacates those behind; it is asked again at the next call while it says False.

        Returns the revision that is now reached, else 0. Raises DeviceError, ProtocolError.
        """
        goal = self._goal
        if goal is None:
            return 0
        num_kv, per_handle = len(goal.seat.kv), self._geometry.blocks_per_handle
        if num_kv < len(self._kv):
            if not resize_kv(num_kv * per_handle):
                return 0
            self._unmap(self._kv[num_kv:])
            del self._kv[num_kv:]
        left, gone = SLICE_BYTES if populate else 1 << 62, list[_Mapping]()
        while goal.unmap and left > 0:
            gone.append(self._records.pop(goal.unmap.pop()))
            left -= gone[-1].handle.nbytes
        self._unmap(gone)
        left = self._map_records(goal, left, populate)
        if left > 0:
            left = self._map_kv(goal, left)
        if left <= 0 or not resize_kv(num_kv * per_handle):
            return 0
        self._goal, self.revision = None, goal.seat.revision
        return self.revision

    def _map_records(self, goal: _Goal, left: int, populate: bool) -> int:
        """Map records until `left` bytes are used up; what is left then."""
        by_range: dict[int, tuple[Range, list[tuple[int, Handle]]]] = {}
        while goal.map and left > 0:
            key, name = goal.map.pop()
            handle = self._handles[name]
            range_, offset = self._place(key, handle.nbytes)
            by_range.setdefault(range_.base, (range_, []))[1].append((offset, handle))
            self._records[key] = _Mapping(range_, offset, handle, name)
            left -= handle.nbytes
        for range_, parts in by_range.values():
            self.device.map_many(range_, parts, False, populate=populate)
        return left

    def _map_kv(self, goal: _Goal, left: int) -> int:
        parts = []
        while len(self._kv) < len(goal.seat.kv) and left > 0:
            name = goal.seat.kv[len(self._kv)]
            offset, handle = len(self._kv) * self._geometry.handle_bytes, self._handles[name]
            parts.append((offset, handle))
            self._kv.append(_Mapping(self._kv_range, offset, handle, name))
            left -= handle.nbytes
        self.device.map_many(self._kv_range, parts, True)
        return left

    def _unmap(self, mappings: list[_Mapping]) -> None:
        """All at once: the device is waited for once."""
        if not mappings:
            return
        self.device.unmap_many([(mapping.range_, mapping.offset) for mapping in mappings])
        self.device.check_usable()  # of one that has failed it is unmapped in name alone, until this process ends
        for mapping in mappings:
            if mapping.id not in self._offered:  # else the next goal names it again
                self.device.release(self._handles.pop(mapping.id))

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._goal = None
        close_all(self.doorbells.values())
        self.doorbells.clear()
        for shared in self._shared:
            shared.close()
        self._shared.clear()
        self.device.close()

    # ---- Places

    def _open(self, segment: Segment, fds: list[int]) -> HostShared:
        shared = HostShared.open(os.dup(_fd(fds, segment.fd)), segment.nbytes)
        self._shared.append(shared)
        return shared

    def _reserve_experts(self, layer: int) -> tuple[Range, int] | None:
        """A slot for every expert of the layer: the range, and the bytes from slot to slot."""
        count = self._num_experts[layer]
        if not count:
            return None
        stride = round_up(self._described(RecordKey("expert", layer, 0)).nbytes, self.device.granularity)
        return self.device.reserve(count * stride), stride

    def _place(self, key: RecordKey, nbytes: int) -> tuple[Range, int]:
        """Where a record belongs. Raises ProtocolError for one that the model does not have."""
        if key.kind != "expert":
            return self.device.reserve(nbytes), 0
        slots = self._experts[key.layer] if 0 <= key.layer < len(self._experts) else None
        if slots is None or not 0 <= key.expert < self._num_experts[key.layer]:
            raise ProtocolError(f"{key} is not a record of this model")
        return slots[0], key.range_offset(slots[1])

    # ---- Tensors

    def _wrap(self) -> RankWeights:
        spec = self.spec
        base = self._wrap_record(RecordKey("base", shard=self._shard))
        layers = [self._wrap_record(RecordKey("layer", layer, shard=self._shard)) for layer in range(spec.num_layers)]
        experts = [self._wrap_experts(layer) for layer in range(spec.num_layers)]
        return RankWeights(spec, base, layers, experts, self.kv, shard_of(spec, self._shard))

    def _wrap_kv(self) -> torch.Tensor:
        """One strided tensor over all blocks that the range has room for, mapped or not."""
        spec, block, kv = self.spec, self._geometry, self.spec.rank_attention.kv
        shape = (spec.num_layers, kv.planes, kv.heads, block.block_size, kv.width)
        stride, count = block.block_stride, self._kv_range.nbytes // block.block_stride
        return self.device.wrap(
            self._kv_range, 0, (count, *shape), (stride // DTYPE_BYTES[spec.dtype], *_strides(shape)), spec.dtype
        )

    def _wrap_record(self, key: RecordKey) -> dict[str, torch.Tensor]:
        described, mapping = self._described(key), self._records.get(key)
        if mapping is None or mapping.handle.nbytes < described.nbytes:
            size = mapping.handle.nbytes if mapping is not None else 0
            text = f"of record {key}, {size} bytes were handed over; it has at least {described.nbytes}"
            raise ElasticMoEError(text, code="missing_record")
        return {
            tensor.name: self.device.wrap(mapping.range_, tensor.offset, tensor.shape, None, tensor.dtype)
            for tensor in described.tensors
        }

    def _wrap_experts(self, layer: int) -> dict[str, torch.Tensor]:
        """One strided tensor over all slots of the layer, mapped or not."""
        slots, count = self._experts[layer], self._num_experts[layer]
        if slots is None:
            return {}
        range_, stride = slots
        return {
            tensor.name: self.device.wrap(
                range_,
                tensor.offset,
                (count, *tensor.shape),
                (stride // DTYPE_BYTES[tensor.dtype], *_strides(tensor.shape)),
                tensor.dtype,
            )
            for tensor in self._described(RecordKey("expert", layer, 0)).tensors
        }


def _strides(shape: Iterable[int]) -> tuple[int, ...]:
    """Of a row-major tensor."""
    strides = [1]
    for dim in list(shape)[:0:-1]:
        strides.insert(0, strides[0] * dim)
    return tuple(strides)


def _fd(fds: list[int], index: int) -> int:
    if not 0 <= index < len(fds):
        raise ProtocolError(f"message names descriptor {index} of {len(fds)}")
    return fds[index]


def _token(shared: SharedHandle, fds: list[int]) -> Token:
    if isinstance(shared.token, SharedKey):
        return KeyToken(shared.token.key, shared.nbytes)
    return FdToken(_fd(fds, shared.token.fd), shared.token.offset, shared.nbytes, shared.token.key)


def _close(fds: list[int]) -> None:
    close_all(fds)
    fds.clear()

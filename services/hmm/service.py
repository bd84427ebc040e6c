"""The HMM's I/O shell: one loop that polls its sockets, answers, and notices the deaths of ranks.

The loop's thread owns sockets and catalog. Loads and checksums run in threads of their own (background.py), so that a
rank's death is published at once whatever else goes on.
"""

from __future__ import annotations

import os
import select
from typing import Final

from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.fdchannel import Channel
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import Conflict, ElasticMoEError, InvalidRequest, NotFound, Unavailable
from elasticmoe.common.protocol.handles import Attach, FromRank
from elasticmoe.common.protocol.hmm import (
    AbortLayout,
    CheckIntegrity,
    CommitLayout,
    CopyBlocks,
    GetHmmStatus,
    LoadModel,
    ReleaseLayout,
    SetMembership,
    StageLayout,
    ToHmm,
)
from elasticmoe.common.protocol.limits import TP_MAX
from elasticmoe.common.protocol.replies import Ack, Refused, refusal
from elasticmoe.common.protocol.scaler import Integrity
from elasticmoe.common.stop_signals import StopSignals
from elasticmoe.services.hmm.loading.loader import ModelLoad
from elasticmoe.services.hmm.memory.blocks import check_ranks
from elasticmoe.services.hmm.memory.catalog import Loaded, layouts
from elasticmoe.services.hmm.parts import Parts
from elasticmoe.services.hmm.sessions.attachments import Attached
from elasticmoe.services.hmm.sessions.handles import (
    Importers,
    attach_reply,
    full_view,
    replica_devices,
    seat_for,
    seat_memory,
)
from elasticmoe.services.hmm.sessions.membership import Membership, slots_of_mask
from elasticmoe.services.hmm.status import Loading, hmm_status
from elasticmoe.services.hmm.transition.transition import Transitions

_KEEPER_WAIT_S: Final = 10.0
_STOP_WAIT_S: Final = 5.0
_TURN_MS: Final = 500  # between looks at clocks: the keeper's return, silent connections
_MESSAGES_PER_TURN: Final = 64
_COPIES_WAIT_S: Final = 1.0  # for copies into a slot whose rank is gone: each of their parts takes microseconds


class Hmm:
    """One host's memory manager. `start`, then `run`; `close` always. Owned by the thread that made it; only `stop` may
    come from elsewhere. What drives it otherwise calls `adopt`, then `turn` whenever there is something to look at."""

    def __init__(self, parts: Parts) -> None:
        self._devices = parts.devices
        self._clock = parts.clock
        self._log = parts.log
        self._server = parts.server
        self._attachments = parts.attachments
        self._parking = parts.parking
        self._holdings = parts.holdings
        self._background = parts.background
        self._copies = parts.copies
        self._supply = parts.supply
        self._large_pages = parts.large_pages
        self._fence = parts.fence
        self._members = Membership(parts.holdings, parts.log)
        self._importers = Importers(parts.attachments.by_slot)
        self._transitions = Transitions(
            parts.holdings,
            parts.attachments,
            self._members,
            parts.copies,
            parts.supply,
            parts.log,
            parts.clock,
        )
        self._loading = Loading()
        self._signals = StopSignals(self.stop)
        self._watched: set[int] = set()
        self._failed: set[str] = set()  # devices of which that was logged
        self._is_stopping = False

    # ---- Life

    def stop(self) -> None:
        """Let `run` return."""
        self._is_stopping = True

    def start(self) -> None:
        """Find the keeper and adopt what it holds. Raises Unavailable when it is not there in time."""
        self._signals.listen()
        poller = select.poll()
        poller.register(self._signals.fileno(), select.POLLIN)
        deadline = self._clock.monotonic() + _KEEPER_WAIT_S
        while not self._is_stopping:
            try:
                self._parking.connect()
                break
            except Unavailable:
                if self._clock.monotonic() > deadline:
                    raise Unavailable(f"the keeper is not there after {_KEEPER_WAIT_S:.0f} s") from None
                poller.poll(50)
        if not self._is_stopping:
            self.adopt()
            self._log.info("hmm ready", **self._facts())

    def adopt(self) -> None:
        """Go on with what the keeper holds, and let ranks attach."""
        self._holdings.start()
        self._notice_failures()
        self._transitions.adopt()
        self._attachments.open()

    def _facts(self) -> dict[str, object]:
        budgets = {memory.device.budget for memory in self._holdings.memories.values()}
        return {
            "pid": os.getpid(),
            "phase": self._loading.phase(self._holdings),
            "devices": self._devices,
            "device_bytes": max(budgets),
            "granularity": self._holdings.granularity,
            "fence_epoch": self._fence.epoch,
        }

    def run(self) -> None:
        """Serve until a signal."""
        while not self._is_stopping:
            failpoint("hmm.turn")
            self._watch()
            self.turn(self._server.poll(0 if self._supply.is_claiming else self._attachments.turn_ms(_TURN_MS)))
        self._log.info("hmm stops")

    def turn(self, ready: set[int]) -> None:
        """Take what has come, and do what can be done now. Does not wait. `ready`: descriptors that are readable."""
        self._background.finish()
        self._notice_failures()
        for attached in self._attachments.take(ready):
            self._on_death(attached)
        if self._parking.fileno() in ready:
            self._parking.hear()
        self._parking.retry()
        for channel, request in self._attachments.requests(ready):
            self._on_attach(channel, request)
        self._attachments.accept(ready)
        for _ in range(_MESSAGES_PER_TURN):
            message = self._server.receive()
            if message is None:
                break
            self._on_message(*message)
        self._transitions.advance()
        if not self._loading.is_at_work:
            self._supply.give_back_leftovers()
        self._large_pages.turn(self._clock.monotonic(), is_loading=self._loading.is_at_work)

    def _notice_failures(self) -> None:
        for name, memory in self._holdings.memories.items():
            if memory.device.failure and name not in self._failed:
                self._failed.add(name)
                self._log.error("device cannot be used", device=name, reason=memory.device.failure)

    def _watch(self) -> None:
        wanted = {self._signals.fileno(), self._background.fileno(), *self._attachments.fds()}
        if self._parking.is_connected:
            wanted.add(self._parking.fileno())
        for fd in self._watched - wanted:
            self._server.unwatch(fd)
        for fd in wanted - self._watched:
            self._server.watch(fd)
        self._watched = wanted

    def close(self) -> None:
        """End everything of this process; what the keeper holds lives on. Idempotent but for the signal handlers."""
        if self._loading.load is not None and self._loading.is_at_work:
            self._loading.load.abort()
        self._transitions.stop()
        self._copies.close()
        is_quiet = self._background.join(_STOP_WAIT_S)
        self._signals.close()
        self._attachments.close()
        self._server.close()
        self._parking.close()
        if is_quiet:  # else a thread still writes there; the process's end unmaps it
            self._background.close()
            self._holdings.close()

    # ---- Control messages

    def _on_message(self, peer: bytes, message: Received[ToHmm]) -> None:
        answer: Message | None
        try:
            answer = self._answer(peer, message)
        except ElasticMoEError as error:
            self._log.warning("refused", kind=type(message.body).__name__, code=error.code, reason=error.message)
            answer = refusal(error)
        except Exception as error:  # one message must not end the loop
            self._log.exception("message failed", kind=type(message.body).__name__)
            answer = Refused("internal_error", f"{type(message.body).__name__} failed with {type(error).__name__}")
        if answer is not None:
            self._server.send(peer, answer, seq=message.seq)

    def _answer(self, peer: bytes, message: Received[ToHmm]) -> Message | None:
        body = message.body
        if isinstance(body, GetHmmStatus):
            self._fence.heed(message.epoch)  # a scaler that has just taken over asks before it commands
            return hmm_status(
                self._holdings,
                self._attachments,
                self._members,
                self._loading,
                self._transitions,
                self._large_pages.large,
                self._fence.num_refused,
            )
        if isinstance(body, CheckIntegrity):
            return self._check_integrity(peer, message.seq, body)
        if isinstance(body, CopyBlocks):
            self._copy_blocks(peer, message.seq, body)
            return None
        self._fence.check(message.epoch, message.sender)
        if isinstance(body, LoadModel):
            self._load_model(body)
        elif isinstance(body, SetMembership):
            self._set_membership(body)
        elif isinstance(body, StageLayout):
            self._transitions.stage(body)
        elif isinstance(body, CommitLayout):
            self._transitions.commit(body.id)
        elif isinstance(body, ReleaseLayout):
            self._transitions.release(body.id, body.gone)
        elif isinstance(body, AbortLayout):
            self._transitions.abort(body.id, body.gone)
        return Ack()

    def _load_model(self, request: LoadModel) -> None:
        current = self._loading.op_id(self._holdings)
        if current == request.op_id and self._loading.error is None:
            return
        if self._loading.is_at_work or self._holdings.loaded is not None:
            raise Conflict(f"operation {current} has loaded a model or is about to; this one is {request.op_id}")
        try:
            request.layout.check()
        except ValueError as error:
            raise InvalidRequest(f"layout: {error}") from None
        if request.layout.tp > TP_MAX:
            raise InvalidRequest(f"tp {request.layout.tp} exceeds the limit of {TP_MAX}", code="tp_unsupported")
        unknown = [seat.device for seat in request.layout.seats if seat.device not in self._holdings.memories]
        if unknown:
            raise NotFound(f"device {unknown[0]} is not one of {self._devices}")
        segment = self._holdings.prepare(request.layout)
        load = ModelLoad(request, self._holdings.memories, segment, self._holdings.granularity)
        self._loading = Loading(load, is_at_work=True)
        started = self._clock.monotonic()
        self._log.info("load starts", operation_id=request.op_id, seats=len(request.layout.seats))
        self._background.start("load", load.run, lambda result: self._on_loaded(load, result, started))

    def _on_loaded(self, load: ModelLoad, result: Loaded | ElasticMoEError, started: float) -> None:
        op_id, seconds = load.request.op_id, self._clock.monotonic() - started
        if isinstance(result, ElasticMoEError):
            self._holdings.discard()
            self._loading = Loading(load, error=refusal(result))
            self._log.error("load failed", operation_id=op_id, code=result.code, reason=result.message)
            return
        self._holdings.commit(result)
        self._loading = Loading(load)
        self._log.info("load done", operation_id=op_id, seconds=seconds, bytes_read=load.bytes_done)

    def _set_membership(self, request: SetMembership) -> None:
        loaded = self._holdings.loaded
        if loaded is None:
            raise Conflict("no model is ready", code="not_ready")
        foreign = sorted(set(request.slots) - set(loaded.layout.slots))
        if foreign:
            raise NotFound(f"slot {foreign[0]} is not in layout {loaded.layout.epoch}")
        absent = sorted(set(request.slots) - set(self._attachments.by_slot))
        if request.running and absent:  # the others would wait for it
            raise Unavailable(f"slot {absent[0]} has no attached rank", code="not_attached")
        self._members.publish(request.slots, request.running)

    def _copy_blocks(self, peer: bytes, seq: int, request: CopyBlocks) -> None:
        """Answered when it is over."""
        loaded, by_slot = self._holdings.loaded, self._attachments.by_slot
        source, target = by_slot.get(request.source_slot), by_slot.get(request.target_slot)
        check_ranks(request, (source, target))
        assert loaded is not None, "a rank is of a loaded model"
        assert source is not None, "check_ranks has looked"
        assert target is not None, "check_ranks has looked"

        def answer(error: ElasticMoEError | None) -> None:
            self._server.send(peer, Ack() if error is None else refusal(error), seq=seq)

        known = layouts(loaded, self._holdings.transition)[1]
        here, there = (replica_devices(rank.device, known) for rank in (source, target))
        if len(here) != len(there):
            raise NotFound(f"the replica of slot {request.source_slot} is not in a layout any more")
        memories = self._holdings.memories
        pairs = [(memories[one], memories[other]) for one, other in zip(here, there, strict=True)]
        self._copies.start(request, pairs, loaded.kv, answer)

    def _check_integrity(self, peer: bytes, seq: int, request: CheckIntegrity) -> Message | None:
        if self._loading.is_at_work:
            raise Conflict("memory is being filled; ask again when the load is over", code="loading")
        findings = tuple(self._holdings.check_integrity() + self._check_members())
        if not request.checksums:
            return Integrity(findings, {})
        jobs = self._holdings.checksum_jobs()

        def answer(result: dict[str, int] | ElasticMoEError) -> None:
            self._holdings.num_readers -= 1
            body = refusal(result) if isinstance(result, ElasticMoEError) else Integrity(findings, result)
            self._server.send(peer, body, seq=seq)

        self._holdings.num_readers += 1
        self._background.start(
            "checksums",
            lambda: {name: device.checksum(address, nbytes) for name, device, address, nbytes in jobs},
            answer,
        )
        return None

    def _check_members(self) -> list[str]:
        """No owner is dead: every member of a running generation is attached."""
        _, members, is_running, _ = self._members.current()
        absent = set(slots_of_mask(members)) - set(self._attachments.by_slot) if is_running else set()
        return [f"bus: slot {slot} is a running member, but no rank is attached there" for slot in sorted(absent)]

    # ---- Ranks

    def _on_attach(self, channel: Channel[FromRank], request: Attach) -> None:
        try:
            loaded, transition = self._holdings.loaded, self._holdings.transition
            seat = seat_for(loaded, transition, request)
            before = self._attachments.ended_now(request.slot)
            if before is not None:
                self._on_death(before)
            self._attachments.check_vacant(request.slot)
            if not self._copies.wait_stopped(request.slot, _COPIES_WAIT_S):
                raise Unavailable(f"blocks are still copied from or to slot {request.slot}", code="copying")
            assert loaded is not None, "a seat is of a loaded model"
            memory = self._holdings.memories[seat.device]
            importer = self._importers.of(request)
            importer.admit(memory.device)
            handed = seat_memory(full_view(memory, loaded, transition), memory, self._holdings, importer)
            attached = self._attachments.admit(channel, request, *attach_reply(memory, self._holdings))
            attached.importer = importer  # it knows what this one was admitted to
            self._attachments.update(attached, *handed)
        except ElasticMoEError as error:
            self._log.warning("attach refused", slot=request.slot, code=error.code, reason=error.message)
            self._attachments.refuse(channel, error)
            return
        self._log.info(
            "rank attached", rank=request.rank, slot=request.slot, rank_id=request.incarnation, resumed=request.resume
        )
        self._transitions.on_attach(request.slot)
        if not request.resume:  # its predecessor may have died while nobody was here to see it
            self._members.park(request.slot)

    def _on_death(self, attached: Attached) -> None:
        """A rank's connection ended: the others must not wait for it."""
        self._log.warning("rank detached", rank=attached.rank, slot=attached.slot, rank_id=attached.incarnation)
        self._members.park(attached.slot)
        self._transitions.on_detach(attached.slot)
        self._copies.stop(attached.slot)

"""The HMM's I/O shell: one loop that polls its sockets, answers, and notices the deaths of ranks.

The loop's thread owns sockets and catalog. Loads and checksums run in threads of their own (background.py), so that a
rank's death is published at once whatever else goes on.
"""

from __future__ import annotations

import os
import select
import signal
import time
from typing import Final, Literal

from common.config import HmmConfig
from common.fdchannel import Channel, Listener
from common.fence import Fence
from common.protocol.codec import Message, Received
from common.protocol.errors import Conflict, ElasticMoEError, InvalidRequest, NotFound, Unavailable
from common.protocol.handles import Attach
from common.protocol.hmm import CODEC, CheckIntegrity, GetHmmStatus, LoadModel, SetMembership, ToHmm
from common.protocol.replies import Ack, Refused, refusal
from common.protocol.scaler import DeviceStatus, HmmStatus, Integrity
from common.telemetry import setup_logging
from common.transport import Server, new_identity
from native import host
from services.hmm.background import Background
from services.hmm.catalog import Loaded
from services.hmm.handles import Attached, Attachments, attach_reply, seat_for
from services.hmm.holdings import Holdings
from services.hmm.loader import Load
from services.hmm.parking import Parking

_KEEPER_WAIT_S: Final = 10.0
_STOP_WAIT_S: Final = 5.0
_TURN_MS: Final = 500  # between looks at clocks: the keeper's return, silent connections
_MESSAGES_PER_TURN: Final = 64


class Hmm:
    """One host's memory manager. `start`, then `run`; `close` always."""

    def __init__(self, config: HmmConfig) -> None:
        """Takes the run directory's HMM sockets. Raises Conflict (already_running) where another HMM has them."""
        self._config = config
        self._identity = new_identity("hmm")
        self._server = Server(config.socket("hmm"), self._identity, CODEC)
        try:
            # Opened once everything is adopted: a rank that steps must not wait in a connection for that.
            listener = Listener(config.socket("handles"), is_open=False)
        except BaseException:
            self._server.close()
            raise
        self._log = setup_logging("hmm", level=config.log_level, as_json=config.log_json)
        self._listener = listener
        self._attachments = Attachments(listener, self._identity, self._log)
        self._parking = Parking(config.socket("keeper"), self._identity, self._log)
        self._holdings = Holdings(config, self._parking, self._log)
        self._background = Background(self._log)
        self._fence = Fence(config.state_dir, "hmm")
        self._load: Load | None = None  # the latest one, also when it is over
        self._is_loading = False
        self._load_error: Refused | None = None
        self._wake_out, self._wake_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watched: set[int] = set()
        self._is_stopping = False

    # ---- Life

    def stop(self, *_: object) -> None:
        """Signal handler: only records."""
        self._is_stopping = True

    def start(self) -> None:
        """Find the keeper and adopt what it holds. Raises Unavailable when it is not there in time."""
        signal.set_wakeup_fd(self._wake_in, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        poller = select.poll()
        poller.register(self._wake_out, select.POLLIN)
        deadline = time.monotonic() + _KEEPER_WAIT_S
        while not self._is_stopping:
            try:
                self._parking.connect()
                break
            except Unavailable:
                if time.monotonic() > deadline:
                    raise Unavailable(f"the keeper is not there after {_KEEPER_WAIT_S:.0f} s") from None
                poller.poll(50)
        if not self._is_stopping:
            self._holdings.start()
            self._listener.open()
            self._log.info("hmm ready", **self._facts())

    def _facts(self) -> dict[str, object]:
        budgets = {memory.device.budget for memory in self._holdings.memories.values()}
        return {
            "pid": os.getpid(),
            "phase": self._phase(),
            "devices": self._config.devices,
            "device_bytes": max(budgets),
            "granularity": self._holdings.granularity,
            "fence_epoch": self._fence.epoch,
        }

    def run(self) -> None:
        """Serve until a signal."""
        while not self._is_stopping:
            self._watch()
            ready = self._server.poll(_TURN_MS)
            self._background.finish()
            for attached in self._attachments.ended(ready):
                self._on_death(attached)
            if self._parking.fileno() in ready:
                self._parking.lose("it closed the connection")
            self._parking.retry()
            for channel, request in self._attachments.requests(ready):
                self._on_attach(channel, request)
            self._attachments.accept(ready)
            for _ in range(_MESSAGES_PER_TURN):
                message = self._server.receive()
                if message is None:
                    break
                self._on_message(*message)
        self._log.info("hmm stops")

    def _watch(self) -> None:
        wanted = {self._wake_out, self._background.fileno(), *self._attachments.fds()}
        if self._parking.is_connected:
            wanted.add(self._parking.fileno())
        for fd in self._watched - wanted:
            self._server.unwatch(fd)
        for fd in wanted - self._watched:
            self._server.watch(fd)
        self._watched = wanted

    def close(self) -> None:
        """End everything of this process; what the keeper holds lives on. Idempotent but for the signal handlers."""
        if self._load is not None and self._is_loading:
            self._load.abort()
        is_quiet = self._background.join(_STOP_WAIT_S)
        signal.set_wakeup_fd(-1)
        self._attachments.close()
        self._server.close()
        self._parking.close()
        if is_quiet:  # else a thread still writes there; the process's end unmaps it
            self._background.close()
            self._holdings.close()
        os.close(self._wake_in)
        os.close(self._wake_out)

    # ---- Control messages

    def _on_message(self, peer: bytes, message: Received[ToHmm]) -> None:
        answer: Message | None
        try:
            answer = self._answer(peer, message)
        except ElasticMoEError as error:
            self._log.warning("refused", message=type(message.body).__name__, code=error.code, reason=error.message)
            answer = refusal(error)
        except Exception as error:  # one message must not end the loop
            self._log.exception("message failed", message=type(message.body).__name__)
            answer = Refused("internal_error", f"{type(message.body).__name__} failed with {type(error).__name__}")
        if answer is not None:
            self._server.send(peer, answer, seq=message.seq)

    def _answer(self, peer: bytes, message: Received[ToHmm]) -> Message | None:
        body = message.body
        if isinstance(body, GetHmmStatus):
            return self._status()
        if isinstance(body, CheckIntegrity):
            return self._check_integrity(peer, message.seq, body)
        self._fence.check(message.epoch, message.sender)
        return self._load_model(body) if isinstance(body, LoadModel) else self._set_membership(body)

    def _load_model(self, request: LoadModel) -> Message:
        current = self._op_id()
        if current == request.op_id:
            return Ack()
        if self._is_loading or self._holdings.loaded is not None:
            raise Conflict(f"operation {current} has loaded a model or is about to; this one is {request.op_id}")
        try:
            request.layout.check()
        except ValueError as error:
            raise InvalidRequest(f"layout: {error}") from None
        unknown = [seat.device for seat in request.layout.seats if seat.device not in self._holdings.memories]
        if unknown:
            raise NotFound(f"device {unknown[0]} is not one of {self._config.devices}")
        segment = self._holdings.prepare(request.layout)
        load = Load(request, self._holdings.memories, segment, self._holdings.granularity)
        self._load, self._is_loading, self._load_error = load, True, None
        started = time.monotonic()
        self._log.info("load starts", op_id=request.op_id, seats=len(request.layout.seats))
        self._background.start("load", load.run, lambda result: self._on_loaded(load, result, started))
        return Ack()

    def _on_loaded(self, load: Load, result: Loaded | ElasticMoEError, started: float) -> None:
        self._is_loading = False
        op_id, seconds = load.request.op_id, time.monotonic() - started
        if isinstance(result, ElasticMoEError):
            self._holdings.discard()
            self._load_error = refusal(result)
            self._log.error("load failed", op_id=op_id, code=result.code, reason=result.message)
            return
        self._holdings.commit(result)
        self._log.info("load done", op_id=op_id, seconds=seconds, bytes_read=load.bytes_done)

    def _set_membership(self, request: SetMembership) -> Message:
        loaded = self._holdings.loaded
        if loaded is None:
            raise Conflict("no model is ready", code="not_ready")
        foreign = sorted(set(request.slots) - set(loaded.layout.slots))
        if foreign:
            raise NotFound(f"slot {foreign[0]} is not in layout {loaded.layout.epoch}")
        absent = sorted(set(request.slots) - set(self._attachments.by_slot))
        if request.running and absent:  # the others would wait for it
            raise Unavailable(f"slot {absent[0]} has no attached rank", code="not_attached")
        self._publish(sum(1 << slot for slot in set(request.slots)), request.running)
        return Ack()

    def _publish(self, members: int, is_running: bool) -> None:
        """Raise the generation on the bus and wake everybody."""
        segment = self._holdings.segment
        assert segment is not None, "a loaded model has a bus"
        assert segment.bus is not None, "a loaded model's bus is open"
        generation = segment.bus.membership()[0] + 1
        segment.bus.set_membership(generation, members, is_running)
        self._holdings.ring()
        self._log.info("membership", generation=generation, members=_slots(members), running=is_running)

    def _check_integrity(self, peer: bytes, seq: int, request: CheckIntegrity) -> Message | None:
        if self._is_loading:
            raise Conflict("memory is being filled; ask again when the load is over", code="loading")
        findings = tuple(self._holdings.check_integrity() + self._check_members())
        if not request.checksums:
            return Integrity(findings, {})
        jobs = self._holdings.checksum_jobs()

        def answer(result: dict[str, int] | ElasticMoEError) -> None:
            body = refusal(result) if isinstance(result, ElasticMoEError) else Integrity(findings, result)
            self._server.send(peer, body, seq=seq)

        self._background.start(
            "checksums", lambda: {name: host.checksum(address, nbytes) for name, address, nbytes in jobs}, answer
        )
        return None

    def _check_members(self) -> list[str]:
        """No owner is dead: every member of a running generation is attached."""
        segment = self._holdings.segment
        if segment is None or segment.bus is None:
            return []
        _, members, is_running = segment.bus.membership()
        absent = set(_slots(members)) - set(self._attachments.by_slot) if is_running else set()
        return [f"bus: slot {slot} is a running member, but no rank is attached there" for slot in sorted(absent)]

    # ---- Status

    def _op_id(self) -> str | None:
        if self._load is not None:
            return self._load.request.op_id
        return self._holdings.loaded.load.op_id if self._holdings.loaded else None

    def _phase(self) -> Literal["empty", "loading", "ready", "failed"]:
        if self._is_loading:
            return "loading"
        if self._holdings.loaded is not None:
            return "ready"
        return "failed" if self._load_error is not None else "empty"

    def _status(self) -> HmmStatus:
        holdings, load = self._holdings, self._load
        generation, members, is_running = 0, 0, False
        if not self._is_loading and holdings.segment is not None and holdings.segment.bus is not None:
            generation, members, is_running = holdings.segment.bus.membership()
        return HmmStatus(
            phase=self._phase(),
            bytes_done=load.bytes_done if load else 0,
            bytes_total=load.bytes_total if load else 0,
            error=self._load_error,
            devices=tuple(self._device_status(name) for name in holdings.memories),
            generation=generation,
            members=_slots(members),
            running=is_running,
            op_id=self._op_id(),
            layout=holdings.loaded.layout if holdings.loaded else None,
        )

    def _device_status(self, name: str) -> DeviceStatus:
        memory, loaded = self._holdings.memories[name], self._holdings.loaded
        seat = loaded.layout.seat_on(name) if loaded else None
        attached = self._attachments.by_slot.get(seat.slot) if seat else None
        used = memory.device.used
        num_experts, num_blocks = 0, 0
        if loaded is not None:  # else the load's thread may be at work on these
            num_experts = sum(key.kind == "expert" for key in memory.records)
            num_blocks = len(memory.kv) * loaded.kv.blocks_per_handle
        return DeviceStatus(
            device=name,
            budget=memory.device.budget,
            weights=used["weights"],
            kv=used["kv"],
            other=used["shared"],
            free=memory.device.budget - sum(used.values()),
            num_experts=num_experts,
            kv_blocks=num_blocks,
            attached=attached.incarnation if attached else None,
        )

    # ---- Ranks

    def _on_attach(self, channel: Channel[Attach], request: Attach) -> None:
        try:
            loaded = self._holdings.loaded
            seat = seat_for(loaded, request)
            before = self._attachments.ended_now(request.slot)
            if before is not None:
                self._on_death(before)
            segment = self._holdings.segment
            assert loaded is not None, "a seat is of a loaded model"
            assert segment is not None, "a loaded model has a bus"
            memory = self._holdings.memories[seat.device]
            reply, fds = attach_reply(loaded, memory, segment, self._holdings.doorbells, self._holdings.granularity)
            self._attachments.admit(channel, request, reply, fds)
        except ElasticMoEError as error:
            self._log.warning("attach refused", slot=request.slot, code=error.code, reason=error.message)
            self._attachments.refuse(channel, error)
            return
        self._log.info(
            "rank attached", rank=request.rank, slot=request.slot, rank_id=request.incarnation, resumed=request.resume
        )
        if not request.resume:  # its predecessor may have died while nobody was here to see it
            self._park(request.slot)

    def _on_death(self, attached: Attached) -> None:
        """A rank's connection ended: the others must not wait for it."""
        self._log.warning("rank detached", rank=attached.rank, slot=attached.slot, rank_id=attached.incarnation)
        self._park(attached.slot)

    def _park(self, slot: int) -> None:
        """Stop the running generation if `slot` takes part in it."""
        segment = self._holdings.segment
        if segment is None or segment.bus is None:
            return
        _, members, is_running = segment.bus.membership()
        if is_running and members >> slot & 1:
            self._publish(members, False)


def _slots(mask: int) -> tuple[int, ...]:
    return tuple(slot for slot in range(mask.bit_length()) if mask >> slot & 1)

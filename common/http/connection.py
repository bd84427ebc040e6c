"""uvicorn's HTTP protocol with what it lacks: bounds on connections, heads and framing, framing without doubt, and
refusals that their clients can read.

What comes after a request that was refused, or that was the connection's last, is never parsed: `_is_deaf`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import httptools
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from elasticmoe.common.http import framing
from elasticmoe.common.http.cycle import Cycle, PlainCycle
from elasticmoe.common.http.orderly import OrderlyProtocol, Outlet
from elasticmoe.common.http.places import Places
from elasticmoe.common.http.refusal import Refusal, bad_request, explain, too_many

HEAD_SECONDS_MAX = 10.0  # for a request's head, and for the rest of a body that nobody reads
GUEST_SECONDS_MAX = 2.0  # for a head where no place is free
HALF_CLOSED_SECONDS = 2.0  # for the answers to a client that has closed its side
CONFIRM_SECONDS = 0.1  # for a busy loop to read what has come
HEAD_BYTES_MAX = 64 * 1024
GUEST_HEAD_BYTES_MAX = 8 * 1024
GUESTS_MAX = 1_024  # connections that are turned away with an answer at the same time
FIELDS_MAX = 128
FRAMING_FACTOR = 8  # bytes on the wire per byte of a body, at worst: chunks of one byte
CHUNKS_FREE = 65_536  # of a body, whatever its size; beyond them a chunk has CHUNK_BYTES_MEAN_MIN bytes on average
CHUNK_BYTES_MEAN_MIN = 64
UNREAD_BYTES_MAX = 64 * 1024  # of a body that is passed over to reach the next request
PIPELINED_MAX = 16  # requests that wait for the answer to an earlier one

_NOTED = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"})
_IDLE, _HEAD, _BODY = range(3)  # what comes next: a request, the rest of its head, the rest of its body


@dataclass(frozen=True, slots=True)
class Rules:
    """What differs between listeners. `probes`: paths that are answered even where no place is free. `refused`: called
    with the status of each answer that no application gave."""

    connections_max: int
    body_bytes_max: int
    probes: frozenset[str]
    refused: Callable[[int], None]
    guests_max: int = GUESTS_MAX


class Connection(OrderlyProtocol):
    """One connection. Subclasses made by `guarded` have the listener's rules and places."""

    rules: ClassVar[Rules]
    places: ClassVar[Places[Connection]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = httptools.HttpRequestParser(self)  # uvicorn's has leniencies
        self._is_deaf = False
        self._is_guest = False
        self._has_peer_ended = False
        self._refusal: Refusal | None = None  # to be answered after the requests before it
        self._front: Cycle | None = None  # the request that is answered, or was last
        self._state = _IDLE
        self._has_cycle = False  # of the request that is being parsed
        self._hosts: list[bytes] = []
        self._codings: list[bytes] = []
        self._content_length = -1
        self._num_wire_bytes = 0  # of what `_state` tells
        self._num_idle_bytes = 0  # of these, since anything of a body came
        self._num_fields = 0  # of the head, then of the trailers
        self._num_chunks = 0

    # ---- the transport's side ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place, or be a guest."""
        super().connection_made(transport)
        self._outlet = Outlet(self, self.close)
        has_place, victim = self.places.enter(self, self.loop.time())
        self._is_guest = not has_place
        if victim is not None:
            victim.make_room()
        self._await(HEAD_SECONDS_MAX if has_place else GUEST_SECONDS_MAX, self._overdue)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back, and let the applications know."""
        self._is_deaf = True
        self.places.leave(self)
        self._disconnect()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The peer sends no more. It may have left, or only have closed its side (`nc -N`, some probes): what it asked
        to read it gets, where that begins soon. Who waits for work has left: nothing else tells that a client does."""
        asked = [cast(Cycle, cycle) for cycle in (*(cycle for cycle, _ in self.pipeline), self._front)]
        if not self._is_answering or self._state != _IDLE or not all(cycle.is_reading for cycle in asked):
            return False
        self._is_deaf = self._has_peer_ended = True
        asked[0].keep_alive = False  # the newest
        self._await(HALF_CLOSED_SECONDS, self._drop)
        return True

    def data_received(self, data: bytes) -> None:
        """Count before and after parsing: whoever sends heads or framing without end is cut off."""
        if self._is_deaf:
            return
        self._unset_keepalive_if_required()
        if not self._is_answering:
            self._await(HEAD_SECONDS_MAX, self._overdue)
        self._num_wire_bytes += len(data)
        self._num_idle_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            if not self._is_deaf:
                self._refuse(explain(error, data))
            return
        most = GUEST_HEAD_BYTES_MAX if self._is_guest else HEAD_BYTES_MAX
        is_too_large = self._num_idle_bytes > most  # a head, trailers, a chunk's extension
        if self._state == _BODY:
            is_too_large |= self._num_wire_bytes > HEAD_BYTES_MAX + FRAMING_FACTOR * self.rules.body_bytes_max
        if is_too_large and not self._is_deaf:
            self._refuse(_too_large())

    def _feed(self, data: bytes) -> None:
        """Parse. An offer to change to another protocol is not taken: the parser, which takes all that follows for that
        other protocol, gets the head once more without it. Raises HttpParserError."""
        view = memoryview(data)
        while view and not self._is_deaf:
            try:
                self.parser.feed_data(view)
                return
            except httptools.HttpParserUpgrade as upgrade:
                view = view[upgrade.args[0] :]
            method, version = self.parser.get_method(), self.parser.get_http_version()
            head = framing.head_without_upgrade(method, self.url, version, self.headers)
            self.parser = httptools.HttpRequestParser(self)
            self.parser.feed_data(head)

    # ---- the parser's side -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._is_deaf:
            raise bad_request("a request after the last one")  # which nobody hears
        if len(self.pipeline) >= PIPELINED_MAX:
            raise too_many(f"{PIPELINED_MAX} requests wait on this connection, the limit")
        if not self._is_answering:
            self.places.begin(self, self.loop.time())
        self._state = _HEAD
        self._num_wire_bytes = self._num_idle_bytes = self._num_fields = self._num_chunks = 0
        self._hosts, self._codings, self._content_length = [], [], -1
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        super().on_url(url)
        if len(self.url) > HEAD_BYTES_MAX:
            raise Refusal(414, "uri_too_long", f"the target exceeds the limit of {HEAD_BYTES_MAX} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field. Trailers, which come after a chunked body, are only counted: nobody reads them."""
        self._num_fields += 1
        if self._num_fields > FIELDS_MAX:
            raise _too_large()
        if self._state != _HEAD:
            return
        name, value = name.lower(), value.rstrip(b" \t")
        self.headers.append((name, value))
        if name in _NOTED:
            self._note(name, value)

    def _note(self, name: bytes, value: bytes) -> None:
        if name == b"host":
            self._hosts.append(value)
        elif name == b"content-length":
            self._content_length = int(value)  # the parser takes only digits
        elif name == b"transfer-encoding":
            self._codings.append(value)
        else:
            self.expect_100_continue = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        """The head is complete: check it, and start the application or queue the request up behind earlier ones."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise Refusal(501, "method_not_implemented", "CONNECT is not implemented: this is no proxy")
        if self.parser.should_upgrade():
            return  # see _feed
        version = self.parser.get_http_version()
        framing.check_version(version)
        target = framing.target_of(method, self.url)
        framing.check_host(version, self._hosts)
        framing.check_coding(version, self._codings)
        if target.authority is not None:
            framing.replace_host(self.headers, target.authority)
        if self._is_guest:
            self._admit(target.path)
        self._state = _BODY
        self._num_wire_bytes = self._num_idle_bytes = self._num_fields = 0
        self._stop_waiting()
        self.scope["method"] = method.decode("ascii")
        self.scope["http_version"] = version
        self.scope["path"], self.scope["raw_path"], self.scope["query_string"] = target[:3]
        cycle = self._make_cycle(is_old=version == "1.0")
        self.cycle, self._has_cycle = cycle, True
        if self._is_answering:
            self.pipeline.appendleft((cycle, self.app))
        else:
            self._start_asgi_task(cycle, self.app)

    def _make_cycle(self, *, is_old: bool) -> Cycle:
        cycle = (PlainCycle if is_old else Cycle)(
            scope=self.scope,
            transport=cast(asyncio.Transport, self._outlet),
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue and not is_old,
            keep_alive=not is_old and not self._is_guest and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        is_short = not self._codings and self._content_length <= UNREAD_BYTES_MAX
        cycle.expect_rest(is_short=is_short)
        return cycle

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._front = cast(Cycle, cycle)
        super()._start_asgi_task(cycle, app)

    def on_chunk_header(self) -> None:
        """A chunk begins."""
        self._num_chunks += 1
        most = CHUNKS_FREE + self.rules.body_bytes_max // CHUNK_BYTES_MEAN_MIN
        if self._num_chunks > most:
            raise Refusal(413, "too_many_chunks", f"the body comes in more chunks than the limit of {most}")

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._num_idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has come whole."""
        if not self._has_cycle:
            return  # see _feed
        self._state, self._has_cycle, self._num_idle_bytes = _IDLE, False, 0
        cycle = cast(Cycle, self.cycle)
        cycle.complete()
        self._is_deaf = self._is_deaf or not cycle.keep_alive
        self.places.work(self)
        if cycle.response_complete and not self._is_deaf:
            self._stop_waiting()
            self._rest()

    # ---- answers -----------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """An answer has been written: go on with the next request, the refusal that waits, or what still comes."""
        self.server_state.total_requests += 1
        if self.is_closing:
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal is not None:
            self._say(self._refusal)
        elif self._state == _IDLE:
            self._rest()
        else:
            self.places.rest(self)
            self.places.begin(self, self.loop.time())
            self._await(HEAD_SECONDS_MAX, self._overdue)

    def make_room(self) -> None:
        """Another connection has got the place. A request that has come and was not read yet is read as a guest's."""
        self._stop_waiting()
        self._unset_keepalive_if_required()
        if self._state == _BODY:
            self._refuse(too_many("the request did not come in time, and others wait for the place"))
        elif not self._is_guest:
            was_idle = self._state == _IDLE and self._front is not None
            self._is_guest = True
            if (victim := self.places.demote(self)) is not None:
                victim.make_room()
            self._await(CONFIRM_SECONDS if was_idle else GUEST_SECONDS_MAX, self._overdue)
        elif self._state == _HEAD:
            self._refuse(too_many("the request did not come in time, and others wait for an answer"))
        elif not self._is_answering:
            self._drop()

    def shutdown(self) -> None:
        """The server stops: let what is being answered end, nothing else."""
        if self._is_answering:
            assert self._front is not None
            self._front.keep_alive = False
            self._is_deaf = True
            self.pipeline.clear()
        elif not self.transport.get_write_buffer_size():
            self._drop()

    def timeout_keep_alive_handler(self) -> None:
        """The connection has been idle for long enough."""
        self._overdue()

    def close(self) -> None:
        """Close after an answer, such that the peer can read it. Idempotent."""
        if self.is_closing:
            return
        self.is_closing = self._is_deaf = True
        self._unset_keepalive_if_required()
        self._stop_waiting()
        self._disconnect()
        if not self.transport.is_closing() and not self._has_peer_ended and self.places.linger(self):
            self._tell_end()
        else:
            self._drop()

    def _drop(self) -> None:
        """Close where there is nothing to be heard."""
        self.is_closing = self._is_deaf = True
        self.places.leave(self)
        self.transport.close()

    def _refuse(self, refusal: Refusal) -> None:
        """Answer with `refusal` after the requests before it, and close. Nothing that comes is read any more."""
        self._is_deaf = True
        self._refusal = refusal
        self._stop_waiting()
        broken = self.cycle if self._has_cycle else None
        if broken is not None and broken is not self._front:
            self.pipeline.popleft()  # the newest
        if self._is_answering and broken is not self._front:
            return  # its turn comes
        if broken is not None and broken.response_started:
            self.close()  # the answer cannot be taken back
        else:
            self._say(refusal)

    def _say(self, refusal: Refusal) -> None:
        self.rules.refused(refusal.status)
        self.transport.write(refusal.encode(self.server_state.default_headers))
        self.close()

    def _admit(self, path: str) -> None:
        """A guest's request: a place if there is one by now, none for a probe, else the refusal."""
        has_place, victim = self.places.promote(self, self.loop.time())
        self._is_guest = not has_place
        if victim is not None:
            victim.make_room()
        if not has_place and path not in self.rules.probes:
            raise too_many(f"{self.places.most} connections are open, the limit, and none is idle")

    def _rest(self) -> None:
        """Wait for the next request."""
        self.places.rest(self)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    @property
    def _is_answering(self) -> bool:
        """An application works for this connection."""
        return self._front is not None and not self._front.response_complete

    def _disconnect(self) -> None:
        """Tell the applications that nobody hears them any more."""
        if self._front is not None:
            self._front.disconnect()
        self.pipeline.clear()

    def _overdue(self) -> None:
        """A deadline has passed. Where the loop was busy what came in time has not been read yet: it is read first."""
        self._waiting = None
        self._await(CONFIRM_SECONDS, self._timed_out)

    def _timed_out(self) -> None:
        self._waiting = None
        if self._state == _HEAD:
            self._refuse(Refusal(408, "request_timeout", "the request's head did not come in time"))
        elif self._state == _BODY:
            self.close()
        else:
            self._drop()


def guarded(rules: Rules) -> type[Connection]:
    """The protocol with these rules and places of its own, for uvicorn's `http` option."""
    attributes = {"rules": rules, "places": Places[Connection](rules.connections_max, rules.guests_max)}
    return type("ConfiguredConnection", (Connection,), attributes)


def _too_large() -> Refusal:
    text = f"the request's headers are too large: the limits are {HEAD_BYTES_MAX} bytes and {FIELDS_MAX} fields"
    return Refusal(431, "headers_too_large", text)

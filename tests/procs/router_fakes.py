"""A rank without a model: speaks the protocol over a real socket and says what the test tells it to.

It runs in a thread of the test. Tokens are bytes (the byte-level tokenizer's ids), so an answer is written as bytes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elasticmoe.common.layout import Layout, RankId, Seat
from elasticmoe.common.protocol import rank as rank_messages
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.rank import Cancel, Submit, ToRank, Unwatch, Watch
from elasticmoe.common.protocol.router import Delta, Failed, Logprob, Moved, RankStatus, Tokens
from elasticmoe.common.transport import Server, new_identity

WAIT_S = 60.0  # a busy machine may let any process stand still for seconds
STATUS_EVERY_S = 0.1
SLOW_S = 0.05


@dataclass
class Reply:
    """What a rank answers: `data` token by token (`per_step` at once), then `finish`; None goes on for ever. `fail`
    instead: a Failed. `after`: an event that is awaited before the first token. `top`: the alternatives of every token,
    best first, whether or not it is among them. `slow_after`: from so many tokens on one comes only every SLOW_S, until
    `hurry` is set: for tests that act while it goes on, however long a busy machine takes over that."""

    data: bytes = b""
    finish: str | None = "stop"
    per_step: int = 1
    fail: tuple[str, str, bool] | None = None
    after: threading.Event | None = None
    top: tuple[tuple[int, float], ...] | None = None
    slow_after: int | None = None
    hurry: threading.Event = field(default_factory=threading.Event)


@dataclass
class _Sequence:
    submit: Submit
    peer: bytes
    reply: Reply
    sent: int = 0
    is_done: bool = False
    stepped_at: float = 0.0


@dataclass
class Seen:
    """What the rank was told, for the test to wait on."""

    submits: queue.Queue[Submit] = field(default_factory=queue.Queue)
    cancels: queue.Queue[str] = field(default_factory=queue.Queue)
    unwatched: threading.Event = field(default_factory=threading.Event)

    def submit(self) -> Submit:
        """The next Submit."""
        return self.submits.get(timeout=WAIT_S)

    def cancel(self) -> str:
        """The next Cancel's request id."""
        return self.cancels.get(timeout=WAIT_S)


class FakeRank:
    """One rank in a thread. `answer` may be replaced at any time; a function is called in the rank's thread."""

    def __init__(self, sockets: Path, rank: RankId | None = None, *, step_s: float = 0.002) -> None:
        self.rank = rank or RankId(0, 0)
        self.seen = Seen()
        self.answer: Reply | Callable[[Submit], Reply] = Reply(b"Hello!")
        self.max_model_len = 512
        self.blocks_free = 100
        self.is_leaving = False
        self.is_muted = threading.Event()  # set: receives, but says nothing
        self.is_watched = threading.Event()  # a router has introduced itself to this incarnation
        self._path = sockets / f"rank-{self.rank}.sock"
        self._step_s = step_s
        self._sequences: dict[tuple[bytes, str], _Sequence] = {}
        self._watchers: set[bytes] = set()
        self._extra: queue.Queue[Message] = queue.Queue()
        self._handed_over: queue.Queue[FakeRank] = queue.Queue()
        self._taken_over: queue.Queue[_Sequence] = queue.Queue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.incarnation = ""

    def start(self) -> FakeRank:
        """Bind and serve; a new incarnation each time."""
        self.incarnation = new_identity(f"rank-{self.rank}")
        self._stop.clear()
        bound = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(bound,), name=f"fake {self.rank}", daemon=True)
        self._thread.start()
        assert bound.wait(WAIT_S)
        return self

    def stop(self) -> None:
        """Vanish without a word, as a killed process does: its sequences are forgotten."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(WAIT_S)
        self._sequences.clear()
        self._watchers.clear()
        self.is_watched.clear()

    def say(self, message: Message) -> None:
        """Send `message` to every router that watches."""
        self._extra.put(message)

    def hand_over(self, other: FakeRank) -> None:
        """Let `other` go on with all that runs here now, and tell the routers."""
        self._handed_over.put(other)

    def _move(self, server: Server[ToRank]) -> None:
        while not self._taken_over.empty():
            sequence = self._taken_over.get()
            self._sequences[sequence.peer, sequence.submit.request_id] = sequence
        while not self._handed_over.empty():
            other = self._handed_over.get()
            for (peer, request_id), sequence in self._sequences.items():
                other._taken_over.put(sequence)
                server.send(peer, Moved(request_id, other.rank))
            self._sequences.clear()

    def _run(self, bound: threading.Event) -> None:
        with closing(Server(self._path, self.incarnation, rank_messages.CODEC)) as server:
            bound.set()
            next_step = status_at = time.monotonic()
            turns = 0
            while not self._stop.is_set():
                now = time.monotonic()
                busy = any(self._can_step(sequence) for sequence in self._sequences.values())
                server.poll(max(0, int((next_step - now) * 1e3)) if busy else 10)
                while (received := server.receive()) is not None:
                    self._take(server, received[0], received[1].body)
                self._move(server)
                if self.is_muted.is_set():
                    continue
                while not self._extra.empty():
                    self._send_all(server, self._extra.get())
                now = time.monotonic()
                if busy and now >= next_step:
                    next_step = max(next_step + self._step_s, now)
                    turns += 1
                    self._step(server)
                    if now - status_at > STATUS_EVERY_S:
                        status_at = now
                        self._send_all(server, self.status(turns))

    @staticmethod
    def _can_step(sequence: _Sequence) -> bool:
        reply = sequence.reply
        is_slow = reply.slow_after is not None and sequence.sent >= reply.slow_after and not reply.hurry.is_set()
        if is_slow and time.monotonic() < sequence.stepped_at + SLOW_S:
            return False
        return reply.after is None or reply.after.is_set()

    def _take(self, server: Server[ToRank], peer: bytes, body: Any) -> None:
        if isinstance(body, Submit):
            reply = self.answer if isinstance(self.answer, Reply) else self.answer(body)
            self._sequences[peer, body.request_id] = _Sequence(body, peer, reply, len(body.output))
            self.seen.submits.put(body)
        elif isinstance(body, Cancel):
            self._sequences.pop((peer, body.request_id), None)
            self.seen.cancels.put(body.request_id)
        elif isinstance(body, Unwatch):
            self._watchers.discard(peer)
            self.seen.unwatched.set()
        elif isinstance(body, Watch):
            self.seen.unwatched.clear()
            self._watchers.add(peer)
            self.is_watched.set()
            if not self.is_muted.is_set():
                server.send(peer, self.status(0))

    def status(self, progress: int = 0) -> RankStatus:
        """What it would report now."""
        return RankStatus(
            rank=self.rank,
            incarnation=self.incarnation,
            progress=progress,
            running=len(self._sequences),
            waiting=0,
            tokens_queued=0,
            blocks_free=self.blocks_free,
            blocks_total=100,
            max_model_len=self.max_model_len,
            is_leaving=self.is_leaving,
        )

    def _send_all(self, server: Server[ToRank], message: Message) -> None:
        for peer in self._watchers:
            server.send(peer, message)

    def _step(self, server: Server[ToRank]) -> None:
        deltas: dict[bytes, list[Delta]] = {}
        for key, sequence in list(self._sequences.items()):
            if not self._can_step(sequence):
                continue
            if sequence.reply.fail is not None:
                server.send(sequence.peer, Failed(sequence.submit.request_id, *sequence.reply.fail))
                del self._sequences[key]
                continue
            sequence.stepped_at = time.monotonic()
            deltas.setdefault(sequence.peer, []).append(self._next(sequence))
            if sequence.is_done:
                del self._sequences[key]
        for peer, made in deltas.items():
            server.send(peer, Tokens(tuple(made)))

    def _next(self, sequence: _Sequence) -> Delta:
        submit, reply = sequence.submit, sequence.reply
        if reply.finish is None:
            ids = [97 + (sequence.sent + i) % 26 for i in range(reply.per_step)]
        else:
            ids = list(reply.data[sequence.sent : sequence.sent + reply.per_step])
        ids = ids[: submit.max_tokens - sequence.sent]
        index, sequence.sent = sequence.sent, sequence.sent + len(ids)
        finish = None
        if sequence.sent >= submit.max_tokens:
            finish = "length"
        elif reply.finish is not None and sequence.sent >= len(reply.data):
            finish = reply.finish
        sequence.is_done = finish is not None
        logprobs = prompt_logprobs = None
        if submit.sampling.logprobs >= 0:
            num_top = submit.sampling.logprobs
            logprobs = tuple(_logprob(token_id, num_top, reply.top) for token_id in ids)
            if submit.prompt_logprobs and index == 0:
                prompt_logprobs = tuple(_logprob(i, num_top, reply.top) for i in submit.prompt[1:])
        return Delta(submit.request_id, index, tuple(ids), finish, None, logprobs, prompt_logprobs)


def _logprob(token_id: int, num_top: int, top: tuple[tuple[int, float], ...] | None) -> Logprob:
    if top is None:
        return Logprob(-0.25, ((token_id, -0.25), (120, -2.0), (121, float("-inf")))[:num_top])
    return Logprob(dict(top).get(token_id, -7.5), top[:num_top])


def layout_of(*replicas: int, epoch: int = 1) -> Layout:
    """A layout of one layer whose experts all live on the first replica's device."""
    seats = tuple(Seat(RankId(replica, 0), slot, f"host:{slot}") for slot, replica in enumerate(replicas))
    return Layout(epoch, 1, seats, (((0,),) * 4,))

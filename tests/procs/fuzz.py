"""What is thrown at control sockets: bytes that are no message of their receiver, and messages that it must refuse.

Everything is drawn from one seeded generator. Bytes that turn out, by luck, to be a message that the receiver would
rightly obey are not thrown: peers of the same user may command (docs/promises.md), and `is_harmless` says which.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any, Final, get_args

import msgpack
import msgspec

from elasticmoe.common.protocol import handles, hmm, keeper, pool, rank, router, scaler, signals, standby
from elasticmoe.common.protocol.codec import Codec, Message, Received, decode_envelope, encode
from elasticmoe.common.protocol.errors import ProtocolError
from elasticmoe.common.protocol.limits import EPOCH_MAX, MESSAGE_BYTES_MAX, NAME_CHARS_MAX, PROTOCOL_VERSION
from tests.unit.test_protocol import RECEIVERS

SENDER: Final = "fuzz:0123456789abcdef"
VOCAB_MIN: Final = 100_000  # token ids from here on are beyond every test model's vocabulary
BLOCKS_MIN: Final = 100_000  # no device has so many
NESTING_MAX: Final = 60_000

# By a scaler that acts under epoch 0, which every resource has seen superseded: refused, whatever they say.
FENCED = (
    hmm.LoadModel,
    hmm.SetMembership,
    hmm.StageLayout,
    hmm.CommitLayout,
    hmm.ReleaseLayout,
    hmm.AbortLayout,
    pool.StartRank,
    pool.StopRank,
    rank.MigrateTo,
    rank.Precopy,
    rank.DecodeOnly,
    rank.Drain,
    rank.CancelMigration,
)
# Never thrown where they are valid. Watch and GetPool: whoever sends them gets what was the router's or the scaler's.
# Keep and Fetch: descriptors would be held, or handed out to a peer that leaks them. Fork: a process is work, not harm.
OBEYED = (rank.Watch, pool.GetPool, keeper.Keep, keeper.Fetch, standby.Fork)


def is_harmless(received: Received[Any]) -> bool:
    """Whether a valid message has no effect: it is refused, or only asks, or is about what does not exist."""
    body = received.body
    if received.epoch:  # whatever asks under a newer epoch fences the scaler
        return False
    if isinstance(body, FENCED):
        return True
    if isinstance(body, OBEYED):
        return False
    if isinstance(body, rank.Submit):  # a valid one is served
        return max(body.prompt) >= VOCAB_MIN
    if isinstance(body, rank.Reserve):  # a valid one holds blocks for a while
        return body.num_blocks >= BLOCKS_MIN
    if isinstance(body, hmm.CheckIntegrity):  # hashing all weights ten thousand times is work, not harm
        return not body.checksums
    # Questions; what names sequences, reservations, incarnations, seats or descriptors that nobody has.
    return True


class Thrower:
    """Draws inputs for the socket of one receiver. `num_invalid`: those that decode to no message of it."""

    def __init__(self, rng: random.Random, codec: Codec[Any], samples: tuple[Message, ...], union: Any) -> None:
        self.num_invalid = 0
        self._rng = rng
        self._codec = codec
        known = {kind.__name__ for kind in kinds_of(union)}
        self._bodies = [_refused(message) for message in samples]
        self._raws = [encode(body, sender=SENDER, seq=7) for body in self._bodies]
        everything = [message for _, messages in RECEIVERS.values() for message in messages]
        self._foreign = [encode(m, sender=SENDER, seq=7) for m in everything if type(m).__name__ not in known]
        self._ways: list[tuple[Callable[[], bytes], int]] = [
            (self._noise, 12),
            (self._flipped, 40),
            (self._truncated, 12),
            (self._spliced, 8),
            (self._foreign_message, 10),
            (self._wrong_envelope, 12),
            (self._stale, 5),
            (self._bomb, 1),
        ]

    def draw(self) -> bytes:
        """The next input."""
        while True:
            way = self._rng.choices([way for way, _ in self._ways], [weight for _, weight in self._ways])[0]
            raw = way()
            try:
                if not is_harmless(self._codec.decode(raw)):
                    continue
            except ProtocolError:
                self.num_invalid += 1
            return raw

    def _noise(self) -> bytes:
        return self._rng.randbytes(self._rng.choice((0, 1, 2, 7, 30, 200)))

    def _flipped(self) -> bytes:
        raw = bytearray(self._rng.choice(self._raws))
        for _ in range(self._rng.choice((1, 1, 1, 2, 4))):
            at = self._rng.randrange(len(raw))
            raw[at] = self._rng.randrange(256) if self._rng.random() < 0.5 else raw[at] ^ 1 << self._rng.randrange(8)
        return bytes(raw)

    def _truncated(self) -> bytes:
        raw = self._rng.choice(self._raws)
        return raw[: self._rng.randrange(len(raw))]

    def _spliced(self) -> bytes:
        head, tail = self._rng.choice(self._raws), self._rng.choice(self._raws + self._foreign)
        return head[: self._rng.randrange(len(head))] + tail[self._rng.randrange(len(tail)) :]

    def _foreign_message(self) -> bytes:
        return self._rng.choice(self._foreign)

    def _stale(self) -> bytes:
        return self._rng.choice(self._raws)

    def _wrong_envelope(self) -> bytes:
        body = msgspec.Raw(msgspec.msgpack.encode(self._rng.choice(self._bodies)))
        fields: dict[str, Any] = {"version": PROTOCOL_VERSION, "epoch": 0, "sender": SENDER, "seq": 7, "body": body}
        name = self._rng.choice(("version", "epoch", "sender", "seq", "body", "missing", "more"))
        wrong: dict[str, Any] = {
            "version": self._rng.choice((PROTOCOL_VERSION + 1, 0, -1, 1 << 63, "1", None)),
            "epoch": self._rng.choice((-1, -(1 << 63), EPOCH_MAX + 1, 1 << 63, 1.5, "1", None)),
            "sender": self._rng.choice(("", "x" * (NAME_CHARS_MAX + 1), 7, None, ["a"])),
            "seq": self._rng.choice((-1, "7", None, 0.5)),
            "body": self._rng.choice((None, 7, [], {}, {"type": "Nothing"}, {"type": 7}, "x" * 100)),
        }
        if name == "missing":
            del fields[self._rng.choice(sorted(fields))]
        elif name == "more":
            fields["extra"] = 1
        else:
            fields[name] = wrong[name]
        return msgspec.msgpack.encode(fields)

    def _bomb(self) -> bytes:
        """Deep nesting, counts that promise more than there is, one long text."""
        deep = self._rng.choice((b"\x91", b"\x81\xa1a")) * self._rng.randrange(1_000, NESTING_MAX)
        huge = self._rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6")) + b"\xff\xff\xff\xff"
        body = self._rng.choice((deep, huge, b"\xda\xff\xff" + b"x" * 0xFFFF))
        head = msgpack.packb({"version": PROTOCOL_VERSION, "epoch": 0, "sender": SENDER, "seq": 7})
        bomb: bytes = b"\x85" + head[1:] + b"\xa4body" + body
        return self._rng.choice((body, bomb))


def _refused(message: Message) -> Message:
    """The sample, so that it and most of what becomes of it are refused."""
    if isinstance(message, rank.Submit):
        return msgspec.structs.replace(message, prompt=(1, VOCAB_MIN + 7))
    if isinstance(message, rank.Reserve):
        return msgspec.structs.replace(message, num_blocks=BLOCKS_MIN + 7)
    if isinstance(message, hmm.CheckIntegrity):
        return hmm.CheckIntegrity(False)
    return message


def framed(raw: bytes, rng: random.Random) -> bytes:
    """A frame of the Unix stream sockets, or nearly one: now and then its length lies."""
    length = len(raw)
    if rng.random() < 0.1:
        length = rng.choice((0, length + 1, max(0, length - 1), MESSAGE_BYTES_MAX, MESSAGE_BYTES_MAX + 1, 0xFFFFFFFF))
    return struct.pack("<I", length) + raw


def answer_of(raw: bytes) -> tuple[int, str, str]:
    """(seq, type, code) of an answer, whatever its union."""
    envelope = decode_envelope(raw)
    body = msgspec.msgpack.decode(envelope.body)
    return envelope.seq, body["type"], body.get("code", "")


UNIONS: dict[str, Any] = {
    "hmm": hmm.ToHmm,
    "pool": pool.ToPool,
    "rank": rank.ToRank,
    "router": router.ToRouter,
    "scaler": scaler.ToScaler,
    "signals": signals.Signal,
    "handles": handles.FromRank,
    "keeper": keeper.Keep | keeper.Forget | keeper.Fetch,
    "pool-template": standby.Fork,
}
CODECS: dict[str, Codec[Any]] = {
    "hmm": hmm.CODEC,
    "pool": pool.CODEC,
    "rank": rank.CODEC,
    "router": router.CODEC,
    "scaler": scaler.CODEC,
    "signals": signals.CODEC,
    "handles": handles.FROM_RANK,
    "keeper": keeper.TO_KEEPER,
    "pool-template": standby.TO_TEMPLATE,
}


def kinds_of(union: Any) -> tuple[Any, ...]:
    """The messages of a union, or the one that is none."""
    return get_args(union) or (union,)


def thrower(rng: random.Random, receiver: str) -> Thrower:
    """For the sockets of one kind of receiver."""
    codec, kinds = CODECS[receiver], kinds_of(UNIONS[receiver])
    samples = tuple(m for _, messages in RECEIVERS.values() for m in messages if type(m) in kinds)
    assert {type(sample) for sample in samples} == set(kinds), f"{receiver}: not every message has a sample"
    return Thrower(rng, codec, samples, UNIONS[receiver])

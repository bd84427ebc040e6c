"""The envelope around every control message, and its strict decoding.

On the wire a message is one MessagePack map: `{version, epoch, sender, seq, body}`. `body` is a tagged map of the
receiver's closed union. The envelope is decoded first, so that another version gets a typed answer whatever its body.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from elasticmoe.common.protocol.errors import PayloadTooLarge, ProtocolError
from elasticmoe.common.protocol.limits import EPOCH_MAX, MESSAGE_BYTES_MAX, NAME_CHARS_MAX, PROTOCOL_VERSION
from elasticmoe.common.wording import undecodable

T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, tag_field="type"):
    """Base of all message bodies; the tag is the class name."""


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What accompanies every body.

    `epoch`: fencing epoch of the scaler under whose authority the sender acts (0: none). `sender`: `name:uuid`, one
    uuid per process incarnation. `seq`: chosen by the requester, repeated in the answer; 0 for unsolicited messages.
    """

    version: int
    epoch: int
    sender: str
    seq: int
    body: msgspec.Raw


class Received(msgspec.Struct, Generic[T], frozen=True):
    """A decoded message with its envelope's facts."""

    epoch: int
    sender: str
    seq: int
    body: T


_encoder = msgspec.msgpack.Encoder()
_envelope_decoder = msgspec.msgpack.Decoder(Envelope)


def encode(body: Message, *, sender: str, epoch: int = 0, seq: int = 0) -> bytes:
    """Encode one message. Raises PayloadTooLarge beyond MESSAGE_BYTES_MAX."""
    raw = _encoder.encode(Envelope(PROTOCOL_VERSION, epoch, sender, seq, msgspec.Raw(_encoder.encode(body))))
    if len(raw) > MESSAGE_BYTES_MAX:
        raise PayloadTooLarge(f"message of {len(raw)} bytes exceeds the limit of {MESSAGE_BYTES_MAX}")
    return raw


class Codec(Generic[T]):
    """Decoder of one receiver's closed union of messages. Stateless after construction; one per receiver."""

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def decode(self, raw: bytes | memoryview) -> Received[T]:
        """Decode and validate one message.

        Raises ProtocolError: `version_mismatch` for another protocol version, `protocol_error` for anything else that
        is not a valid message of this receiver. Never raises another exception, whatever the bytes.
        """
        if len(raw) > MESSAGE_BYTES_MAX:
            raise ProtocolError(f"message of {len(raw)} bytes exceeds the limit of {MESSAGE_BYTES_MAX}")
        envelope = decode_envelope(raw)
        try:
            body = self._decoder.decode(envelope.body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError, ValueError) as error:
            raise ProtocolError(f"message of {envelope.sender} is not valid: {undecodable(error)}") from None
        return Received(envelope.epoch, envelope.sender, envelope.seq, body)


def decode_envelope(raw: bytes | memoryview) -> Envelope:
    """Decode the envelope only and check it. Raises ProtocolError as Codec.decode does."""
    try:
        envelope = _envelope_decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError, ValueError) as error:
        raise ProtocolError(f"envelope is not valid: {undecodable(error)}") from None
    if envelope.version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"protocol version {envelope.version} is not {PROTOCOL_VERSION}, which this process speaks",
            code="version_mismatch",
        )
    if not 0 < len(envelope.sender) <= NAME_CHARS_MAX or envelope.epoch < 0 or envelope.seq < 0:
        raise ProtocolError("envelope has an empty or long sender, or a negative epoch or seq")
    if envelope.epoch > EPOCH_MAX:
        raise ProtocolError(f"envelope's epoch {envelope.epoch} exceeds the limit of {EPOCH_MAX}")
    return envelope

"""The catalog in a memfd that the keeper holds: two slots, written in turn. A kill at any instruction leaves one whole.

A slot is `seq, length, checksum` (three u64, little-endian) and `length` bytes. The checksum covers the other two and
the bytes, so a slot that is half written is recognized, and the other one, which was not touched, counts.
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import Final

from elasticmoe.common.protocol.errors import PayloadTooLarge

SLOT_BYTES: Final = 64 * 1024 * 1024  # of address space: pages exist only where something was written
_HEAD: Final = struct.Struct("<QQ8s")


class Snapshot:
    """The memfd `fd`; owns it. One writer at a time."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._seq = max((seq for seq, _ in self._slots()), default=0)

    @classmethod
    def create(cls) -> Snapshot:
        """A new one, without content."""
        return cls(os.memfd_create("catalog", os.MFD_CLOEXEC))

    def write(self, payload: bytes) -> None:
        """Replace the content. Raises PayloadTooLarge."""
        if len(payload) > SLOT_BYTES - _HEAD.size:
            raise PayloadTooLarge(f"catalog of {len(payload)} bytes exceeds the limit of {SLOT_BYTES - _HEAD.size}")
        seq = self._seq + 1
        at = seq % 2 * SLOT_BYTES
        raw = _HEAD.pack(seq, len(payload), _checksum(seq, payload)) + payload
        view = memoryview(raw)
        while view:
            written = os.pwrite(self.fd, view, at)
            view, at = view[written:], at + written
        self._seq = seq

    def read(self) -> bytes | None:
        """The newest whole content, or None when there is none."""
        return max(self._slots(), default=(0, None), key=lambda slot: slot[0])[1]

    def _slots(self) -> list[tuple[int, bytes]]:
        found = []
        for at in (0, SLOT_BYTES):
            head = os.pread(self.fd, _HEAD.size, at)
            if len(head) < _HEAD.size:
                continue
            seq, length, checksum = _HEAD.unpack(head)
            if length > SLOT_BYTES - _HEAD.size or seq == 0:
                continue
            payload = os.pread(self.fd, length, at + _HEAD.size)
            if len(payload) == length and _checksum(seq, payload) == checksum:
                found.append((seq, payload))
        return found

    def close(self) -> None:
        """Close the descriptor; the content lives on while the keeper holds it."""
        os.close(self.fd)


def _checksum(seq: int, payload: bytes) -> bytes:
    return hashlib.blake2b(struct.pack("<QQ", seq, len(payload)) + payload, digest_size=8).digest()

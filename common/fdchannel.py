"""Unix stream sockets that carry messages and file descriptors between processes of one user.

Framing: 4 bytes little-endian length, then one message of `codec.py`; descriptors accompany the length's first byte.
Used for handles.py (HMM <-> rank), keeper.py (HMM <-> keeper) and standby.py (pool <-> its processes).
Blocking calls have a deadline.
"""

from __future__ import annotations

import array
import errno
import os
import resource
import select
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Generic, Self, TypeVar

from elasticmoe.common.protocol.codec import Codec, Message, Received, encode
from elasticmoe.common.protocol.errors import (
    DeadlineExceeded,
    ElasticMoEError,
    ProtocolError,
    Unauthorized,
    Unavailable,
)
from elasticmoe.common.protocol.limits import FDS_MAX, MESSAGE_BYTES_MAX
from elasticmoe.common.protocol.replies import refusal
from elasticmoe.common.transport import PathLock

T = TypeVar("T")

DESCRIPTORS_CUT = "descriptors_cut"
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Channel(Generic[T]):
    """One connected socket. Owns it, and every received descriptor until the caller takes it."""

    def __init__(self, sock: socket.socket, identity: str, codec: Codec[T]) -> None:
        self._sock = sock
        self._identity = identity
        self._codec = codec
        self._is_cut = False  # descriptors of the message that is being received

    @classmethod
    def of(cls, fd: int, identity: str, codec: Codec[T]) -> Self:
        """The channel over an inherited or received descriptor of a socket, which is the channel's from now on."""
        return cls(socket.socket(fileno=fd), identity, codec)

    def fileno(self) -> int:
        """For polling: readable at a message and at the peer's end."""
        return self._sock.fileno()

    @property
    def is_readable(self) -> bool:
        """Whether something has come, be it the peer's end."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return bool(poller.poll(0))

    @property
    def has_ended(self) -> bool:
        """Whether the peer has closed it, or died; what it had sent before may still be there."""
        poller = select.poll()
        poller.register(self._sock, select.POLLHUP)
        return bool(poller.poll(0))

    def peer_pid(self) -> int:
        """Process id of the other side: of who connected here, or listens there; 0 for one of another namespace."""
        return _peer(self._sock)[0]

    def send(self, body: Message, fds: tuple[int, ...] = (), *, epoch: int = 0, deadline_ms: int = 5_000) -> None:
        """Send one message with `fds` (they stay the caller's). Raises Unavailable when the peer is gone."""
        if len(fds) > FDS_MAX:
            raise ProtocolError(f"{len(fds)} descriptors exceed the limit of {FDS_MAX} per message")
        raw = encode(body, sender=self._identity, epoch=epoch)
        self._sock.settimeout(deadline_ms / 1e3)
        try:
            head = struct.pack("<I", len(raw))
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            sent = self._sock.sendmsg([head], rights)
            self._sock.sendall(head[sent:] + raw)
        except TimeoutError:
            raise DeadlineExceeded(f"peer did not take a message within {deadline_ms} ms") from None
        except OSError as error:
            raise Unavailable(f"peer is gone: {error.strerror}") from None

    def refuse(self, error: ElasticMoEError, *, deadline_ms: int) -> None:
        """Answer Refused, where the peer is still there to be told."""
        with suppress(ElasticMoEError):
            self.send(refusal(error), deadline_ms=deadline_ms)

    def receive(self, *, deadline_ms: int = 5_000) -> tuple[Received[T], list[int]]:
        """Take one message and its descriptors (now the caller's, close-on-exec).

        Raises Unavailable at the peer's end, DeadlineExceeded, ProtocolError (no descriptor stays open then). One with
        the code DESCRIPTORS_CUT is no fault of the peer: this process had no room for the descriptors. The message is
        lost, and the next one can be taken.
        """
        fds: list[int] = []
        self._is_cut = False
        try:
            head = self._read(4, time.monotonic() + deadline_ms / 1e3, fds)
            (length,) = struct.unpack("<I", head)
            if length > MESSAGE_BYTES_MAX:
                raise ProtocolError(f"message of {length} bytes exceeds the limit of {MESSAGE_BYTES_MAX}")
            raw = self._read(length, time.monotonic() + deadline_ms / 1e3, fds)
            if self._is_cut:
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                text = f"descriptors were cut off beside {len(fds)}: this process may have {limit} open files at most"
                raise ProtocolError(text, code=DESCRIPTORS_CUT)
            return self._codec.decode(raw), fds
        except BaseException:
            close_all(fds)
            raise

    def _read(self, nbytes: int, deadline: float, fds: list[int]) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            self._sock.settimeout(max(1e-3, deadline - time.monotonic()))
            try:
                part, ancillary, flags, _ = self._sock.recvmsg(
                    min(nbytes - len(data), 1 << 20), socket.CMSG_SPACE(FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                raise DeadlineExceeded("peer did not send a whole message in time") from None
            except OSError as error:
                raise Unavailable(f"peer is gone: {error.strerror}") from None
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(payload[: len(payload) - len(payload) % 4])
                    fds.extend(received)
            self._is_cut |= bool(flags & socket.MSG_CTRUNC)
            if not part:
                raise Unavailable("peer closed the connection")
            data += part
        return bytes(data)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._sock.close()


class Listener:
    """A bound Unix stream socket that accepts processes of this user only.

    It keeps a descriptor to spare. Where this process has no other left, that lets it take a connection and close it:
    one that stayed in the queue would wake the loop for ever, and its peer would wait.
    """

    def __init__(self, path: Path, *, is_open: bool = True) -> None:
        """Raises Conflict when another process has bound `path`. Unless `is_open`, whoever connects is refused at once
        until `open`, rather than left to wait."""
        self._lock = PathLock(path)
        self._path = path
        path.unlink(missing_ok=True)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._sock.bind(os.fspath(path))
        os.chmod(path, 0o600)
        self._spare = _spare()
        if is_open:
            self.open()

    def open(self) -> None:
        """Let others connect from now on."""
        self._sock.listen(128)

    def fileno(self) -> int:
        """For polling: readable when somebody connects."""
        return self._sock.fileno()

    def accept(self, identity: str, codec: Codec[T]) -> Channel[T] | None:
        """Take one connection without waiting; None when there is none. Raises Unauthorized for another user's,
        Unavailable where one was closed because this process has no descriptor left."""
        try:
            connection, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if error.errno not in _SHORTAGES:
                raise
            if not self._turn_away():
                return None
            raise Unavailable(f"a connection was closed: {error.strerror}", code="no_descriptors") from None
        if self._spare < 0:
            self._spare = _spare()
        return _checked(connection, identity, codec)

    def _turn_away(self) -> bool:
        """Close a connection that there is no descriptor for. False where even that cannot be done now."""
        self._drop_spare()
        try:
            connection, _ = self._sock.accept()
            connection.close()
        except OSError:
            return False
        finally:
            self._spare = _spare()
        return True

    def _drop_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    def drop(self) -> None:
        """Close in a forked process, without a word to who goes on listening. Idempotent."""
        self._sock.close()
        self._drop_spare()
        self._lock.release()

    def close(self) -> None:
        """Close and remove the path. Idempotent."""
        if self._sock.fileno() >= 0:
            self._sock.close()
            self._drop_spare()
            self._path.unlink(missing_ok=True)
            Path(f"{self._path}.lock").unlink(missing_ok=True)
            self._lock.release()


def connect(path: Path, identity: str, codec: Codec[T], *, deadline_ms: int = 5_000) -> Channel[T]:
    """Connect to a Listener of the same user. Raises Unavailable, or Unauthorized when another user listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(deadline_ms / 1e3)
    try:
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        raise Unavailable(f"{path.stem} is not there: {error.strerror or error}") from None
    return _checked(sock, identity, codec)


def _checked(sock: socket.socket, identity: str, codec: Codec[T]) -> Channel[T]:
    """The channel over a connected socket. Raises Unauthorized where another user is at the other side."""
    _, uid = _peer(sock)
    if uid != os.geteuid():
        sock.close()
        raise Unauthorized(f"peer uid {uid} is not {os.geteuid()}", code="wrong_uid")
    return Channel(sock, identity, codec)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


def _spare() -> int:
    """A descriptor of nothing; -1 where there is none left."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Process and user id."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid), int(uid)

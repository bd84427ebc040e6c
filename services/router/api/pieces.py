"""Large answers, rendered and sent in pieces: between two of them everybody else has a turn.

No more waits in memory for the client than it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec
from starlette.responses import Response

from elasticmoe.common.http.body import Receive
from elasticmoe.common.http.door import Scope, Send
from elasticmoe.services.router.api.turns import Turns

T = TypeVar("T")

CHUNK_BYTES = 64 * 1024


def items_of(values: Sequence[object]) -> bytes:
    """A JSON list without its brackets."""
    return msgspec.json.encode(values)[1:-1]


def joined(parts: Sequence[bytes]) -> Iterator[bytes]:
    """Lists without their brackets, as one."""
    for number, part in enumerate(parts):
        if number:
            yield b","
        yield part


async def send_pieces(
    send: Send, pieces: Sequence[bytes], turns: Turns, is_gone: Callable[[], bool], *, is_last: bool = True
) -> None:
    """Send them as body. `is_gone`: whether the client has left, so that the rest does not matter."""
    chunks = _chunks(pieces)
    chunk: bytes | None = next(chunks, b"")
    while chunk is not None:
        following = next(chunks, None)
        await send({"type": "http.response.body", "body": chunk, "more_body": following is not None or not is_last})
        chunk = following
        if chunk is not None:
            await turns.wait()
            if is_gone():
                return


def _chunks(pieces: Sequence[bytes]) -> Iterator[bytes]:
    """The same bytes in chunks of CHUNK_BYTES or less, none of them empty."""
    kept: list[bytes] = []
    size = 0
    for piece in pieces:
        if size + len(piece) > CHUNK_BYTES and kept:
            yield b"".join(kept)
            kept, size = [], 0
        if len(piece) > CHUNK_BYTES:
            yield from (piece[at : at + CHUNK_BYTES] for at in range(0, len(piece), CHUNK_BYTES))
        elif piece:
            kept.append(piece)
            size += len(piece)
    if kept:
        yield b"".join(kept)


async def send_json(send: Send, pieces: Sequence[bytes], turns: Turns, is_gone: Callable[[], bool]) -> None:
    """Send a whole answer of JSON."""
    length = sum(len(piece) for piece in pieces)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send_pieces(send, pieces, turns, is_gone)


class JsonPieces(Response):
    """The answer of an endpoint, of JSON in pieces."""

    def __init__(self, pieces: Sequence[bytes], turns: Turns) -> None:
        super().__init__()
        self._pieces = pieces
        self._turns = turns

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send all of it."""
        await send_json(send, self._pieces, self._turns, lambda: False)

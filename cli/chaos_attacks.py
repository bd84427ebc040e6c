"""What the hostile client of `elasticmoe chaos --abuse` sends. Each attack costs its sender one connection or a few.

An attack is a coroutine over a `Target`. It returns what came back, in a word or a status: the abuser counts these. No
attack floods by volume: what overload does is `bench overload`'s to measure; here each single one is to be harmless.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

CLOSED = "closed"  # without a whole answer
SILENT = "silent"  # nothing came in time
ANSWER_S_MAX = 20.0
ANSWER_BYTES_KEPT = 4_096
BODY_BYTES = 7_900_000  # just below the default limit of a body
IDLE_CONNECTIONS = 100
IDLE_S = 1.0

_GENERATE = "/v1/completions"
_CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Target:
    """Where a deployment listens, and the model's name. `rng`: all choices are drawn from it."""

    url: str
    admin_url: str
    model: str
    rng: random.Random = field(default_factory=random.Random)

    def address(self, *, admin: bool = False) -> tuple[str, int]:
        """Host and port of a listener."""
        parts = urlsplit(self.admin_url if admin else self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80


Attack = Callable[[Target], Awaitable[str]]


@contextlib.asynccontextmanager
async def _connected(target: Target, *, admin: bool = False) -> Any:
    reader, writer = await asyncio.open_connection(*target.address(admin=admin))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> str:
    """The status of what comes, read to its end; CLOSED or SILENT."""
    kept = b""
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            while chunk := await reader.read(65_536):
                kept += chunk[: ANSWER_BYTES_KEPT - len(kept)]
    except TimeoutError:
        return SILENT if not kept else _status(kept)
    except OSError:
        pass  # a reset after the answer is a reset all the same
    return _status(kept)


def _status(raw: bytes) -> str:
    words = raw.split(b" ", 2)
    return words[1].decode("latin-1") if raw.startswith(b"HTTP/") and len(words) > 2 else CLOSED


async def _exchange(target: Target, *pieces: bytes, admin: bool = False) -> str:
    """Send pieces, each as a packet of its own, and hear the answer. The peer may close at any time."""
    try:
        async with _connected(target, admin=admin) as (reader, writer):
            hearing = asyncio.create_task(_answer(reader))
            try:
                for piece in pieces:
                    writer.write(piece)
                    async with asyncio.timeout(ANSWER_S_MAX):
                        await writer.drain()
            except (OSError, TimeoutError):
                pass  # it was refused meanwhile
            return await hearing
    except OSError:
        return CLOSED


def _head(method: str, path: str, *lines: str, host: str = "127.0.0.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode("latin-1")


def _request(path: str, raw: bytes, *lines: str) -> bytes:
    kept = ("Content-Type: application/json", f"Content-Length: {len(raw)}", "Connection: close")
    return _head("POST", path, *kept, *lines) + raw


async def _post(target: Target, path: str, body: Any) -> str:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return await _exchange(target, _request(path, raw))


# ---- requests --------------------------------------------------------------------------------------------------------

_EXTREMES: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 5e-324, 1e-300, 1e-7, 1.0, 10.0, 1e300),
    "top_p": (5e-324, 1e-300, 1e-9, 0.5, 1.0),
    "top_k": (-1, 0, 1, 255, 1_048_576),
    "min_p": (0.0, 5e-324, 1.0),
    "repetition_penalty": (5e-324, 1e-300, 1e-5, 1.0, 10.0, 1e300),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 5e-324, 2.0),
    "logit_bias": ({str(token): -100 for token in range(256)}, {"0": 100, "1": 5e-324}),
    "seed": (-(1 << 63), (1 << 63) - 1),
    "logprobs": (0, 20),
}


async def extreme_sampling(target: Target) -> str:
    """Every parameter at, near or beyond a bound."""
    rng = target.rng
    names = [name for name in _EXTREMES if rng.random() < 0.6]
    body = {name: rng.choice(_EXTREMES[name]) for name in names}
    return await _post(target, _GENERATE, {"prompt": "hello", "max_tokens": 4, **body})


async def huge_prompt(target: Target) -> str:
    """A text that no context holds."""
    word = target.rng.choice(["a", "word ", "\u00e9", "\U0001f600", " ", "\n"])
    text = word * (BODY_BYTES // len(word.encode()) // 2)
    return await _post(target, _GENERATE, {"prompt": text, "max_tokens": 1})


async def product_of_bounds(target: Target) -> str:
    """Prompts x choices x log probabilities."""
    body = {"prompt": ["hello " * 300] * 16, "n": 8, "echo": True, "logprobs": 20, "max_tokens": 2}
    return await _post(target, _GENERATE, body)


async def many_choices(target: Target) -> str:
    """As many generations as one request can name."""
    return await _post(target, _GENERATE, {"prompt": ["x"] * 64, "n": 128, "max_tokens": 1})


async def bad_at_the_end(target: Target) -> str:
    """A large body whose last byte is wrong."""
    raw = b'{"prompt":[' + b'"x",' * (BODY_BYTES // 4) + b'{"]}'
    return await _post(target, _GENERATE, raw)


async def deep(target: Target) -> str:
    """Brackets within brackets."""
    return await _post(target, _CHAT, b'{"messages":' + b"[" * 500_000 + b"}")


async def large_tokenize(target: Target) -> str:
    """Token texts of a long prompt."""
    return await _post(target, "/tokenize", {"prompt": "a b " * 200_000, "return_token_strs": True})


async def large_detokenize(target: Target) -> str:
    """As many ids as a body holds."""
    return await _post(target, "/detokenize", b'{"tokens":[' + b"1," * 1_000_000 + b"1]}")


_PARTS = b'{"role":"user","content":[' + b",".join([b'{"type":"text","text":""}'] * 250) + b"]}"
_USER = b'{"messages":[{"role":"user","content":"a"}],'
_HEAVY: dict[str, tuple[str, Callable[[], bytes]]] = {
    "floats": (_GENERATE, lambda: b'{"prompt":[' + b"1.0," * 200_000 + b"1.0]}"),
    "long integers": (_GENERATE, lambda: b'{"prompt":[' + b"1" * 300 + (b"," + b"1" * 300) * 20_000 + b"]}"),
    "brackets in a text": (_GENERATE, lambda: b'{"prompt":"' + b"[{" * (BODY_BYTES // 2) + b'"}'),
    "escapes": (_GENERATE, lambda: b'{"prompt":"' + b'\\"[' * (BODY_BYTES // 4) + b'"}'),
    "empty parts": (_CHAT, lambda: b'{"messages":[' + b",".join([_PARTS] * 60) + b"]}"),
    "names": (_CHAT, lambda: _USER + b",".join(b'"k%d":1' % i for i in range(120_000)) + b"}"),
    "template values": (_CHAT, lambda: _USER + b'"chat_template_kwargs":{"a":["k"' + b',"k"' * 120_000 + b"]}}"),
    "stops": (_CHAT, lambda: _USER + b'"stop_token_ids":[1' + b",1" * 120_000 + b"]}"),
    "digits": (_GENERATE, lambda: b'{"max_tokens":' + b"9" * BODY_BYTES + b"}"),
    "blanks": (_CHAT, lambda: _USER[:-1] + b" " * BODY_BYTES + b"}"),
}


async def heavy(target: Target) -> str:
    """A large body that takes long to look at, of one kind or another."""
    path, make = _HEAVY[target.rng.choice(sorted(_HEAVY))]
    return await _post(target, path, make())


async def many_messages(target: Target) -> str:
    """A conversation of thousands of messages."""
    return await _post(target, _CHAT, {"messages": [{"role": "user", "content": "x"}] * 4_096, "max_tokens": 1})


async def priority(target: Target) -> str:
    """First, please."""
    return await _post(target, _GENERATE, {"prompt": "x", "max_tokens": 2, "priority": -1_000})


async def left_alone(target: Target) -> str:
    """A stream whose client leaves at once, or reads nothing for a while."""
    body = msgspec.json.encode({"prompt": "x", "max_tokens": 64, "stream": True, "ignore_eos": True})
    try:
        async with _connected(target) as (_, writer):
            writer.write(_request(_GENERATE, body))
            await writer.drain()
            await asyncio.sleep(target.rng.choice([0.0, 0.02, 0.5]))
    except OSError:
        pass
    return CLOSED


# ---- framing and connections -----------------------------------------------------------------------------------------


async def endless_headers(target: Target) -> str:
    """Headers without end, on either listener."""
    line = b"X-Filler: " + b"a" * 8_000 + b"\r\n"
    head = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    return await _exchange(target, head, *[line] * 250, admin=target.rng.random() < 0.5)


async def idle_connections(target: Target) -> str:
    """Connections that say nothing, on either listener."""
    async with contextlib.AsyncExitStack() as stack:
        admin = target.rng.random() < 0.5
        with contextlib.suppress(OSError):
            for _ in range(IDLE_CONNECTIONS):
                await stack.enter_async_context(_connected(target, admin=admin))
        await asyncio.sleep(IDLE_S)
    return CLOSED


async def upgrades(target: Target) -> str:
    """Websockets and HTTP/2 where there are none, a body in a packet of its own among them."""
    kind = target.rng.choice(["websocket", "h2c"])
    lines = ("Connection: Upgrade, HTTP2-Settings", f"Upgrade: {kind}", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
    raw = b'{"prompt":"x","max_tokens":1}'
    kept = ("Content-Type: application/json", f"Content-Length: {len(raw)}")
    return await _exchange(target, _head("POST", _GENERATE, *kept, *lines), raw, admin=target.rng.random() < 0.5)


async def smuggling(target: Target) -> str:
    """Two lengths, or a length and chunks."""
    inner = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    lines = target.rng.choice(
        [
            ("Content-Length: 0", f"Content-Length: {len(inner)}"),
            ("Content-Length: 4", "Transfer-Encoding: chunked"),
            ("Transfer-Encoding: chunked, identity",),
            ("Content-Length: +0",),
        ]
    )
    return await _exchange(target, _head("POST", _GENERATE, "Content-Type: application/json", *lines) + inner)


async def strange_origins(target: Target) -> str:
    """A browser that was led here by a foreign name."""
    host = target.rng.choice(["evil.example", "127.0.0.1.evil.example", "[::1]:x", ""])
    head = _head("GET", "/v1/models", "Origin: http://evil.example", "Connection: close", host=host)
    return await _exchange(target, head)


async def two_tokens(target: Target) -> str:
    """Two credentials for the operator's listener, both wrong."""
    lines = ("Authorization: Bearer a", "Authorization: Bearer b", "Connection: close")
    return await _exchange(target, _head("GET", "/v1/layout", *lines), admin=True)


async def trickle(target: Target) -> str:
    """A body that comes byte by byte, and never whole."""
    head = _head("POST", _GENERATE, "Content-Type: application/json", "Content-Length: 1000")
    try:
        async with _connected(target) as (_, writer):
            for byte in [head, *[b" "] * 20]:
                writer.write(byte)
                await writer.drain()
                await asyncio.sleep(0.05)
    except OSError:
        pass
    return CLOSED


ATTACKS: tuple[Attack, ...] = (
    extreme_sampling,
    huge_prompt,
    product_of_bounds,
    many_choices,
    bad_at_the_end,
    deep,
    large_tokenize,
    large_detokenize,
    heavy,
    many_messages,
    priority,
    left_alone,
    endless_headers,
    idle_connections,
    upgrades,
    smuggling,
    strange_origins,
    two_tokens,
    trickle,
)

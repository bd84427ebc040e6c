"""The smallest HTTP client for benchmarks: one JSON request per connection, on the loop that also carries the load.

A full client costs tens of milliseconds to set up, which would count as a pause of every stream.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT_S = 10.0


async def ask(
    method: str, url: str, *, local: Path | None = None, token: str = "", body: bytes = b""
) -> tuple[int, bytes]:
    """Status and body of the answer. `local`: the Unix socket to send it to, instead of the URL's host. Raises
    ValueError when there is none within TIMEOUT_S."""
    parts = urlsplit(url)
    lines = [f"{method} {parts.path or '/'} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"] if body else []
    try:
        async with asyncio.timeout(TIMEOUT_S):
            if local is not None:
                reader, writer = await asyncio.open_unix_connection(local)
            else:
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                writer.write("\r\n".join([*lines, "", ""]).encode() + body)
                head = await reader.readuntil(b"\r\n\r\n")
                return int(head.split(b" ", 2)[1]), await reader.read()
            finally:
                writer.close()
    except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
        raise ValueError(f"{method} {url}: {type(error).__name__} {error}") from None

"""Turns: what takes the event loop long is cut into pieces, and between two of them everybody else has a turn.

A piece of one request at a time, in the order of asking: whoever sends many large requests waits for himself.
"""

from __future__ import annotations

import asyncio


class Turns:
    """For one asyncio loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def wait(self) -> None:
        """Return when the caller may do one piece of work, of some milliseconds, without waiting in between."""
        async with self._lock:
            await asyncio.sleep(0)

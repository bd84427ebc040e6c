"""How often the router looks at what time brings."""

from __future__ import annotations

import asyncio
from contextlib import suppress

TICK_S = 0.1
IDLE_TICK_S = 0.5  # without streams


class Pace:
    """For one asyncio loop. Whoever gives it something to do says so (`hurry`)."""

    def __init__(self) -> None:
        self._has_work = asyncio.Event()

    def hurry(self) -> None:
        """There is a stream now."""
        self._has_work.set()

    async def wait(self, *, has_work: bool) -> None:
        """Until the next tick is due."""
        if has_work:
            await asyncio.sleep(TICK_S)
            return
        self._has_work.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(IDLE_TICK_S):
                await self._has_work.wait()

"""A router process whose layout comes from a file instead of the store: `python -m tests.procs.router_child LAYOUT`.

Everything else is the real thing. Prints its port in a line on stdout once it is bound.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import uvloop

from elasticmoe.common.config import RouterConfig, load, make_run_dirs
from elasticmoe.common.http.keys import read_key
from elasticmoe.common.http.listener import bind
from elasticmoe.common.layout import Layout
from elasticmoe.common.telemetry import setup_logging
from elasticmoe.services.router.service import RouterService
from elasticmoe.services.router.text.tokenizer import load_model

POLL_S = 0.02


class FileSource:
    """Yields the file's layout whenever its epoch grows."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def watch(self) -> AsyncIterator[Layout]:
        """Never ends."""
        seen = 0
        while True:
            layout = msgspec.json.decode(self._path.read_bytes(), type=Layout)
            if layout.epoch > seen:
                seen = layout.epoch
                yield layout
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Nothing to let go of."""


async def serve(layout: Path) -> None:
    """Run the router until a signal."""
    config = load(RouterConfig)
    make_run_dirs(config)
    setup_logging("router", level=config.log_level)
    listener = bind(config.host, config.port)
    model = load_model(config.model, config.served_name)
    key = read_key(config.api_key_file) if config.api_key_file else None
    service = RouterService(config, model, FileSource(layout), listener, key)
    print(listener.getsockname()[1], flush=True)
    await service.run()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1])))

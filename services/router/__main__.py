"""`python -m elasticmoe.services.router`: start the front door. Settings come from the environment and a file."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import uvloop

from elasticmoe.common import failpoint
from elasticmoe.common.config import RouterConfig, load, make_run_dirs
from elasticmoe.common.http.keys import read_key
from elasticmoe.common.http.listener import bind
from elasticmoe.common.inherited import inherited
from elasticmoe.common.layout import Layout
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.telemetry import setup_logging
from elasticmoe.common.transport import describe
from elasticmoe.services.router.service import LayoutSource, RouterService
from elasticmoe.services.router.text.tokenizer import load_model


def layout_source(config: RouterConfig) -> LayoutSource:
    """The deployment's store. Imported here, so that a router with another source needs no redis."""
    from elasticmoe.common.store import AsyncStore, async_store_of

    class StoreSource:
        """The store as a source of layouts."""

        def __init__(self, store: AsyncStore) -> None:
            self._store = store

        def watch(self) -> AsyncIterator[Layout]:
            """The present layout and every later one."""
            return self._store.watch_layout()

        async def close(self) -> None:
            """Close the connections."""
            await self._store.close()

    return StoreSource(async_store_of(config, "router"))


async def _serve(config: RouterConfig) -> None:
    log = setup_logging("router", level=config.log_level, as_json=config.log_json)
    with inherited("router") or bind(config.host, config.port) as listener:
        key = read_key(config.api_key_file) if config.api_key_file else None
        model = load_model(config.model, config.served_name)
        service = RouterService(config, model, layout_source(config), listener, key)
        host, port = listener.getsockname()[:2]
        log.info("serving", host=host, port=port, model=model.name, has_key=key is not None)
        await service.run()


def main() -> int:
    """Run until SIGTERM; the exit status."""
    try:
        config = load(RouterConfig)
        make_run_dirs(config)
        failpoint.enable(config.failpoint_dir, "router")
        uvloop.run(_serve(config))
    except ElasticMoEError as error:
        print(f"elasticmoe-router: {describe(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m elasticmoe.services.router`: start the front door. Settings come from the environment and a file."""

from __future__ import annotations

import uvloop

from elasticmoe.common.config import RouterConfig
from elasticmoe.common.http.keys import read_key
from elasticmoe.common.http.listener import bind
from elasticmoe.common.inherited import inherited
from elasticmoe.common.process import leave, run_service
from elasticmoe.common.store import async_store_of
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.router.service import RouterService
from elasticmoe.services.router.text.tokenizer import load_model

log = get_logger("router")


async def _serve(config: RouterConfig) -> None:
    with inherited("router") or bind(config.host, config.port) as listener:
        key = read_key(config.api_key_file) if config.api_key_file else None
        model = load_model(config.model, config.served_name)
        service = RouterService(config, model, async_store_of(config, "router"), listener, key)
        host, port = listener.getsockname()[:2]
        log.info("serving", host=host, port=port, model=model.name, has_key=key is not None)
        await service.run()


def main() -> int:
    """Run until SIGTERM; the exit status."""
    return run_service("router", RouterConfig, lambda config: uvloop.run(_serve(config)))


if __name__ == "__main__":
    leave(main())

"""The processes of a deployment: after whom each starts; they stop in the reverse order."""

from __future__ import annotations

import os
import sys
from typing import Any

from elasticmoe.cli.children import ChildSpec
from elasticmoe.cli.embedded_store import store_spec
from elasticmoe.cli.listeners import ADMIN, ADMIN_LOCAL, ROUTER
from elasticmoe.cli.settings import Settings

_ROUTER_GRACE_S = 10.0  # beyond what its requests may take
_GRACE_S = 15.0


def process_specs(settings: Settings, *, is_resuming: bool) -> list[ChildSpec]:
    """All children of `settings`, as this process starts them. Writes the embedded store's configuration.
    `is_resuming`: what the store has decides whether any is to start. Raises ElasticMoEError."""
    scaler, drained_s = settings.scaler, settings.router.drain_seconds + _ROUTER_GRACE_S
    stores = [] if scaler.store_url else [store_spec(scaler)]
    store = tuple(spec.name for spec in stores)
    first = store if is_resuming else ()
    return [
        *stores,
        _service("keeper", "elasticmoe.services.hmm.keeper", awaits=scaler.socket("keeper"), after=first),
        _service("hmm", "elasticmoe.services.hmm", after=("keeper",)),
        _service("pool", "elasticmoe.services.worker", "--launcher", str(os.getpid()), is_outlived=True, after=first),
        _service("scaler", "elasticmoe.services.scaler", sockets=(ADMIN, ADMIN_LOCAL), after=store),
        # The only one without which nobody is served: ranks serve on without the others (promise P6).
        _service(
            "router", "elasticmoe.services.router", grace_s=drained_s, sockets=(ROUTER,), is_vital=True, after=store
        ),
    ]


def _service(name: str, module: str, *arguments: str, **options: Any) -> ChildSpec:
    # -P: the working directory is not searched for modules; ours come from PYTHONPATH.
    return ChildSpec(name, (sys.executable, "-P", "-m", module, *arguments), **({"grace_s": _GRACE_S} | options))

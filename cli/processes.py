"""The processes of a deployment, in the order in which they start; they stop in the reverse order."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cli.children import ChildSpec
from cli.embedded_store import store_spec
from cli.settings import Settings

_ROUTER_GRACE_S = 40.0  # it lets running requests end for up to 30 s
_GRACE_S = 15.0


def process_specs(settings: Settings) -> list[ChildSpec]:
    """All children of `settings`, as this process starts them. Writes the embedded store's configuration. Raises
    ElasticMoEError."""
    scaler = settings.scaler
    specs = [] if scaler.store_url else [store_spec(scaler)]
    return [
        *specs,
        _service("keeper", "services.hmm.keeper", awaits=scaler.socket("keeper")),
        _service("hmm", "services.hmm"),
        _service("pool", "services.worker", "--launcher", str(os.getpid()), is_outlived=True),
        _service("scaler", "services.scaler"),
        _service("router", "services.router", grace_s=_ROUTER_GRACE_S),
    ]


def _service(
    name: str,
    module: str,
    *arguments: str,
    grace_s: float = _GRACE_S,
    awaits: Path | None = None,
    is_outlived: bool = False,
) -> ChildSpec:
    # -P: the working directory is not searched for modules; ours come from PYTHONPATH.
    return ChildSpec(name, (sys.executable, "-P", "-m", module, *arguments), grace_s, awaits, is_outlived)

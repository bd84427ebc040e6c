"""A scaler in a process of its own."""

from __future__ import annotations

from pathlib import Path

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.families import load_spec
from elasticmoe.common.fence import Fence
from elasticmoe.common.store import Store, store_of
from elasticmoe.common.transport import Sockets, new_identity
from elasticmoe.services.scaler.control.poller import Poller
from elasticmoe.services.scaler.parts import ScalerParts
from elasticmoe.services.scaler.service import Scaler
from elasticmoe.services.scaler.store.reserve import DiskReserve


def open_scaler(config: ScalerConfig) -> Scaler:
    """Raises CheckpointError for a model that cannot be read, InvalidRequest for one that cannot be split over the
    devices of a replica, Unavailable where a file of epochs cannot be."""
    spec = load_spec(Path(config.model), config.dtype, config.tp)
    return Scaler(config, spec, system_parts(config, store_of(config, "scaler")))


def system_parts(config: ScalerConfig, store: Store) -> ScalerParts:
    """Sockets, threads and files. Raises Unavailable where a file of epochs cannot be read."""
    return ScalerParts(
        identity=new_identity("scaler"),
        new_identity=new_identity,
        clock=SYSTEM_CLOCK,
        transport=Sockets(config.socket),
        poller=Poller(),
        store=store,
        fence=Fence(config.state_dir, "scaler"),
        epochs=Fence(config.state_dir, "layout"),
        reserve=DiskReserve(config.run_path / "store"),
    )

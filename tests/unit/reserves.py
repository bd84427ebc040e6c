"""A reserve of a store whose disk is another host's."""

from __future__ import annotations

from pathlib import Path

from elasticmoe.services.scaler.store.reserve import DiskReserve

NO_RESERVE = DiskReserve(Path("/nonexistent"))

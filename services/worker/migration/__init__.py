"""Sequences on their way between ranks: handed over with their KV while they run, taken over, told to the routers."""

from elasticmoe.services.worker.migration.migration import Migration

__all__ = ["Migration"]

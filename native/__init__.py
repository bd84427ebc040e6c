"""Native units: host mappings, the shared-memory bus, the ledger, CPU kernels. Each is typed by the .pyi beside it."""

"""Native units of ElasticMoE: host mappings, the shared-memory bus and the ledger. Each unit is typed by the .pyi beside it."""

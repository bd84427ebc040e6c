"""The worker: a pool of standby processes, and the ranks that they become (the paper's IMM)."""

"""The engine's decisions: sequences, KV blocks, the scheduler (all pure) and the sampler."""

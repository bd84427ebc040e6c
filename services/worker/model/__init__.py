"""The models: decoder families over a compute backend, and the oracle model."""

"""The models: decoder families over native kernels, and the oracle model."""

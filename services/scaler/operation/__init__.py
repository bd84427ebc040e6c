"""A scale operation, from its order to its end, phase by phase. Pure."""

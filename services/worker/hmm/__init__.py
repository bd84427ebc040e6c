"""A rank's connection to the HMM, and the memory that it maps."""

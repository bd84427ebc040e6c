"""A second device backend, for tests only: it has the rules of accelerators, and no accelerator."""

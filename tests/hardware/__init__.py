"""Tests on a GPU that is there: `make accel-test`. No module of tests is here: what runs are the tests that devices,
compute backends and whole deployments have to pass anyway."""

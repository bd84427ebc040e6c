"""L2: all services' cores in one thread over an event heap, from one seed. `python -m tests.sim SEED` replays one."""

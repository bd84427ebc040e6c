"""`python -m elasticmoe.services.worker [--launcher PID]`: start a worker pool.

With `--launcher`, which names its parent, ranks outlive the pool: the launcher takes them in and ends them.
"""

from __future__ import annotations

import argparse
import os

from elasticmoe.common.config import PoolConfig
from elasticmoe.common.process import leave, run_service
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.services.worker.pool.pool import Pool


def main() -> int:
    """Run until SIGTERM; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m elasticmoe.services.worker", description="A worker pool.")
    parser.add_argument("--launcher", type=int, default=0, metavar="PID", help="the parent that takes ranks in")
    launcher: int = parser.parse_args().launcher

    def run(config: PoolConfig) -> None:
        if launcher and launcher != os.getppid():
            raise ConfigError(f"--launcher is {launcher}; the parent is {os.getppid()}")
        Pool(config, launcher).run()

    return run_service("worker", PoolConfig, run)


if __name__ == "__main__":
    leave(main())

"""`python -m elasticmoe.services.worker [--launcher PID]`: start a worker pool.

With `--launcher`, which names its parent, ranks outlive the pool: the launcher takes them in and ends them.
"""

from __future__ import annotations

import argparse
import os
import sys

from elasticmoe.common import failpoint
from elasticmoe.common.config import PoolConfig, load, make_run_dirs
from elasticmoe.common.protocol.errors import ConfigError, ElasticMoEError
from elasticmoe.common.telemetry import setup_logging
from elasticmoe.common.transport import describe
from elasticmoe.services.worker.pool.pool import Pool


def main() -> int:
    """Run until SIGTERM; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m elasticmoe.services.worker", description="A worker pool.")
    parser.add_argument("--launcher", type=int, default=0, metavar="PID", help="the parent that takes ranks in")
    launcher: int = parser.parse_args().launcher
    try:
        if launcher and launcher != os.getppid():
            raise ConfigError(f"--launcher is {launcher}; the parent is {os.getppid()}")
        config = load(PoolConfig)
        make_run_dirs(config)
        failpoint.enable(config.failpoint_dir, "pool")
        setup_logging("worker", level=config.log_level, as_json=config.log_json)
        Pool(config, launcher).run()
    except ElasticMoEError as error:
        print(f"elasticmoe-worker: {describe(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

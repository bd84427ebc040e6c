"""`python -m services.worker`: start a worker pool."""

from __future__ import annotations

import sys

from common import failpoint
from common.config import PoolConfig, load, make_run_dirs
from common.protocol.errors import ElasticMoEError
from common.telemetry import setup_logging
from common.transport import describe
from services.worker.pool import Pool


def main() -> int:
    """Run until SIGTERM; the exit status."""
    try:
        config = load(PoolConfig)
        make_run_dirs(config)
        failpoint.enable(config.failpoint_dir, "pool")
        setup_logging("worker", level=config.log_level, as_json=config.log_json)
        Pool(config).run()
    except ElasticMoEError as error:
        print(f"elasticmoe-worker: {describe(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

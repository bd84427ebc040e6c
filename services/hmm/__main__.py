"""`python -m elasticmoe.services.hmm`: the HMM of one run directory. It needs the keeper (services/hmm/keeper.py)."""

from __future__ import annotations

import sys

from elasticmoe.common import failpoint
from elasticmoe.common.config import HmmConfig, load, make_run_dirs
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.transport import describe
from elasticmoe.services.hmm.assembly import open_hmm


def main() -> int:
    """Run until SIGTERM or SIGINT; 1, with one line on stderr, when it cannot start."""
    try:
        config = load(HmmConfig)
        make_run_dirs(config)
        failpoint.enable(config.failpoint_dir, "hmm")
        hmm = open_hmm(config)
    except ElasticMoEError as error:
        print(f"elasticmoe-hmm: {describe(error)}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:  # state that cannot be read
        print(f"elasticmoe-hmm: cannot_start: {error}", file=sys.stderr)
        return 1
    try:
        hmm.start()
        hmm.run()
    except ElasticMoEError as error:
        print(f"elasticmoe-hmm: {describe(error)}", file=sys.stderr)
        return 1
    finally:
        hmm.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m elasticmoe.services.hmm`: the HMM of one run directory. It needs the keeper (services/hmm/keeper.py)."""

from __future__ import annotations

from elasticmoe.common.config import HmmConfig
from elasticmoe.common.process import leave, run_service
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.services.hmm.assembly import open_hmm


def run(config: HmmConfig) -> None:
    """Until SIGTERM or SIGINT."""
    try:
        hmm = open_hmm(config)
    except (OSError, ValueError) as error:  # state that cannot be read
        raise ElasticMoEError(str(error), code="start_failed") from None
    try:
        hmm.start()
        hmm.run()
    finally:
        hmm.close()


if __name__ == "__main__":
    leave(run_service("hmm", HmmConfig, run))

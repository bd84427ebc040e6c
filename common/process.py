"""How the process of every service begins and ends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from elasticmoe.common import failpoint
from elasticmoe.common.config import load, make_run_dirs
from elasticmoe.common.protocol.errors import EXIT_SUPERSEDED, ElasticMoEError, Fenced
from elasticmoe.common.settings import Common
from elasticmoe.common.telemetry import Logger, setup_logging
from elasticmoe.common.transport import describe

C = TypeVar("C", bound=Common)


def leave(status: int) -> NoReturn:
    """End this process with an exit status, once what it owns has been closed. To take down what has been imported
    costs a tenth of a second of a core, and a thread that waits for a disk would be waited for."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_service(name: str, kind: type[C], serve: Callable[[C], None]) -> int:
    """Read the settings, make the run directory, log as `name`, and `serve`; the exit status. An error of ours ends it,
    with one line on stderr, in the form of the logs where they are set up."""
    log: Logger | None = None
    try:
        config = load(kind)
        make_run_dirs(config)
        failpoint.enable(config.failpoint_dir, name)
        log = setup_logging(name, level=config.log_level, log_format=config.log_format)
        serve(config)
    except ElasticMoEError as error:
        if log is not None and config.log_format == "json":
            log.error(error.message, code=error.code)
        else:
            print(f"elasticmoe-{name}: {describe(error)}", file=sys.stderr)
        return EXIT_SUPERSEDED if error.code == Fenced.code else 1
    return 0

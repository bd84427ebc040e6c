"""A standby process: everything imported, warmed up, no memory of the model; waits for a seat and becomes its rank.

The fork server imports `services.worker.preload` before it forks the first standby; this module is also imported by the
pool, which needs none of that, so the slow imports are inside the function.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection

import msgspec

from common import failpoint
from common.config import PoolConfig
from common.fence import Fence
from common.protocol import pool as pool_messages
from common.protocol.codec import encode
from common.protocol.errors import ElasticMoEError
from common.protocol.pool import StartRank
from common.protocol.replies import refusal
from common.telemetry import setup_logging


def standby_main(pipe: Connection, settings: bytes) -> None:
    """Entry point of a forked child: wait for StartRank on `pipe`, serve as that rank, exit.

    Exit status 0: told to stop, or the pool is gone. 1: failed, after telling the pool why.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to translate
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    import torch

    from services.worker.rank import Rank

    config = msgspec.json.decode(settings, type=PoolConfig)
    torch.set_num_threads(1)  # more ranks than cores with one OpenMP pool each are ten times slower
    try:
        received = pool_messages.CODEC.decode(pipe.recv_bytes())
    except (EOFError, OSError):
        return
    message = received.body
    assert isinstance(message, StartRank)
    name = f"rank-{message.rank}"
    failpoint.enable(config.failpoint_dir, str(message.rank))
    log = setup_logging(name, level=config.log_level, as_json=config.log_json)
    if config.pin_cores:
        _pin(message.device)
    try:
        # A seat fences by itself too: a rank of a superseded scaler must not map the memory of its successor's.
        Fence(config.state_dir, f"rank-{message.slot}").check(received.epoch, received.sender)
        with Rank(config, message, pipe) as rank:
            rank.run()
    except ElasticMoEError as error:
        log.error(error.message, code=error.code)
        _report(pipe, error, message.incarnation)
        sys.exit(1)
    except Exception as error:
        log.exception("rank failed")
        _report(pipe, ElasticMoEError(f"{type(error).__name__} in the rank; see the worker's log"), message.incarnation)
        sys.exit(1)


def _pin(device: str) -> None:
    """Run on the core that belongs to a device of this machine."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(device.rpartition(":")[2]) % len(cores)]})


def _report(pipe: Connection, error: ElasticMoEError, sender: str) -> None:
    try:
        pipe.send_bytes(encode(refusal(error), sender=sender))
    except OSError:  # the pool is gone; nobody is left to tell
        return

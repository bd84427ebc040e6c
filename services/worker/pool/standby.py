"""A standby process: everything imported, warmed up, no memory of the model; waits for a seat and becomes its rank.

It leaves when its pool ends before it has a seat. A rank does not: it has all that it needs for serving, and the next
pool finds it by its seat's record (seats.py).
"""

from __future__ import annotations

import os
import select
import signal

from elasticmoe.common import failpoint
from elasticmoe.common.config import PoolConfig
from elasticmoe.common.devices.factory import prepare_torch
from elasticmoe.common.devices.names import DeviceCount, DeviceId
from elasticmoe.common.fdchannel import Channel
from elasticmoe.common.fence import Fence
from elasticmoe.common.machine import usable_cores
from elasticmoe.common.protocol.errors import ElasticMoEError, Unavailable
from elasticmoe.common.protocol.pool import StartRank, ToPool
from elasticmoe.common.protocol.scaler import RankReady
from elasticmoe.common.protocol.standby import Posted
from elasticmoe.common.telemetry import get_logger, setup_logging
from elasticmoe.services.worker.pool.seats import SeatLock, path_of

log = get_logger("rank")


def standby_main(config: PoolConfig, channel: Channel[ToPool]) -> int:
    """Entry point of a forked process: wait for StartRank on `channel`, serve as that rank; the exit status.

    0: told to stop, or the pool is gone before there was a seat. 1: failed, after putting on file why.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    import torch

    torch.set_num_threads(1)  # more ranks than cores with one OpenMP pool each are ten times slower
    try:
        prepare_torch(DeviceCount.parse(config.devices))  # not before the fork: it may touch the accelerator
    except ElasticMoEError as error:
        log.warning("torch is not prepared; a rank will say so", because=error.message)
    poller = select.poll()
    poller.register(channel.fileno(), select.POLLIN)
    poller.poll()
    try:
        received, _ = channel.receive()
    except Unavailable:
        return 0
    message = received.body
    assert isinstance(message, StartRank)
    name = f"rank-{message.rank}"
    failpoint.enable(config.failpoint_dir, str(message.rank))
    setup_logging(name, level=config.log_level, log_format=config.log_format)
    hold: SeatLock | None = None
    try:
        hold = SeatLock(path_of(config.state_dir, config.pool_name), message)
        if poller.poll(0):  # its pool is gone, and the next one may have looked before there was a hold
            return 0
        # A seat fences by itself too: a rank of a superseded scaler must not map the memory of its successor's.
        Fence(config.state_dir, f"rank-{message.slot}").check(received.epoch, received.sender)
        _serve(config, message, hold, channel)
    except ElasticMoEError as error:
        log.error(error.message, code=error.code)
        return _fail(hold, error)
    except Exception as error:
        log.exception("rank failed")
        return _fail(hold, ElasticMoEError(f"{type(error).__name__} in the rank; see the worker's log"))
    return 0


def _serve(config: PoolConfig, seat: StartRank, hold: SeatLock, channel: Channel[ToPool]) -> None:
    from elasticmoe.services.worker.rank.assembly import open_rank

    cores = max(1, int(usable_cores()))
    if config.pin_cores:
        _pin(seat.device)

    def tell_ready(ready: RankReady) -> None:
        hold.tell_ready(ready)
        try:
            channel.send(Posted())
        except ElasticMoEError as error:
            log.info("the pool is gone; the next one will find this rank", because=error.message)
        channel.close()  # nothing more is said here

    with open_rank(config, seat, tell_ready, cores) as rank:
        rank.run()


def _pin(device: str) -> None:
    """Run on the core that belongs to a device of this machine."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[DeviceId.parse(device).index % len(cores)]})


def _fail(hold: SeatLock | None, error: ElasticMoEError) -> int:
    try:
        if hold is not None:
            hold.tell_failure(error)
    except ElasticMoEError as another:
        log.error("why it ends cannot be put on file", because=another.message)
    return 1

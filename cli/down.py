"""`elasticmoe down`: stop the deployment of a run directory."""

from __future__ import annotations

import argparse
import os
import select
import signal
import time
from pathlib import Path

from elasticmoe.cli.paths import run_dir_of
from elasticmoe.cli.rundir import RunDir, is_left_over
from elasticmoe.cli.settings import parse_seconds
from elasticmoe.cli.terminal import say
from elasticmoe.common.protocol.errors import ConfigError, Conflict, DeadlineExceeded, ElasticMoEError
from elasticmoe.common.record import DAMAGED, ProcessRecord, living_record

HELP = "stop a deployment"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `down`."""
    parser.add_argument("--run-dir", metavar="DIR", help="the deployment's run directory")
    parser.add_argument(
        "--timeout", type=parse_seconds, default=120.0, metavar="S", help="give up waiting after that (120)"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 when nothing runs any more. Raises DeadlineExceeded when it still stops after `--timeout`."""
    path = run_dir_of(args.run_dir)
    try:
        record = living_record(path)
    except ConfigError as error:
        if error.code != DAMAGED:
            raise
        _clear(path, error)
        return 0
    if record is None:
        return _nothing_runs(args)
    say(f"stopping {record.served_name} in {path}")
    began = time.monotonic()
    if not terminate(record.launcher, args.timeout):
        raise DeadlineExceeded(f"the deployment in {path} still stops after {args.timeout:g} s", code="still_stopping")
    say(f"stopped in {time.monotonic() - began:.1f} s")
    return 0


def _nothing_runs(args: argparse.Namespace) -> int:
    """Say so; what a launcher that was killed left behind is removed, except its logs."""
    path = run_dir_of(args.run_dir)
    if is_left_over(path):
        text = f"a launcher is starting in {path}; try again in a moment"
        _clear(path, ElasticMoEError(text, code="starting", retryable=True))
    else:
        say(f"nothing runs in {path}")
    return 0


def _clear(path: Path, used: ElasticMoEError) -> None:
    """Remove what was left, except its logs. Raises `used` when a launcher lives there."""
    try:
        RunDir(path).remove(keep_logs=True)
    except Conflict:
        raise used from None
    say(f"nothing runs in {path}; what an interrupted run left was removed, its logs are in {path / 'logs'}")


def terminate(process: ProcessRecord, timeout_s: float) -> bool:
    """SIGTERM to exactly that launcher, and wait: whether it ended in time. True when it does not run.

    The pidfd is opened before start time, owner and command are compared, so that a process that gets the same id
    later is not hit.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if not process.is_alive() or not _is_launcher(process.pid):
            return True
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1e3))
    except ProcessLookupError:
        return True
    except PermissionError:
        raise ElasticMoEError(f"process {process.pid} is another user's", code="not_permitted") from None
    finally:
        os.close(pidfd)


def _is_launcher(pid: int) -> bool:
    """Whether the process runs `elasticmoe up`."""
    try:
        return b"up" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False

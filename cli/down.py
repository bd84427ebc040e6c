"""`elasticmoe down`: stop the deployment of a run directory."""

from __future__ import annotations

import argparse
import os
import select
import signal
import time
from pathlib import Path

from elasticmoe.cli.paths import run_dir_of
from elasticmoe.cli.rundir import RunDir, is_left_over, order_stop
from elasticmoe.cli.settings import parse_seconds
from elasticmoe.cli.terminal import say
from elasticmoe.common.protocol.errors import ConfigError, Conflict, DeadlineExceeded, ElasticMoEError
from elasticmoe.common.record import DAMAGED, DeploymentRecord, ProcessRecord, living_record

HELP = "stop a deployment"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `down`."""
    parser.add_argument("--run-dir", metavar="DIR", help="the deployment's run directory")
    parser.add_argument(
        "--keep-state",
        action="store_true",
        help="keep layout, policy, journal and token for the next `up`, instead of removing what it made",
    )
    parser.add_argument(
        "--timeout", type=parse_seconds, default=120.0, metavar="S", help="give up waiting after that (120)"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 when nothing runs any more. Raises DeadlineExceeded when it still stops after `--timeout`, and
    ElasticMoEError where the state was to be kept and cannot be: before anything is stopped, where that is known."""
    path = run_dir_of(args.run_dir)
    try:
        record = living_record(path)
    except ConfigError as error:
        if error.code != DAMAGED or args.keep_state:
            raise
        _clear(path, error)
        return 0
    if record is None:
        return _nothing_runs(path, is_keeping=args.keep_state)
    _order(path, record, is_keeping=args.keep_state)
    say(f"stopping {record.served_name} in {path}")
    began = time.monotonic()
    if not terminate(record.launcher, args.timeout):
        raise DeadlineExceeded(f"the deployment in {path} still stops after {args.timeout:g} s", code="still_stopping")
    if args.keep_state and not is_left_over(path):
        raise Conflict(f"it has stopped, and its state was removed: it was already being stopped in {path}")
    say(f"stopped in {time.monotonic() - began:.1f} s")
    if args.keep_state:
        say(f"{path} keeps its state: `elasticmoe up` goes on with it, `elasticmoe down` removes it")
    return 0


def _order(path: Path, record: DeploymentRecord, *, is_keeping: bool) -> None:
    """Let its launcher know what to do with the state. Raises ElasticMoEError: then nothing has been stopped."""
    if record.keeps_state is None:
        if is_keeping:
            text = (
                f"what runs in {path} goes on: it was started by a version that removes its state whenever it is "
                f"stopped. `kill -9 {record.launcher.pid}` ends all of it as a power failure would, and `elasticmoe "
                f"up` resumes what that leaves"
            )
            raise ElasticMoEError(text, code="version_mismatch")
        return
    try:
        order_stop(path, is_keeping=is_keeping, otherwise=record.keeps_state)
    except OSError as error:
        what = "be kept" if is_keeping else "be removed (`--keep-state` stops it without that)"
        text = f"nothing was stopped: that the state is to {what} cannot be written to {path}: {error.strerror}"
        raise ElasticMoEError(text, code="storage_full") from None


def _nothing_runs(path: Path, *, is_keeping: bool) -> int:
    """Say so; what an earlier run has left is removed, except its logs, unless it is to be kept."""
    if not is_left_over(path):
        say(f"nothing runs in {path}")
        return 0
    text = f"a launcher is starting in {path}; try again in a moment"
    used = ElasticMoEError(text, code="starting", retryable=True)
    if not is_keeping:
        _clear(path, used)
        return 0
    try:
        RunDir(path).release()
    except Conflict:
        raise used from None
    say(f"nothing runs in {path}; it keeps what an earlier run has left")
    return 0


def _clear(path: Path, used: ElasticMoEError) -> None:
    """Remove what was left, except its logs. Raises `used` when a launcher lives there."""
    try:
        RunDir(path).remove(keep_logs=True)
    except Conflict:
        raise used from None
    say(f"nothing runs in {path}; what an earlier run left was removed, its logs are in {path / 'logs'}")


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

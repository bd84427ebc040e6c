"""`elasticmoe down`: stop the deployment of a run directory."""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import time
from pathlib import Path

from elasticmoe.cli.paths import run_dir_of
from elasticmoe.cli.rundir import RunDir, ask_nothing, ask_to_keep, has_logs, is_left_over
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
    if args.keep_state:
        _ask_to_keep(path, record)
    else:
        ask_nothing(path)
    say(f"stopping {record.served_name} in {path}")
    began = time.monotonic()
    if not terminate(record.launcher, args.timeout):
        raise DeadlineExceeded(f"the deployment in {path} still stops after {args.timeout:g} s", code="still_stopping")
    if args.keep_state:
        if not is_left_over(path):
            raise _removed(path)
    elif is_left_over(path):  # as a launcher leaves it that was to keep it, or that only took up what was there
        _remove(path, keep_logs=has_logs(path))
    say(f"stopped in {time.monotonic() - began:.1f} s")
    if args.keep_state:
        say(f"{path} keeps its state: `elasticmoe up` goes on with it, `elasticmoe down` removes it")
    return 0


def _ask_to_keep(path: Path, record: DeploymentRecord) -> None:
    """Let its launcher know. Raises ElasticMoEError: then nothing has been stopped."""
    if record.keeps_state is None:
        text = (
            f"what runs in {path} goes on: it was started by a version that removes its state whenever it is "
            f"stopped. `kill -9 {record.launcher.pid}` ends all of it as a power failure would, and `elasticmoe "
            f"up` resumes what that leaves"
        )
        raise ElasticMoEError(text, code="version_mismatch")
    try:
        is_heard = ask_to_keep(path)
    except OSError as error:
        text = f"nothing was stopped: that the state is to be kept cannot be said in {path}: {error.strerror}"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (ElasticMoEError(text, code="storage_full") if full else ConfigError(text)) from None
    if not is_heard:
        raise _removed(path)


def _removed(path: Path) -> Conflict:
    return Conflict(f"it has stopped, and its state was removed: it was already being stopped in {path}")


def _nothing_runs(path: Path, *, is_keeping: bool) -> int:
    """Say so; what an earlier run has left is removed, except its logs, unless it is to be kept."""
    if not is_left_over(path):
        say(f"nothing runs in {path}")
        return 0
    if not is_keeping:
        _clear(path)
        return 0
    try:
        RunDir(path).release()
    except Conflict:
        raise _used(path) from None
    say(f"nothing runs in {path}; it keeps what an earlier run has left")
    return 0


def _clear(path: Path, error: ElasticMoEError | None = None) -> None:
    """Remove what was left, except its logs. Raises `error`, or `starting`, when a launcher lives there."""
    _remove(path, keep_logs=True, error=error)
    say(f"nothing runs in {path}; what an earlier run left was removed, its logs are in {path / 'logs'}")


def _remove(path: Path, *, keep_logs: bool, error: ElasticMoEError | None = None) -> None:
    try:
        RunDir(path).remove(keep_logs=keep_logs)
    except Conflict:
        raise error or _used(path) from None


def _used(path: Path) -> ElasticMoEError:
    text = f"a launcher is starting in {path}; try again in a moment"
    return ElasticMoEError(text, code="starting", retryable=True)


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

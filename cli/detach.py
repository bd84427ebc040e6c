"""`up --detach`: the launcher as a process of its own session, and the parent that waits until it is ready."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from elasticmoe.cli.console import Console
from elasticmoe.cli.settings import Settings, child_environment
from elasticmoe.common.protocol.errors import DeadlineExceeded, ElasticMoEError

_STOP_SECONDS_MAX = 120.0


def start_detached(args: argparse.Namespace, settings: Settings, console: Console) -> int:
    """Start the launcher in a session of its own and relay what it reports. Returns 0 when the deployment is ready.

    The run directory exists and is not claimed. Raises ElasticMoEError with the launcher's own text when it fails; an
    interrupt stops the launcher before it goes on.
    """
    reader, writer = os.pipe()
    argv = [sys.executable, "-P", "-m", "elasticmoe.cli.main", "up", "--report-fd", str(writer)]
    argv += ["--ready-timeout", str(args.ready_timeout)]
    flags = {"--keep-logs": args.keep_logs, "--keep-state": args.keep_state, "--fresh": args.fresh}
    argv += [flag for flag, is_set in flags.items() if is_set]
    with open(settings.scaler.run_path / "logs" / "launcher.log", "ab") as log:
        launcher = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child_environment(settings),
            cwd=settings.scaler.run_path,
            start_new_session=True,
            pass_fds=(writer,),
        )
    os.close(writer)
    try:
        with open(reader, encoding="utf-8") as pipe:
            for line in pipe:
                entry = json.loads(line)
                if "ready" not in entry:
                    _relay(entry, console)
                elif entry["ready"]:
                    launcher.returncode = 0  # it goes on without us; nobody waits for it here
                    return 0
                else:
                    code, _, text = str(entry["error"]).partition(": ")
                    _wait(launcher)  # it clears away what it made
                    raise ElasticMoEError(text, code=code)
    except KeyboardInterrupt:
        console.close()
        launcher.terminate()
        console.line("stopping")
        _wait(launcher)
        raise
    _wait(launcher)
    raise ElasticMoEError(
        f"the launcher ended with code {launcher.returncode} before it was ready; see "
        f"{settings.scaler.run_path / 'logs' / 'launcher.log'}",
        code="start_failed",
    )


def _wait(launcher: subprocess.Popen[bytes]) -> None:
    """Wait for the launcher's end. Raises DeadlineExceeded when it takes too long."""
    try:
        launcher.wait(_STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        text = f"the launcher, process {launcher.pid}, still stops after {_STOP_SECONDS_MAX:g} s"
        raise DeadlineExceeded(text, code="still_stopping") from None


def _relay(entry: dict[str, object], console: Console) -> None:
    if "line" in entry:
        console.line(str(entry["line"]))
    elif "private" in entry:
        console.private_line(str(entry["private"]), str(entry["otherwise"]))
    else:
        done, total = entry.get("done"), entry.get("total")
        console.progress(str(entry["phase"]), *(value if isinstance(value, int) else 0 for value in (done, total)))

"""Which processes the launcher keeps running: its record in the run directory, as the admin surface shows it."""

from __future__ import annotations

from pathlib import Path

from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.record import DeploymentRecord, living_record
from elasticmoe.services.scaler.api import views

NO_LAUNCHER = "no launcher runs here: who started the processes, such as a container engine, restarts them"


def processes_view(run_dir: Path) -> views.Processes:
    """GET /v1/processes. A record that cannot be read is one that is not known."""
    try:
        record = living_record(run_dir)
    except ConfigError as error:
        return views.Processes(is_known=False, reason=error.message, processes=[])
    if record is None:
        return views.Processes(is_known=False, reason=NO_LAUNCHER, processes=[])
    return views.Processes(is_known=True, reason="", processes=[*_running(record), *_down(record)])


def _running(record: DeploymentRecord) -> list[views.Process]:
    return [
        views.Process(
            name=process.name,
            state="running" if process.is_alive() else "ended",
            pid=process.pid,
            restarts=process.restarts,
            reason=None,
            starts_unix=None,
        )
        for process in (record.launcher, *record.processes)
    ]


def _down(record: DeploymentRecord) -> list[views.Process]:
    return [
        views.Process(
            name=process.name,
            state="failing" if process.is_failing else "restarting",
            pid=None,
            restarts=process.restarts,
            reason=process.reason,
            starts_unix=process.at,
        )
        for process in record.down
    ]

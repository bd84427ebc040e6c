"""`python -m elasticmoe.services.scaler`: start the scaler and its admin listener."""

from __future__ import annotations

import threading

from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.http.listener import bind
from elasticmoe.common.inherited import inherited
from elasticmoe.common.private import read_secret
from elasticmoe.common.process import leave, run_service
from elasticmoe.common.telemetry import get_logger
from elasticmoe.common.tracing.opening import open_spans
from elasticmoe.services.scaler.api.admin import build_app, serve
from elasticmoe.services.scaler.assembly import open_scaler

log = get_logger("scaler")


def run(config: ScalerConfig) -> None:
    """Until SIGTERM."""
    token = read_secret(config.secret("admin.token"))
    scaler = open_scaler(config)
    app = build_app(
        scaler.status_cache,
        scaler.commands,
        scaler.events,
        scaler.series,
        scaler.experts,
        scaler.meters,
        token,
        config.operation_deadline_s,
        config.admin_host,
        config.run_path,
    )
    sock = inherited("admin") or bind(config.admin_host, config.admin_port)
    local = inherited("admin.sock")  # the same for this user's own commands, in the run directory
    sockets = [sock, local] if local is not None else [sock]
    server = serve(app, scaler.meters, config.keep_alive_seconds)
    listener = threading.Thread(target=server.run, kwargs={"sockets": sockets}, name="admin", daemon=True)
    listener.start()
    log.info("admin listener", host=config.admin_host, port=sock.getsockname()[1])
    spans = open_spans(config.otlp_endpoint, "scaler", config.deployment, scaler.meters.spans_lost)
    scaler.trace(spans)
    scaler.run()
    server.stop()
    listener.join(5.0)
    if spans is not None:
        spans.close()


if __name__ == "__main__":
    leave(run_service("scaler", ScalerConfig, run))

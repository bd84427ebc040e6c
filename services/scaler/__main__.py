"""`python -m elasticmoe.services.scaler`: start the scaler and its admin listener."""

from __future__ import annotations

import sys
import threading

from elasticmoe.common import failpoint
from elasticmoe.common.config import ScalerConfig, load, make_run_dirs
from elasticmoe.common.http.listener import bind
from elasticmoe.common.inherited import inherited
from elasticmoe.common.private import read_secret
from elasticmoe.common.protocol.errors import EXIT_SUPERSEDED, ElasticMoEError, Fenced
from elasticmoe.common.telemetry import setup_logging
from elasticmoe.common.transport import describe
from elasticmoe.services.scaler.api.admin import build_app, serve
from elasticmoe.services.scaler.assembly import open_scaler


def main() -> int:
    """Run until SIGTERM; the exit status."""
    try:
        config = load(ScalerConfig)
        make_run_dirs(config)
        failpoint.enable(config.failpoint_dir, "scaler")
        log = setup_logging("scaler", level=config.log_level, as_json=config.log_json)
        token = read_secret(config.secret("admin.token"))
        scaler = open_scaler(config)
        app = build_app(
            scaler.status_cache, scaler.commands, scaler.events, scaler.meters, token, config.operation_deadline_s
        )
        sock = inherited("admin") or bind(config.admin_host, config.admin_port)
        local = inherited("admin.sock")  # the same for this user's own commands, in the run directory
        sockets = [sock, local] if local is not None else [sock]
        server = serve(app, scaler.meters, config.keep_alive_seconds)
        listener = threading.Thread(target=server.run, kwargs={"sockets": sockets}, name="admin", daemon=True)
        listener.start()
        log.info("admin listener", host=config.admin_host, port=sock.getsockname()[1])
        scaler.run()
        server.stop()
        listener.join(5.0)
    except ElasticMoEError as error:
        print(f"elasticmoe-scaler: {describe(error)}", file=sys.stderr)
        return EXIT_SUPERSEDED if error.code == Fenced.code else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

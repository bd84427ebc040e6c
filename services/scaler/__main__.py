"""`python -m services.scaler`: start the scaler and its admin listener."""

from __future__ import annotations

import sys
import threading

from common import failpoint
from common.config import ScalerConfig, load, make_run_dirs
from common.http.listener import bind
from common.protocol.errors import ConfigError, ElasticMoEError
from common.store import store_of
from common.telemetry import setup_logging
from common.transport import describe
from services.scaler.admin import build_app, serve
from services.scaler.service import Scaler


def main() -> int:
    """Run until SIGTERM; the exit status."""
    try:
        config = load(ScalerConfig)
        make_run_dirs(config)
        failpoint.enable(config.failpoint_dir, "scaler")
        log = setup_logging("scaler", level=config.log_level, as_json=config.log_json)
        try:
            token = config.secret("admin.token").read_text().strip()
        except OSError as error:
            raise ConfigError(f"admin token file cannot be read: {error.strerror}") from None
        scaler = Scaler(config, store_of(config, "scaler"))
        app = build_app(scaler.board, scaler.desk, scaler.feed, scaler.meters, token, config.operation_deadline_s)
        sock = bind(config.admin_host, config.admin_port)
        server = serve(app, scaler.meters, config.keep_alive_seconds)
        listener = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="admin", daemon=True)
        listener.start()
        log.info("admin listener", host=config.admin_host, port=sock.getsockname()[1])
        scaler.run()
        server.should_exit = True
        listener.join(5.0)
    except ElasticMoEError as error:
        print(f"elasticmoe-scaler: {describe(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What containers run besides the services: `python -m cli.container init`, `store` or `check NAME`.

`init` makes the run directory's parts and secrets in the volume that all containers share; what is there stays, so it
may run beside a living deployment. `store` becomes the embedded store's server. `check` is the containers' health
check: exit status 0 when the process called NAME answers.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

from cli.embedded_store import is_answering, store_spec
from cli.rundir import ensure_secret
from cli.terminal import complain
from common.config import Common, KeeperConfig, PoolConfig, RouterConfig, ScalerConfig, load, make_run_dirs
from common.private import make_private, read_secret
from common.protocol.errors import ElasticMoEError
from common.transport import describe

_NAMES = ("store", "keeper", "hmm", "worker", "scaler", "router")
_CHECK_SECONDS_MAX = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for. Exit status 0, or 1 with one line on stderr; `store` does not return."""
    parser = argparse.ArgumentParser(prog="python -m cli.container", description="Entry points of containers.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("init", help="make the run directory and its secrets")
    actions.add_parser("store", help="become the embedded store")
    actions.add_parser("check", help="whether a process answers").add_argument("name", choices=_NAMES)
    args = parser.parse_args(argv)
    try:
        if args.action == "init":
            init(load(KeeperConfig))
            return 0
        if args.action == "check":
            return 0 if is_healthy(args.name) else 1
        server = store_spec(load(KeeperConfig)).argv
        os.execv(server[0], server)
    except ElasticMoEError as error:
        complain(f"elasticmoe: {describe(error)}")
    except OSError as error:
        complain(f"elasticmoe: {args.action}: {error.strerror or error}")
    return 1


def init(config: Common) -> None:
    """Make what is missing of the run directory. Raises ConfigError when it is another user's, OSError."""
    make_run_dirs(config)
    make_private(config.run_path / "store")
    for name in ("admin.token", "store.password"):
        ensure_secret(config.secret(name))


def is_healthy(name: str) -> bool:
    """Whether this container's process answers: the router that it lives, the scaler that the deployment serves, the
    store that it takes the password, the others that they listen. Raises ConfigError."""
    if name == "router":
        return _gets_ok(load(RouterConfig).port, "/health")
    if name == "scaler":
        return _gets_ok(load(ScalerConfig).admin_port, "/ready")
    config = load(PoolConfig)
    path = config.socket(config.pool_name if name == "worker" else name)
    if name == "store":
        return is_answering(path, read_secret(config.secret("store.password")))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_CHECK_SECONDS_MAX)
        return connection.connect_ex(os.fspath(path)) == 0


def _gets_ok(port: int, path: str) -> bool:
    # In a container the listener is bound to all of its addresses, so also to this one.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}{path}", timeout=_CHECK_SECONDS_MAX) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError:
        return False


if __name__ == "__main__":
    sys.exit(main())

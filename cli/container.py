"""What containers run besides the services: `python -m elasticmoe.cli.container init FOLDER`, `store`, `fresh` or
`check NAME`.

`init FOLDER` makes the secrets and gives each container's volume those that it needs; what is there stays, so it may
run beside a living deployment. `store` becomes the embedded store's server. `fresh`, in the scaler's container while no
scaler runs, lets the next one begin anew instead of resuming what was committed last. `check` is the containers'
health check: exit status 0 when the process called NAME answers.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from elasticmoe.cli.embedded_store import is_answering, store_spec
from elasticmoe.cli.rundir import ADMIN_TOKEN, SECRETS, ensure_secret, write_secret
from elasticmoe.cli.terminal import Parser, complain
from elasticmoe.common.config import KeeperConfig, PoolConfig, RouterConfig, ScalerConfig, load, make_run_dirs
from elasticmoe.common.private import make_private, read_secret
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.store_access import PASSWORDS, READER, WRITER
from elasticmoe.common.transport import describe

_NAMES = ("store", "keeper", "hmm", "worker", "scaler", "router")
_CHECK_SECONDS_MAX = 3.0
# What each container may know. The router reads layouts from the store, and can do nothing else there.
SECRETS_OF = {
    "store": tuple(PASSWORDS.values()),
    "scaler": (ADMIN_TOKEN, PASSWORDS[WRITER]),
    "router": (PASSWORDS[READER],),
}
_KEEPS_ALL = "init"


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for. Exit status 0, or 1 with one line on stderr; `store` does not return."""
    parser = Parser(prog="python -m elasticmoe.cli.container", description="Entry points of containers.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    init_action = actions.add_parser("init", help="make the secrets, and share them out")
    init_action.add_argument("folder", type=Path, help="where the containers' secrets are mounted, by container")
    actions.add_parser("store", help="become the embedded store")
    actions.add_parser("fresh", help="let the next scaler drop the layout and the journal that earlier ones have left")
    actions.add_parser("check", help="whether a process answers").add_argument("name", choices=_NAMES)
    args = parser.parse_args(argv)
    try:
        if args.action == "init":
            init(args.folder)
            return 0
        if args.action == "fresh":
            config = load(ScalerConfig)
            make_run_dirs(config)
            config.fresh_mark.touch(mode=0o600)
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


def init(folder: Path) -> None:
    """Make the secrets that are missing in a folder of its own, and copy to each container's those that it is to have.
    Raises ConfigError when a folder is another user's, OSError."""
    for owner in (_KEEPS_ALL, *SECRETS_OF):
        make_private(folder / owner, "secrets")
    for name in SECRETS:
        ensure_secret(folder / _KEEPS_ALL / name)
    for owner, names in SECRETS_OF.items():
        for name in names:
            write_secret(folder / owner / name, read_secret(folder / _KEEPS_ALL / name))


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
        return is_answering(path, read_secret(config.secret(PASSWORDS[WRITER])))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_CHECK_SECONDS_MAX)
        return connection.connect_ex(os.fspath(path)) == 0


def _gets_ok(port: int, path: str) -> bool:
    # In a container the listener is bound to all of its addresses, so also to this one.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}{path}", timeout=_CHECK_SECONDS_MAX) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, http.client.HTTPException):
        return False


if __name__ == "__main__":
    sys.exit(main())

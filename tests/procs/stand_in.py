"""Stand-ins for the services, and `elasticmoe` with them in place of the real ones. Run as a module by test_launcher.

`stand_in elasticmoe SPECS ARG...`: the command line with the children that SPECS (JSON: name -> behaviour) describes,
after the real store if it is among them. `stand_in child BEHAVIOUR`: such a child; it says `up` when it can be used.

Behaviours: `idle`; `scaler` and `router` (answer /ready on the launcher's sockets); `never` (a scaler that loads for
ever); `failed` (one that gives up); `exit` (ends at once with a message); `loop`, `loop-scaler`, `loop-router` and
`superseded` (end once the deployment serves, the last as one that another has taken over from); `chatty` (logs for
ever, from when the deployment serves); `stubborn` (ignores SIGTERM, and so does its own child); `tidy` (takes a second
to end); `pool` (has a child that leaves when its pipe ends). `real`: no stand-in, but the service of that name.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from elasticmoe.common.inherited import inherited
from elasticmoe.common.protocol.errors import EXIT_SUPERSEDED

_GRACE_S = {"slow": 60.0}  # by name; others:
_GRACE_S_DEFAULT = 20.0
_STUBBORN_GRACE_S = 2.0  # of those that never end by themselves
_QUICK_S = {
    "backoff_first_s": 0.02,
    "backoff_max_s": 1.0,
    "superseded_s": 0.2,
}  # of restarts, where children end in loops
_REAL = "STAND_IN_REAL"  # in the environment: names of children that are no stand-ins


def elasticmoe(behaviours: dict[str, str], argv: list[str]) -> int:
    """The command line with stand-ins."""
    from elasticmoe.cli import up
    from elasticmoe.cli.children import ChildSpec
    from elasticmoe.cli.embedded_store import store_spec
    from elasticmoe.cli.listeners import ADMIN, ADMIN_LOCAL, ROUTER
    from elasticmoe.cli.main import main
    from elasticmoe.cli.processes import process_specs as real_specs
    from elasticmoe.cli.settings import Settings
    from elasticmoe.cli.supervisor import Limits

    def process_specs(settings: Settings, *, is_resuming: bool) -> list[ChildSpec]:
        return [
            store_spec(settings.scaler)
            if behaviour == "store"
            else next(spec for spec in real_specs(settings, is_resuming=is_resuming) if spec.name == name)
            if behaviour == "real"
            else ChildSpec(
                name,
                (sys.executable, "-m", "tests.procs.stand_in", "child", behaviour),
                _GRACE_S.get(name, _STUBBORN_GRACE_S if behaviour == "stubborn" else _GRACE_S_DEFAULT),
                sockets={"scaler": (ADMIN, ADMIN_LOCAL), "router": (ROUTER,)}.get(name, ()),
                is_vital=name == "router",
                after=("store",) if "store" in behaviours else (),
            )
            for name, behaviour in behaviours.items()
        ]

    up.process_specs = process_specs
    if any(behaviour.startswith("loop") for behaviour in behaviours.values()):
        up.Plan = partial(up.Plan, limits=Limits(**_QUICK_S))
    os.environ[_REAL] = " ".join(name for name, behaviour in behaviours.items() if behaviour == "real")
    return main(argv)


class Ready(BaseHTTPRequestHandler):
    """Answers /ready as a scaler or a router does."""

    behaviour = ""

    def do_GET(self) -> None:
        """Progress first, so that the launcher has something to show."""
        body: dict[str, Any] = {"phase": "serving" if others_are_up() else "attaching"}
        seen = Path(os.environ["ELASTICMOE_RUN_DIR"]) / "state" / "fence-layout"
        if seen.exists() and not seen.with_name("fresh").exists():
            wanted = int(os.environ.get("ELASTICMOE_REPLICAS", "2"))
            body["resumed"] = {"epoch": int(seen.read_text()), "replicas": 2, "wanted": wanted}
        if self.behaviour == "never":
            body = {"phase": "loading", "bytes_done": 512, "bytes_total": 1024}
        elif self.behaviour == "failed":
            error = {"code": "bad_checkpoint", "message": "tensor x is missing", "retryable": False}
            body = {"phase": "failed", "reason": "the HMM could not load the model", "error": error}
        self.send_response(200 if body["phase"] == "serving" else 503)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def others_are_up() -> bool:
    """Whether all stand-ins that were started so far handle signals by now, as services do when they are ready."""
    logs = (Path(os.environ["ELASTICMOE_RUN_DIR"]) / "logs").glob("*.log")
    real = ("store", *os.environ[_REAL].split())
    return all(log.stem in real or " is up" in log.read_text() for log in logs)


def child(behaviour: str) -> int:
    """One stand-in; see the module's text."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "stubborn" else lambda *_: os._exit(0))
    if behaviour == "tidy":
        signal.signal(signal.SIGTERM, tidy_up)
    if behaviour == "exit":
        print("elasticmoe-x: bad_thing: no luck today", file=sys.stderr)
        return 3
    print(f"{behaviour} is up", file=sys.stderr, flush=True)
    if behaviour.removeprefix("loop-") in ("scaler", "router", "never", "failed", "superseded"):
        threading.Thread(target=serve, args=(behaviour.removeprefix("loop-"),), daemon=True).start()
    if behaviour.startswith("loop"):
        return loop(7)
    if behaviour == "superseded":
        return loop(EXIT_SUPERSEDED)
    if behaviour == "chatty":
        chat()
    if behaviour == "stubborn":
        subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(15, 1); signal.pause()"])
    elif behaviour == "pool":
        reader, _ = os.pipe()  # our end of it closes with us
        subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=reader)
        os.close(reader)
    while True:
        signal.pause()


def chat() -> None:
    """Log for ever, 400 kB a second. Not sooner than the deployment serves: `others_are_up` looks for a line of ours,
    which would soon be gone."""
    await_serving()
    for number in itertools.count():
        sys.stderr.write("".join(f"line {number}.{part} {'x' * 180}\n" for part in range(10)))
        select.select([], [], [], 0.005)


def serve(behaviour: str) -> None:
    """Answer /ready on the socket that the launcher has handed down."""
    Ready.behaviour = behaviour
    server = HTTPServer(("127.0.0.1", 0), Ready, bind_and_activate=False)
    sock = inherited("router" if behaviour == "router" else "admin")
    assert sock is not None
    server.socket.close()
    server.socket = sock
    server.serve_forever()


def tidy_up(*_: object) -> None:
    """End after a second, as a router that drains."""
    select.select([], [], [], 1.0)
    os._exit(0)


def loop(code: int) -> int:
    """Live until the deployment serves, then end with `code`."""
    await_serving()
    print("gave in", file=sys.stderr)
    return code


def await_serving() -> None:
    """Until the deployment has started."""
    from elasticmoe.common.record import read_record

    run_dir = Path(os.environ["ELASTICMOE_RUN_DIR"])
    while (record := read_record(run_dir)) is None or record.state == "starting":
        select.select([], [], [], 0.01)


if __name__ == "__main__":
    if sys.argv[1] == "child":
        sys.exit(child(sys.argv[2]))
    sys.exit(elasticmoe(json.loads(sys.argv[2]), sys.argv[3:]))

"""A client of a deployment's admin listener, and what the commands that scale share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from elasticmoe.cli.arguments import WrongUsage, whole
from elasticmoe.cli.http import local_client, why
from elasticmoe.cli.sse import ServerEvent, events_of
from elasticmoe.common.private import is_private, read_secret
from elasticmoe.common.protocol.errors import ElasticMoEError, Unavailable
from elasticmoe.common.protocol.limits import RANKS_MAX
from elasticmoe.common.record import living_record

_TIMEOUT_S = 20.0
_SILENCE_S_MAX = 60.0  # the event stream has heartbeats


class Refusal(ElasticMoEError):
    """What the listener refused, by its own code and text. `retry_after_s`: when to ask again; 0 where it is no use."""

    def __init__(self, message: str, *, code: str, retry_after_s: float) -> None:
        super().__init__(message, code=code, retryable=retry_after_s > 0)
        self.retry_after_s = retry_after_s


class Admin:
    """Blocking calls, each bounded by a timeout. Raises ElasticMoEError with the listener's code.

    Owns `client`; `name`: how messages call the listener.
    """

    def __init__(self, client: httpx.Client, token: str, name: str) -> None:
        self._client = client
        self._client.headers["Authorization"] = f"Bearer {token}"
        self._name = name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._client.close()

    def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = _TIMEOUT_S
    ) -> dict[str, Any]:
        """One request; its JSON object."""
        try:
            answer = self._client.request(method, path, json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if answer.status_code >= 400:
            raise _refusal(answer)
        try:
            value = answer.json()
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ElasticMoEError(f"{self._name} answered {answer.status_code} without JSON", code="bad_answer")
        return value

    def events(self, path: str, headers: dict[str, str] | None = None) -> Iterator[ServerEvent]:
        """The events of a stream that goes on until the listener ends it."""
        timeout = httpx.Timeout(_TIMEOUT_S, read=_SILENCE_S_MAX)
        try:
            with self._client.stream("GET", path, headers=headers, timeout=timeout) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise _refusal(answer)
                yield from events_of(answer.iter_bytes())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: httpx.HTTPError) -> Unavailable:
        text = f"the admin listener at {self._name} does not answer: {why(error)}"
        return Unavailable(text, code="unreachable")


def _refusal(answer: httpx.Response) -> Refusal:
    try:
        value = answer.json()
    except (ValueError, RecursionError):
        value = None
    detail = value.get("error") if isinstance(value, dict) else None
    detail = detail if isinstance(detail, dict) else {}
    return Refusal(
        str(detail.get("message", f"answered {answer.status_code}")),
        code=str(detail.get("code", f"http_{answer.status_code}")),
        retry_after_s=_seconds(answer.headers.get("retry-after", "")),
    )


def _seconds(text: str) -> float:
    """Of a Retry-After in seconds, which is what the listener sends; 0 without one."""
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0


def admin_of(run_dir: Path) -> Admin:
    """The admin listener of the deployment in `run_dir`. Raises ElasticMoEError when none runs there."""
    record = living_record(run_dir)
    if record is None:
        raise not_running(run_dir)
    return connect(run_dir)


def not_running(run_dir: Path) -> Unavailable:
    """Nothing runs there."""
    text = f"no deployment runs in {run_dir}; start one with `elasticmoe up`, or name its --run-dir"
    return Unavailable(text, code="not_running")


def connect(run_dir: Path) -> Admin:
    """The admin listener of the run directory, on its Unix socket there: a token goes only to who has proved to be this
    user, never to a port, which anybody may have taken. Raises ElasticMoEError."""
    for part in ("sockets", "secrets"):
        if not is_private(run_dir / part):
            raise Unavailable(f"{run_dir} has no {part}", code="unreachable")
    path = run_dir / "sockets" / "admin.sock"
    return Admin(local_client(path), read_secret(run_dir / "secrets" / "admin.token"), str(path))


def add_target(parser: argparse.ArgumentParser, *, can_cancel: bool = False) -> None:
    """The flags that name a target, of which one is needed, and the run directory."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--replicas", type=whole(1, RANKS_MAX), metavar="N", help="how many replicas to have")
    what.add_argument(
        "--devices", nargs="+", metavar="DEVICE", help="exactly the devices to use, such as host:0 host:2"
    )
    what.add_argument("--remove", nargs="+", metavar="REPLICA", help="replicas that leave, such as r1")
    if can_cancel:
        what.add_argument("--cancel", metavar="OP", help="cancel the operation OP, which is not committed yet")
    parser.add_argument(
        "--lost", action="store_const", const=True, help="with --remove: their devices have lost their memory"
    )
    parser.add_argument("--run-dir", metavar="DIR", help="the deployment's run directory")


def check_target(args: argparse.Namespace) -> None:
    """Raises WrongUsage for a flag that says something of another one, which is not there."""
    if args.lost and args.remove is None:
        raise WrongUsage("--lost: it says something of the replicas of --remove, which is missing")


def body_of(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The body of POST /v1/scale for these flags; values that are None are left out."""
    body = {name: getattr(args, name) for name in ("replicas", "devices", "remove", "lost")} | more
    return {name: _split(value) for name, value in body.items() if value is not None}


def _split(value: Any) -> Any:
    """`--devices host:0,host:2` is as good as `--devices host:0 host:2`."""
    if not isinstance(value, list):
        return value
    return [part for item in value for part in str(item).split(",") if part]

"""`elasticmoe scale`: let a running deployment grow or shrink while it serves."""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from typing import Any
from urllib.parse import quote

from elasticmoe.cli.admin import Admin, Refusal, add_target, admin_of, body_of, check_target
from elasticmoe.cli.arguments import refuse_beside
from elasticmoe.cli.console import Console, make_console, size
from elasticmoe.cli.paths import run_dir_of
from elasticmoe.cli.settings import DEFAULTS, parse_seconds
from elasticmoe.cli.terminal import complain, say, say_json
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.wording import counted

HELP = "grow or shrink a running deployment while it serves"

_POLL_S = 0.1
_STILL_S = 2.0  # an operation that has waited for the same thing for so long says what that is
_UNREACHABLE_S_MAX = 60.0  # a scaler that restarts resumes the operation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `scale`."""
    add_target(parser, can_cancel=True)
    add_waiting(parser)
    parser.add_argument("--reason", metavar="TEXT", help="kept with the operation")


def add_waiting(parser: argparse.ArgumentParser) -> None:
    """The flags that `scale` and `rebalance` share."""
    parser.add_argument("--wait", action="store_true", help="show the operation until it has ended")
    parser.add_argument("--op-id", metavar="ID", help="name of the operation; the same one again starts no second")
    parser.add_argument(
        "--deadline",
        type=parse_seconds,
        metavar="S",
        help=f"undo it when it is not committed by then ({DEFAULTS['operation_deadline_s']:g})",
    )
    parser.add_argument("--json", action="store_true", help="the operation as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when it was accepted (`--wait`: when it is done), 1 when it was aborted. Raises ElasticMoEError,
    WrongUsage."""
    check_target(args)
    if args.cancel is not None:
        for flag in ("op_id", "deadline", "reason"):
            refuse_beside(args, flag, "--cancel")
    with admin_of(run_dir_of(args.run_dir)) as admin:
        if args.cancel is not None:
            operation = admin.call("DELETE", f"/v1/operations/{quote(args.cancel, safe='')}")
            return follow(admin, operation, args) if args.wait else announce(operation, args.json, "is cancelled")
        # With a name of our own a repetition after a lost answer starts no second operation.
        op_id = args.op_id or f"op-{uuid.uuid4().hex[:12]}"
        body = body_of(args, op_id=op_id, deadline_s=args.deadline, reason=args.reason)
        operation = admin.call("POST", "/v1/scale", body)
        if operation["kind"] == "none":
            return _nothing_to_do(operation, args.json)
        return follow(admin, operation, args) if args.wait else announce(operation, args.json, "is accepted")


def _nothing_to_do(operation: dict[str, Any], as_json: bool) -> int:
    """The deployment is already what is asked for. Returns 0."""
    if as_json:
        say_json(operation)
    else:
        planned = operation.get("planned") or {}
        where = ", ".join(planned.get("devices") or {})
        is_one = planned.get("replicas_after") == 1
        replicas = "1 replica serves" if is_one else f"{planned.get('replicas_after')} replicas serve"
        say(f"nothing to do: {replicas} already, on {where}")
    return 0


def announce(operation: dict[str, Any], as_json: bool, what: str) -> int:
    """Tell what became of an order that nobody waits for. Returns 0."""
    if as_json:
        say_json(operation)
    else:
        say(f"operation {operation['op_id']} {what}; `elasticmoe status --watch` shows it")
    return 0


def follow(admin: Admin, operation: dict[str, Any], args: argparse.Namespace) -> int:
    """Show an operation until it has ended. Returns 0 when it is done, 1 when it was aborted.

    Ctrl-C leaves the operation running, and says so.
    """
    try:
        with make_console(sys.stderr if args.json else None) as console:
            operation = _watch(admin, operation, console)
    except KeyboardInterrupt:
        complain(
            f"operation {operation['op_id']} goes on; `elasticmoe status` shows it, "
            f"`elasticmoe scale --cancel {operation['op_id']}` cancels it before its commit"
        )
        raise
    if args.json:
        say_json(operation)
    elif operation["outcome"] == "done":
        say(summary(operation))
    if operation["outcome"] == "done":
        return 0
    error = operation.get("error") or {}
    raise ElasticMoEError(
        f"operation {operation['op_id']} was undone: {error.get('message', operation['outcome'])}",
        code=str(error.get("code", "aborted")),
    )


def _watch(admin: Admin, operation: dict[str, Any], console: Console) -> dict[str, Any]:
    path = f"/v1/operations/{quote(operation['op_id'], safe='')}"
    lost_at: float | None = None
    waits_for, since = ("", ""), time.monotonic()
    while not operation.get("outcome"):
        progress = (operation.get("progress") or {}) if operation["phase"] == "prepare" else {}
        if waits_for != (operation["phase"], operation["reason"]):
            waits_for, since = (operation["phase"], operation["reason"]), time.monotonic()
        is_still = time.monotonic() - since >= _STILL_S
        text = phase_text(operation) + (f": {operation['reason']}" if is_still else "")
        console.progress(text, int(progress.get("bytes_done", 0)), int(progress.get("bytes_total", 0)))
        time.sleep(_POLL_S)
        try:
            operation, lost_at = admin.call("GET", path), None
        except ElasticMoEError as error:
            lost_at = lost_at or time.monotonic()
            if not error.retryable or time.monotonic() - lost_at > _UNREACHABLE_S_MAX:
                raise
            time.sleep(error.retry_after_s if isinstance(error, Refusal) else 0.0)
    return operation


def phase_text(operation: dict[str, Any]) -> str:
    """The phase that an operation is in, for a progress bar."""
    legs = operation.get("legs", 0)
    step = f" ({operation['leg']} of {legs})" if legs > 1 else ""
    moved = (operation.get("figures") or {}).get("sequences_moved", 0)
    sequences = f", {counted(moved, 'sequence')} moved" if moved else ""
    return f"{operation['phase']}{step}{sequences}"


def summary(operation: dict[str, Any]) -> str:
    """The figures of an operation that is done, as lines."""
    figures, planned = operation.get("figures") or {}, operation.get("planned") or {}
    lines = [f"operation {operation['op_id']} ({operation['kind']}) is done after {operation['elapsed_s']:.2f} s"]
    if figures.get("capacity_s") is not None:
        lines.append(f"capacity    joined after {figures['capacity_s']:.2f} s")
    if figures.get("flip_s_max") is not None:
        lines.append(f"flip        within {figures['flip_s_max'] * 1e3:.0f} ms")
    if planned:
        lines.append(
            f"copied      {size(figures.get('bytes_copied', 0))} (planned {size(figures.get('bytes_planned', 0))})"
        )
        lines.append(
            f"peak        {size(figures.get('peak_bytes_total', 0))} "
            f"(planned {size(figures.get('peak_bytes_planned', 0))})"
        )
        lines.append(f"KV blocks   {figures.get('kv_blocks_before')} → {figures.get('kv_blocks_after')}")
    lines.append(f"sequences   {figures.get('sequences_moved', 0)} moved")
    phases: dict[str, float] = {}
    for timing in operation.get("timings", ()):
        phases[timing["phase"]] = phases.get(timing["phase"], 0.0) + timing["seconds"]
    lines.append("phases      " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in phases.items()))
    return "\n".join(lines)

"""`elasticmoe plan`: what scaling would do and cost, without doing it."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elasticmoe.cli.admin import add_target, admin_of, body_of, check_target
from elasticmoe.cli.console import size
from elasticmoe.cli.paths import run_dir_of
from elasticmoe.cli.terminal import say_json, show
from elasticmoe.common.wording import counted

HELP = "show what scaling would move, and what it would cost"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `plan`."""
    add_target(parser)
    parser.add_argument("--json", action="store_true", help="the whole plan as JSON, with every copy")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when there is a plan. Raises ElasticMoEError for one that is refused, WrongUsage."""
    check_target(args)
    with admin_of(run_dir_of(args.run_dir)) as admin:
        plan = admin.call("POST", "/v1/scale", body_of(args, dry_run=True))
    if args.json:
        say_json(plan)
    else:
        show(render(plan))
    return 0


def render(plan: dict[str, Any]) -> RenderableType:
    """The plan as a table of devices and a few lines of figures."""
    planned = plan.get("planned") or {}
    if not plan.get("legs"):
        return Text("nothing to do: the deployment is what is asked for")
    table = Table(title=headline(plan.get("kind", ""), planned), title_justify="left", header_style="bold")
    for index, column in enumerate(("device", "change", "experts", "arriving", "bytes", "KV handles", "peak")):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    changes = _changes(plan)
    for name, device in planned.get("devices", {}).items():
        experts = f"{device['experts_before']} → {device['experts_after']}"
        table.add_row(
            name,
            changes.get(name, ""),
            experts,
            str(device["experts_in"]),
            size(device["bytes_in"]),
            str(device["kv_handles_after"]),
            size(device["peak_bytes"]),
        )
    lines = Text(
        f"copied      {counted(planned['experts_moved'], 'expert')}, {size(planned['bytes_copied'])}\n"
        f"time        {planned['seconds']:.2f} s in {counted(len(plan['legs']), 'step')}\n"
        f"pause       {planned['pause_ms']:.0f} ms at most in a stream\n"
        f"memory      {size(planned['bytes_before'])} now, {size(planned['peak_bytes'])} at its peak, "
        f"{size(planned['bytes_after'])} afterwards"
    )
    return Group(table, lines)


def headline(kind: str, planned: dict[str, Any]) -> str:
    """One line: from how many replicas to how many, who comes and who goes."""
    after = planned.get("replicas_after")
    size = counted(after, "replica") if isinstance(after, int) else f"{after} replicas"
    text = f"{kind.replace('_', ' ')}: {planned.get('replicas_before')} → {size}"
    for name, verb in (("joining", "joins"), ("leaving", "leaves")):
        if planned.get(name):
            text += f"; {', '.join(planned[name])} {verb if len(planned[name]) == 1 else verb[:-1]}"
    return text


def _changes(plan: dict[str, Any]) -> dict[str, str]:
    changes: dict[str, str] = {}
    for leg in plan["legs"]:
        changes |= {seat["device"]: "joins" for seat in leg["joining"]}
        changes |= {seat["device"]: "leaves" for seat in leg["leaving"]}
    return changes

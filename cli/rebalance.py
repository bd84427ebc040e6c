"""`elasticmoe rebalance`: let sequences move between replicas until all have the same load."""

from __future__ import annotations

import argparse
import uuid

from elasticmoe.cli.admin import admin_of
from elasticmoe.cli.paths import run_dir_of
from elasticmoe.cli.scale import add_waiting, announce, follow

HELP = "level running requests over the replicas"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `rebalance`."""
    parser.add_argument("--run-dir", metavar="DIR", help="the deployment's run directory")
    add_waiting(parser)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when it was accepted (`--wait`: when it is done). Raises ElasticMoEError."""
    body = {"op_id": args.op_id or f"op-{uuid.uuid4().hex[:12]}", "deadline_s": args.deadline}
    with admin_of(run_dir_of(args.run_dir)) as admin:
        operation = admin.call(
            "POST", "/v1/rebalance", {key: value for key, value in body.items() if value is not None}
        )
        return follow(admin, operation, args) if args.wait else announce(operation, args.json, "is accepted")

"""`elasticmoe events`: what the scaler has decided and done, and then what it does, as it happens."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from typing import Any

from elasticmoe.cli.admin import admin_of
from elasticmoe.cli.paths import run_dir_of
from elasticmoe.cli.sentences import sentence
from elasticmoe.cli.sse import ServerEvent
from elasticmoe.cli.terminal import clean, say, say_json

HELP = "show what the scaler has done, and follow what it does until Ctrl-C"

_FROM_THE_FIRST = "0"  # the id of no event: all that the scaler still has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `events`."""
    parser.add_argument("--run-dir", metavar="DIR", help="the deployment's run directory")
    parser.add_argument("--json", action="store_true", help="one JSON object per line, for programs")
    parser.add_argument("--no-follow", action="store_true", help="end after what has happened so far")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the stream ended or Ctrl-C came. Raises ElasticMoEError."""
    with admin_of(run_dir_of(args.run_dir)) as admin:
        try:
            for event in parse(admin.events("/v1/events", {"Last-Event-ID": _FROM_THE_FIRST})):
                if event is None and args.no_follow:
                    return 0
                if event is None:
                    continue
                if args.json:
                    say_json(event, indent=None)
                else:
                    say(clean(sentence(event)))
        except KeyboardInterrupt:
            return 0
    return 0


def parse(stream: Iterable[ServerEvent]) -> Iterator[dict[str, Any] | None]:
    """What a stream tells, None where there is nothing for now; what is broken is passed over."""
    for told in stream:
        if told.comment == b"heartbeat":
            yield None
        if told.comment is not None:
            continue
        try:
            event = json.loads(told.data)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event

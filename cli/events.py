"""`elasticmoe events`: what the scaler decides and does, as it happens."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from cli.admin import admin_of
from cli.paths import run_dir_of
from cli.terminal import clean, say, say_json

HELP = "follow the scaler's decisions and phases until Ctrl-C"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `events`."""
    parser.add_argument("--run-dir", metavar="DIR", help="the deployment's run directory")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the stream ended or Ctrl-C came. Raises ElasticMoEError."""
    with admin_of(run_dir_of(args.run_dir)) as admin:
        try:
            for event in parse(admin.lines("/v1/events")):
                if args.json:
                    say_json(event, indent=None)
                else:
                    say(clean(line(event)))
        except KeyboardInterrupt:
            return 0
    return 0


def parse(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The events of a server-sent stream; comments and broken lines are passed over."""
    for text in lines:
        if text.startswith("data: "):
            try:
                event = json.loads(text[6:])
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event


def line(event: dict[str, Any]) -> str:
    """One event as a line."""
    stamp = time.strftime("%H:%M:%S", time.localtime(event.get("time_unix", 0)))
    facts = " ".join(f"{key}={value}" for key, value in (event.get("facts") or {}).items())
    return f"{stamp} epoch {event.get('epoch')} {event.get('kind')}: {event.get('reason')} {facts}".rstrip()

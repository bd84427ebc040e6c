"""`elasticmoe version`."""

from __future__ import annotations

import argparse

from elasticmoe.cli.terminal import say
from elasticmoe.common.version import version as version

HELP = "print the version"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags."""


def run(_: argparse.Namespace) -> int:
    """Print it."""
    say(f"elasticmoe {version()}")
    return 0

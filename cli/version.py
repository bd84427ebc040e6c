"""`elasticmoe version`."""

from __future__ import annotations

import argparse
from importlib import metadata

from cli.terminal import say

HELP = "print the version"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags."""


def version() -> str:
    """The installed package's version, or `unknown` in a checkout that is not installed."""
    try:
        return metadata.version("elasticmoe")
    except metadata.PackageNotFoundError:
        return "unknown"


def run(_: argparse.Namespace) -> int:
    """Print it."""
    say(f"elasticmoe {version()}")
    return 0

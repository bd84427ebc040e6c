"""Which version of the software this is."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """The installed package's version, or `unknown` in a checkout that is not installed."""
    try:
        return metadata.version("elasticmoe")
    except metadata.PackageNotFoundError:
        return "unknown"

"""Where things of a user are kept: models and chat history in a home, run directories in a runtime folder."""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "ELASTICMOE_HOME"


def home_dir() -> Path:
    """`$ELASTICMOE_HOME`, else `${XDG_CACHE_HOME:-~/.cache}/elasticmoe`: what may be made again but takes long."""
    own = os.environ.get(HOME_VARIABLE)
    if own:
        return Path(own).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "elasticmoe"


def default_run_dir() -> Path:
    """`$ELASTICMOE_RUN_DIR`, else `${XDG_RUNTIME_DIR:-/tmp}/elasticmoe-<uid>/default`."""
    own = os.environ.get("ELASTICMOE_RUN_DIR")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_RUNTIME_DIR")
    # A session without a login manager may name a folder that does not exist.
    root = Path(base) if base and os.path.isdir(base) else Path("/tmp")
    return root / f"elasticmoe-{os.geteuid()}" / "default"


def run_dir_of(flag: str | None) -> Path:
    """The run directory that a command's `--run-dir` names, absolute."""
    return Path(flag).expanduser().absolute() if flag else default_run_dir()


def package_root() -> Path:
    """The folder that holds the packages `cli`, `common` and `services`: a checkout or site-packages."""
    return Path(__file__).resolve().parent.parent

"""Where things of a user are kept: models and chat history in a home, run directories in a runtime folder."""

from __future__ import annotations

import os
from pathlib import Path

from elasticmoe.cli.terminal import is_text
from elasticmoe.common.protocol.errors import ConfigError

HOME_VARIABLE = "ELASTICMOE_HOME"


def home_dir() -> Path:
    """`$ELASTICMOE_HOME`, else `${XDG_CACHE_HOME:-~/.cache}/elasticmoe`: what may be made again but takes long.

    Raises ConfigError where this user has no home."""
    own = os.environ.get(HOME_VARIABLE)
    if own:
        return absolute(own, HOME_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME")
    return absolute(cache or "~/.cache", "XDG_CACHE_HOME") / "elasticmoe"


def default_run_dir() -> Path:
    """`$ELASTICMOE_RUN_DIR`, else `${XDG_RUNTIME_DIR:-/tmp}/elasticmoe-<uid>/default`. Raises ConfigError."""
    own = os.environ.get("ELASTICMOE_RUN_DIR")
    if own:
        return absolute(own, "ELASTICMOE_RUN_DIR")
    base = os.environ.get("XDG_RUNTIME_DIR")
    # A session without a login manager may name a folder that does not exist.
    root = absolute(base, "XDG_RUNTIME_DIR") if base and os.path.isdir(base) else Path("/tmp")
    return root / parent_name() / "default"


def parent_name() -> str:
    """The folder of this user's run directories in a shared one."""
    return f"elasticmoe-{os.geteuid()}"


def run_dir_of(flag: str | None) -> Path:
    """The run directory that a command's `--run-dir` names, absolute. Raises ConfigError."""
    return absolute(flag, "--run-dir") if flag else default_run_dir()


def absolute(text: str, origin: str) -> Path:
    """`text` as an absolute path, `~` replaced. Raises ConfigError, naming `origin`, where that cannot be done: no
    home, a working directory that was removed, a path that is not text and so fits in no message."""
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError:
        raise ConfigError(f"{origin}: {text!r} needs a home directory, and this user has none; set HOME") from None
    except FileNotFoundError:
        raise ConfigError(f"{origin}: {text!r} is relative, and the working directory does not exist") from None
    if not is_text(str(path)):
        raise ConfigError(f"{origin}: the path {str(path)!r} is not text in UTF-8")
    return path


def package_root() -> Path:
    """The folder that holds the packages `cli`, `common` and `services`: a checkout or site-packages."""
    return Path(__file__).resolve().parent.parent

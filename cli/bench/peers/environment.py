"""A virtual environment with one engine: where its programs are, and how one of them is run to its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from elasticmoe.cli.children import tied_to_us
from elasticmoe.cli.terminal import clean

INSTALL_S_MAX = 3_600.0  # a compiler may have to make it
_LINE_CHARS_MAX = 300


class Environment:
    """The environment in `folder`. Use it inside `installation.made` only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Where its packages lie."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    def run(self, *argv: str | Path, variables: Mapping[str, str] | None = None) -> None:
        """Run a command to its end, its output in `install.log`. Raises ValueError with the last line of it when it
        fails or takes over INSTALL_S_MAX seconds."""
        words = [str(word) for word in argv]
        log = self.folder / "install.log"
        with open(log, "ab") as file:
            file.write(f"$ {' '.join(words)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                tied_to_us(words),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=own_variables(self) | dict(variables or {}),
                start_new_session=True,
            )
        try:
            status = process.wait(INSTALL_S_MAX)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # compilers that it has started, too; it is not reaped yet
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise ValueError(f"{words[0]}: took over {INSTALL_S_MAX:g} s; see {log}") from None
            raise
        if status:
            raise ValueError(f"{words[0]}: {last_line(log)} (exit status {status}; see {log})")


def own_variables(environment: Environment) -> dict[str, str]:
    """Variables for a program of `environment`: the caller's, but for those that would lead it to other packages."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | {"PATH": f"{environment.folder / 'bin'}:{kept.get('PATH', os.defpath)}"}


def last_line(log: Path) -> str:
    """The last line of a program's output, fit for a terminal."""
    lines = log.read_text(errors="replace").strip().split("\n")
    return clean(lines[-1].strip()[:_LINE_CHARS_MAX]) or "it printed nothing"

"""The run directory of one deployment: claimed by one launcher at a time, made private, removed at the end."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from pathlib import Path

from cli.record import FILE_NAME
from common.config import Common, make_run_dirs
from common.protocol.errors import ConfigError, Conflict

_LOCK = "launcher.lock"  # also the mark of a directory that we made and may clear
_PARTS = ("sockets", "secrets", "state", "store")
_SECRET_BYTES = 32
FAILURE_FILE = "failure.txt"


class RunDir:
    """The exclusive right to a run directory, until `release` or the process's end."""

    def __init__(self, path: Path) -> None:
        """Create and claim `path`.

        Raises Conflict when a living launcher has it, ConfigError when it cannot be made, is another user's, or holds
        files that are not ours.
        """
        self.path = path
        self._fd = -1
        _make_private(path.parent, own=path.parent.name == _parent_name())
        _make_private(path, own=True)
        self._claim()

    def _claim(self) -> None:
        lock = self.path / _LOCK
        if not lock.exists() and any(self.path.iterdir()):
            raise ConfigError(f"run directory {self.path} holds files that are not elasticmoe's; choose an empty one")
        while True:
            fd = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                raise Conflict(
                    f"run directory {self.path} is used by a running deployment; stop it with `elasticmoe down` or "
                    f"choose another with --run-dir",
                    code="already_running",
                ) from None
            # Whoever held it before may have removed the file between our open and our lock: then ours is nobody's.
            try:
                current = os.stat(lock)
            except FileNotFoundError:
                current = None
            if current is not None and current.st_ino == os.fstat(fd).st_ino:
                self._fd = fd
                return
            os.close(fd)

    def prepare(self, config: Common) -> None:
        """Make the parts of the directory and the secrets that are missing; sockets that a killed run left are removed.

        Raises ConfigError.
        """
        shutil.rmtree(self.path / "sockets", ignore_errors=True)
        make_run_dirs(config)
        (self.path / "store").mkdir(mode=0o700, exist_ok=True)
        for name in ("admin.token", "store.password"):
            ensure_secret(config.secret(name))

    def forget_state(self) -> None:
        """Drop what an interrupted deployment left: its journal, fences and sockets. Its logs stay."""
        for name in ("sockets", "state", "store"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / FILE_NAME).unlink(missing_ok=True)

    def clear_logs(self) -> None:
        """Drop the logs of an earlier run; the folder stays."""
        for path in (self.path / "logs").glob("*"):
            if path.is_file():
                path.unlink(missing_ok=True)

    def note_failure(self, text: str) -> None:
        """Leave the reason of a failed run beside its logs, for `status`. Best effort: the disk may be full."""
        try:
            (self.path / "logs" / FAILURE_FILE).write_text(text + "\n")
        except OSError:
            pass  # it is also printed

    def remove(self, *, keep_logs: bool) -> None:
        """Remove what a deployment made, and the directory itself when nothing else is in it. Gives the claim back.

        With `keep_logs` the logs stay, and the mark that makes the directory usable again.
        """
        for name in _PARTS if keep_logs else (*_PARTS, "logs"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / FILE_NAME).unlink(missing_ok=True)
        if not keep_logs:
            (self.path / _LOCK).unlink(missing_ok=True)
            self._remove_folders()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def release(self) -> None:
        """Give the claim back; a directory in which nothing was made yet is removed. Idempotent."""
        if self._fd < 0:
            return
        if [entry.name for entry in self.path.iterdir()] == [_LOCK]:
            (self.path / _LOCK).unlink()
            self._remove_folders()
        os.close(self._fd)
        self._fd = -1

    def _remove_folders(self) -> None:
        """Remove the directory and our own parent of it, as far as they are empty."""
        try:
            self.path.rmdir()
            if self.path.parent.name == _parent_name():
                self.path.parent.rmdir()
        except OSError:
            pass  # something else is in it


def _parent_name() -> str:
    """The folder of this user's run directories in a shared one."""
    return f"elasticmoe-{os.geteuid()}"


def _make_private(path: Path, *, own: bool) -> None:
    """Create a directory; `own`: mode 0700, of this user, and not a link somebody laid in a shared folder."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat() if own else path.stat()
    except OSError as error:
        raise ConfigError(f"run directory {path}: {error.strerror}") from None
    if not own:
        return
    if path.is_symlink() and status.st_uid != os.geteuid():
        raise ConfigError(f"run directory {path} is another user's link")
    if path.stat().st_uid != os.geteuid():
        raise ConfigError(f"run directory {path} belongs to uid {path.stat().st_uid}, not to {os.geteuid()}")
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)


def ensure_secret(path: Path) -> None:
    """Write a random secret (64 hexadecimal digits, mode 0600) to `path` unless a file with one is there."""
    if path.is_file() and path.stat().st_size > 0:
        path.chmod(0o600)
        return
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(_SECRET_BYTES))
    os.replace(temporary, path)

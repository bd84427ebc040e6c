"""The run directory of one deployment: claimed by one launcher at a time, made private, removed at the end, or kept for
the next one."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from pathlib import Path

from elasticmoe.cli.paths import parent_name
from elasticmoe.cli.settings import TEMPORARY
from elasticmoe.common.config import Common, make_run_dirs
from elasticmoe.common.private import is_private, make_private, read_private
from elasticmoe.common.protocol.errors import ConfigError, Conflict
from elasticmoe.common.record import FILE_NAME
from elasticmoe.common.store_access import PASSWORDS

ADMIN_TOKEN = "admin.token"
_LOCK = "launcher.lock"  # also the mark of a directory that we made and may clear
_VOLATILE = ("sockets", TEMPORARY)  # of use to nobody but the processes that made what is in them
_PARTS = (*_VOLATILE, "secrets", "state", "store")
SECRETS = (ADMIN_TOKEN, *PASSWORDS.values())
_SECRET_BYTES = 32
_SECRET_BYTES_MAX = 4096
_KEEP = "keep-state"  # an empty file of `down`: the launcher is to leave the state where it is
_FAILURE_FILE = "failure.txt"
_FAILURE_BYTES_MAX = 64 * 1024


class RunDir:
    """The exclusive right to a run directory, until `release` or the process's end."""

    def __init__(self, path: Path) -> None:
        """Create and claim `path`.

        Raises Conflict when a living launcher has it, ConfigError when it cannot be made, is another user's, or holds
        files that are not ours.
        """
        self.path = path
        self._fd = -1
        make_private(path)
        self._claim()

    def _claim(self) -> None:
        lock = self.path / _LOCK
        if not lock.exists() and any(self.path.iterdir()):
            raise ConfigError(f"run directory {self.path} holds files that are not elasticmoe's; choose an empty one")
        while True:
            fd = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
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
        """Make the parts of the directory and the secrets that are missing; sockets and temporary files that a
        killed run left are removed.

        Raises ConfigError.
        """
        self._remove_volatile()
        make_run_dirs(config)
        for name in ("store", TEMPORARY):
            make_private(self.path / name)
        for name in SECRETS:
            ensure_secret(config.secret(name))

    def begin_anew(self, config: Common) -> None:
        """Let the scaler drop what an interrupted deployment left: its layout and its journal. What says which epochs
        have been seen stays, for they may not fall. The parts of the directory are there."""
        config.fresh_mark.touch(mode=0o600)
        (self.path / FILE_NAME).unlink(missing_ok=True)

    def clear_logs(self) -> None:
        """Drop the logs of an earlier run; the folder stays."""
        for path in (self.path / "logs").glob("*"):
            if path.is_file():
                path.unlink(missing_ok=True)

    def note_failure(self, text: str) -> None:
        """Leave the reason of a failed run beside its logs, for `status`. Best effort: the disk may be full."""
        try:
            (self.path / "logs" / _FAILURE_FILE).write_text(text + "\n")
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
        (self.path / _KEEP).unlink(missing_ok=True)  # after the lock: see ask_to_keep
        if not keep_logs:
            _remove_folders(self.path)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def keep(self, *, keep_logs: bool = True) -> None:
        """Leave all that a next start goes on with, and give the claim back."""
        self._remove_volatile()
        if not keep_logs:
            self.clear_logs()
        self.release()

    def is_keeping_asked(self) -> bool:
        """Whether the last `down` wanted the state to be kept."""
        return os.path.lexists(self.path / _KEEP)

    def _remove_volatile(self) -> None:
        for name in _VOLATILE:
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / _KEEP).unlink(missing_ok=True)

    def release(self) -> None:
        """Give the claim back; a directory in which nothing was made yet is removed. Idempotent."""
        if self._fd < 0:
            return
        if [entry.name for entry in self.path.iterdir()] == [_LOCK]:
            (self.path / _LOCK).unlink()
            _remove_folders(self.path)
        os.close(self._fd)
        self._fd = -1


def _remove_folders(path: Path) -> None:
    """Remove the directory and our own parent of it, as far as they are empty."""
    try:
        path.rmdir()
        if path.parent.name == parent_name():
            path.parent.rmdir()
    except OSError:
        pass  # something else is in it


def last_failure(path: Path) -> str | None:
    """Why the last run in the run directory `path` failed, None when it did not. Raises ConfigError."""
    if not is_private(path) or not is_private(path / "logs"):
        return None
    raw = read_private(path / "logs" / _FAILURE_FILE, _FAILURE_BYTES_MAX)
    return raw.decode(errors="replace").strip() if raw is not None else None


def is_left_over(path: Path) -> bool:
    """Whether a launcher that was killed has left more than its logs in the run directory. Raises ConfigError."""
    return is_private(path) and (path / _LOCK).exists() and (path / "secrets").exists()


def ask_to_keep(path: Path) -> bool:
    """Tell the launcher that has the run directory `path` to keep the state when it is asked to end. Whether it can
    still hear that: not where it has removed everything by now, and then nothing of ours stays there. Raises OSError.
    """
    try:
        (path / _KEEP).touch(mode=0o600)
    except FileNotFoundError:
        return False
    if (path / _LOCK).exists():
        return True
    ask_nothing(path)  # a launcher that removes drops its lock first, and then this file: now nobody would
    _remove_folders(path)
    return False


def ask_nothing(path: Path) -> None:
    """Take it back."""
    (path / _KEEP).unlink(missing_ok=True)


def has_logs(path: Path) -> bool:
    """Whether the launcher has left logs, as it does where something went wrong."""
    return any((path / "logs").glob("*"))


def ensure_secret(path: Path) -> None:
    """Write a random secret (64 hexadecimal digits, mode 0600) to `path` unless a file with one is there."""
    if read_private(path, _SECRET_BYTES_MAX):
        path.chmod(0o600)
    else:
        write_secret(path, secrets.token_hex(_SECRET_BYTES))


def write_secret(path: Path, secret: str) -> None:
    """Replace the file at `path` by one with `secret`, mode 0600, at once. Raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "w") as file:
            file.write(secret)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # the disk is full: half a file is of no use
        raise

"""Folders and files that this user made and nobody else can change: what is read from them is trusted only then.

A run directory may lie in a folder that others write to, such as /tmp, and its path may be known before it is made. So
every component of the path is looked at, from the root on: it belongs to this user or to root, and nobody else may
write to it (in a sticky folder others may make entries, but not take ours away). Links are followed where one of the
two made them. What has passed stays as it is: only this user and root could change it.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from elasticmoe.common.protocol.errors import ConfigError

_OTHERS_WRITE = 0o022
_OTHERS_ANY = 0o077
_LINKS_MAX = 40
_SECRET_BYTES_MAX = 4096
UNSAFE = "unsafe_run_dir"


def is_private(path: Path, what: str = "run directory") -> bool:
    """Whether a folder of this user alone is at `path`, absolute; False when nothing is there.

    Raises ConfigError `unsafe_run_dir` when somebody else made or can change the folder or one on the way to it, or
    when it is none.
    """
    status = _walk(path, what)
    if status is None:
        return False
    if not stat.S_ISDIR(status.st_mode):
        raise _unsafe(what, path, "is not a folder")
    if status.st_uid != os.geteuid():
        raise _unsafe(what, path, f"belongs to uid {status.st_uid}, not to {os.geteuid()}")
    if status.st_mode & _OTHERS_WRITE:
        raise _unsafe(what, path, f"has mode {stat.S_IMODE(status.st_mode):04o}, so others could write to it")
    return True


def make_private(path: Path, what: str = "run directory") -> None:
    """Make the folder `path`, absolute, and those on the way to it, mode 0700; one that is there loses others' rights.

    Raises ConfigError, also when one is there that others could have written to, unless it is empty.
    """
    try:
        _make_parents(path, what)
        if not is_private_or_empty(path, what):
            path.mkdir(mode=0o700)
            is_private(path, what)
        if path.stat().st_mode & _OTHERS_ANY:
            path.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None


def is_private_or_empty(path: Path, what: str) -> bool:
    """As `is_private`, but a folder of ours that others may write to passes when nothing is in it: they are shut out
    first, and only then is looked. Raises ConfigError, OSError."""
    status = _walk(path, what)
    is_ours = status is not None and stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    mode = stat.S_IMODE(status.st_mode) if status is not None else 0
    if is_ours and mode & _OTHERS_WRITE and not _is_shut_and_empty(path, mode):
        raise _unsafe(what, path, f"has mode {mode:04o}, and others may have filled it")
    return is_private(path, what)


def _is_shut_and_empty(path: Path, mode: int) -> bool:
    """Shut others out of a folder of ours and see that it is empty; if not, it is left as it was."""
    path.chmod(0o700)
    if any(path.iterdir()):
        path.chmod(mode)
        return False
    return True


def read_private(path: Path, bytes_max: int, what: str = "run directory") -> bytes | None:
    """The content of a file of ours in a folder that `is_private`; None when there is none.

    Raises ConfigError for a link, for what is no regular file, somebody else's, writable by others or too large.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _unsafe(what, path, "is a link") from None
        raise ConfigError(f"{path}: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _unsafe(what, path, "is not a regular file")
        if status.st_uid != os.geteuid():
            raise _unsafe(what, path, f"belongs to uid {status.st_uid}, not to {os.geteuid()}")
        if status.st_mode & _OTHERS_WRITE:
            raise _unsafe(what, path, f"has mode {stat.S_IMODE(status.st_mode):04o}, so others could write to it")
        with open(fd, "rb", closefd=False) as file:
            content = file.read(bytes_max + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    finally:
        os.close(fd)
    if len(content) > bytes_max:
        raise ConfigError(f"{path} exceeds the limit of {bytes_max} bytes")
    return content


def read_secret(path: Path) -> str:
    """A secret of a run directory, without white space around it. Raises ConfigError as `read_private` does, and when
    there is none or it is not ASCII."""
    content = read_private(path, _SECRET_BYTES_MAX)
    if content is None:
        raise ConfigError(f"{path.name} cannot be read: there is no such secret")
    try:
        return content.decode("ascii").strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is not ASCII") from None


def _make_parents(path: Path, what: str) -> None:
    for parent in reversed(path.parents):
        if _walk(parent, what) is None:
            parent.mkdir(mode=0o700, exist_ok=True)  # in a folder that has been looked at
            _walk(parent, what)


def _walk(path: Path, what: str) -> os.stat_result | None:
    """Look at every component of `path`; what is at its end, or None when something on the way is missing."""
    left, done, num_links = [*reversed(path.parts[1:])], Path("/"), 0
    try:
        status = done.lstat()
        _check_on_the_way(status, done, path, what)
        while left:
            name = left.pop()
            if name == "..":
                done = done.parent
                continue
            status = (done / name).lstat()
            if stat.S_ISLNK(status.st_mode):
                num_links += 1
                _check_owner(status, done / name, path, what)
                if num_links > _LINKS_MAX:
                    raise _unsafe(what, path, "leads through too many links")
                target = Path(os.readlink(done / name))
                left += [part for part in reversed(target.parts) if part != "/"]
                done = Path("/") if target.is_absolute() else done
                continue
            done /= name
            if left:
                _check_on_the_way(status, done, path, what)
        return done.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None


def _check_on_the_way(status: os.stat_result, at: Path, path: Path, what: str) -> None:
    _check_owner(status, at, path, what)
    if status.st_mode & _OTHERS_WRITE and not status.st_mode & stat.S_ISVTX:
        text = (
            f"{at} on the way to it has mode {stat.S_IMODE(status.st_mode):04o}, so others could replace what is in it"
        )
        raise _unsafe(what, path, text)


def _check_owner(status: os.stat_result, at: Path, path: Path, what: str) -> None:
    if status.st_uid not in (0, os.geteuid()):
        where = "" if at == path else f"{at} on the way to it "
        raise _unsafe(what, path, f"{where}belongs to uid {status.st_uid}, not to {os.geteuid()}")


def _unsafe(what: str, path: Path, text: str) -> ConfigError:
    return ConfigError(f"{what} {path}: {text}", code=UNSAFE)

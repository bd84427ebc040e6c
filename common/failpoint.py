"""Failpoints: places in the code where a test may hold, kill, delay or fail a process. Armed by files, off otherwise.

`failpoint("hmm.staged.before")` costs one look at a module variable unless `enable` was called with a folder. With one,
a file `<name>.arm` there (or `<name>@<process>.arm`, for one of several processes with the same code) is claimed by a
rename, so exactly one process and one pass takes it; `<name>.hit` is written with the process id; and the caller does
what the file said:

    wait             until `<name>.release` is there, or `<name>.hit` is gone; WAIT_S_MAX at the longest
    die              SIGKILL for the own process
    sleep SECONDS    at most WAIT_S_MAX
    hold_gil SECONDS the same in a C call that keeps the interpreter's lock: none of the process's threads runs Python
    raise CODE       the error of that code
    starve N         go on; the N-th memory allocation of the interpreter from here on, in whichever thread, fails once

A file that says anything else ends the process with a ValueError, as a mistake of the test. Any thread may call.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from elasticmoe.common.protocol.errors import ElasticMoEError

WAIT_S_MAX: Final = 60.0
_LOOK_S: Final = 0.005

_folder: Path | None = None
_process = ""


def enable(folder: str, process: str = "") -> None:
    """Look for armed failpoints in `folder` from now on; nowhere, where it is empty. `process`: this one's name."""
    global _folder, _process
    _folder = Path(folder) if folder else None
    _process = process


def failpoint(name: str) -> None:
    """Do what a test has armed at this place; nothing otherwise. May block, raise ElasticMoEError, or not return."""
    if _folder is not None:
        _pass(_folder, name)


def _pass(folder: Path, name: str) -> None:
    for full in (name, f"{name}@{_process}"):
        claimed = folder / f"{full}.{os.getpid()}-{threading.get_ident()}"
        try:
            os.rename(folder / f"{full}.arm", claimed)
        except OSError:
            continue  # not armed, or another one was first
        action = claimed.read_text().split()
        claimed.write_text(f"{os.getpid()}\n")
        hit = folder / f"{full}.hit"
        os.rename(claimed, hit)
        _act(hit, action, name)
        return


def _act(hit: Path, action: list[str], name: str) -> None:
    match action:
        case ["wait"]:
            release, deadline = hit.with_suffix(".release"), time.monotonic() + WAIT_S_MAX
            while hit.exists() and not release.exists() and time.monotonic() < deadline:
                time.sleep(_LOOK_S)
        case ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["sleep", seconds]:
            time.sleep(min(float(seconds), WAIT_S_MAX))
        case ["hold_gil", seconds]:
            # PyDLL calls without releasing the lock, as C code that never gives it back would.
            ctypes.PyDLL(None).usleep(int(min(float(seconds), WAIT_S_MAX) * 1e6))
        case ["starve", number]:
            # A module for tests, which some distributions of Python come without.
            importlib.import_module("_testcapi").set_nomemory(int(number), int(number) + 1)
        case ["raise", code]:
            raise _error(code, f"failpoint {name}")
        case _:
            raise ValueError(f"failpoint {name} is armed with {' '.join(action)!r}")


def _error(code: str, text: str) -> ElasticMoEError:
    """The error of `code`: of the class that has it as its own, where there is one."""
    for kind in _kinds(ElasticMoEError):
        if kind.code == code:
            return kind(text)
    return ElasticMoEError(text, code=code)


def _kinds(kind: type[ElasticMoEError]) -> Iterator[type[ElasticMoEError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)

"""What this process may use of the machine: memory and cores, by the machine and by every control group it is in; and
what its processors can do.

A group's limit holds for the groups in it, so the process's own group counts and each of its ancestors, as far as they
can be seen: in a container the mount begins at its own group. Both versions of control groups, also side by side
(cgroup v2: Documentation/admin-guide/cgroup-v2.rst; v1: Documentation/admin-guide/cgroup-v1; proc_pid_cgroup(5)).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from elasticmoe.common.protocol.errors import DoesNotFit
from elasticmoe.common.wording import size

ROOT = Path("/")
_WORTH_A_LOOK = 1 << 20

# Names of a group's files, by version: limits of memory, what is used of it, and what can be given back at once.
_LIMITS = {2: ("memory.max", "memory.high"), 1: ("memory.limit_in_bytes",)}
_USED = {2: "memory.current", 1: "memory.usage_in_bytes"}
_NO_LIMIT = 1 << 60
_CACHE = {2: "inactive_file", 1: "total_inactive_file"}


def available_bytes(root: Path = ROOT) -> int:
    """Memory that this process can still get. `root`: where proc and sys are. Raises OSError without a proc."""
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines() if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    room = group_room(root)
    return available if room is None else min(available, room)


def group_room(root: Path = ROOT) -> int | None:
    """Bytes that the control groups still allow, the narrowest of them; None where none has a limit.

    What a group uses includes the page cache of files that it has read; the part of it that is not in use is given back
    when memory is short, so it counts as free.
    """
    rooms = [_room(version, folder) for version, folder in _groups(root, "memory")]
    return min((room for room in rooms if room is not None), default=None)


def check_group(nbytes: int) -> None:
    """Raise DoesNotFit for what a control group cannot hold: beyond its limit the kernel kills processes of the group
    where a machine without memory would refuse. Small parts are not worth the look."""
    if nbytes < _WORTH_A_LOOK or (room := group_room()) is None or nbytes <= room:
        return
    raise DoesNotFit(f"no memory for {size(nbytes)}: the process's control group has room for {size(room)} more")


def usable_cores(root: Path = ROOT) -> float:
    """Cores that this process may run on (its affinity, which a cpuset narrows), or less where a group's quota of time
    is less than that."""
    quotas = [_quota(version, folder) for version, folder in _groups(root, "cpu")]
    return min([float(len(os.sched_getaffinity(0))), *(quota for quota in quotas if quota is not None)])


def multiplies_bfloat16(root: Path = ROOT) -> bool:
    """Whether the processors have AVX-512's products of bfloat16 pairs, as all with AMX have."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    return any("avx512_bf16" in line.split() for line in lines if line.startswith("flags"))


def _room(version: int, folder: Path) -> int | None:
    limits = [limit for name in _LIMITS[version] if (limit := _number(folder / name)) is not None]
    if not limits or (used := _number(folder / _USED[version])) is None:
        return None
    return max(0, min(limits) - max(0, used - _cache(version, folder)))


def _cache(version: int, folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(_CACHE[version] + " "))
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


def _quota(version: int, folder: Path) -> float | None:
    """Cores' worth of time; None for no limit."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such controller there, or "max"
        return None


def _number(path: Path) -> int | None:
    """What a group's file says; None for no file, and for no limit: "max", or in version 1 more than there can be."""
    try:
        number = int(path.read_text())
    except (OSError, ValueError):
        return None
    return number if number < _NO_LIMIT else None


@lru_cache
def _groups(root: Path, controller: str) -> list[tuple[int, Path]]:
    """(version, folder) of the groups of this process that `controller` may govern, its own first, then ancestors.
    Found once: whoever moves a process to a group does so when it is started."""
    found: list[tuple[int, Path]] = []
    try:
        paths = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        mounts = [_mount_of(line) for line in (root / "proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return found
    for _, names, path in (fields for fields in paths if len(fields) == 3):
        version = 1 if names else 2
        if version == 1 and controller not in names.split(","):
            continue
        for mount in mounts:
            if mount is not None and mount.governs(version, controller):
                found += [(version, folder) for folder in mount.folders(root, path)]
                break
    return found


class _Mount:
    """Where a hierarchy of groups can be seen: its group `top` is the folder `point`."""

    def __init__(self, top: str, point: str, kind: str, options: str) -> None:
        self._top = top
        self._point = point
        self._kind = kind
        self._options = options

    def governs(self, version: int, controller: str) -> bool:
        """Whether it is of that version, and for version 1 of that controller."""
        if version == 2:
            return self._kind == "cgroup2"
        return self._kind == "cgroup" and controller in self._options.split(",")

    def folders(self, root: Path, path: str) -> Iterator[Path]:
        """The folder of the group `path` and those of its ancestors. Of a group outside of the mount, as of a process
        that was moved there from another namespace, only what the mount begins with can be seen."""
        point = root / self._point.lstrip("/")
        top = [part for part in self._top.split("/") if part]
        parts = [part for part in path.split("/") if part]
        below = parts[len(top) :] if parts[: len(top)] == top else parts
        if ".." in below:
            below = []
        for depth in range(len(below), -1, -1):
            yield point.joinpath(*below[:depth])


def _mount_of(line: str) -> _Mount | None:
    """A line of mountinfo: ID PARENT DEVICE TOP POINT OPTIONS [TAG...] - KIND SOURCE OPTIONS."""
    left, dash, right = line.partition(" - ")
    fields, more = left.split(), right.split()
    if not dash or len(fields) < 6 or len(more) < 3 or not more[0].startswith("cgroup"):
        return None
    return _Mount(_plain(fields[3]), _plain(fields[4]), more[0], more[2])


def _plain(text: str) -> str:
    """A path as mountinfo writes it, where a space is \\040."""
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")

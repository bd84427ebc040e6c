"""What control groups leave of the machine: of every version, nested, and as far as they can be seen. The trees are
made up; `test_a_real_group_counts` makes real ones where that is permitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from elasticmoe.cli import checks, doctor
from elasticmoe.common import machine
from elasticmoe.common.devices.factory import open_device
from elasticmoe.common.machine import available_bytes, group_room, usable_cores
from elasticmoe.common.protocol.errors import DoesNotFit
from elasticmoe.services.hmm.memory import holdings

MIB, GIB = 1 << 20, 1 << 30
MACHINE = 22 * GIB
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
V1_CPU = "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
OTHERS = "23 1 8:1 / / rw,relatime - ext4 /dev/root rw\nnot a line of mountinfo"


def tree(root: Path, group: str, mounts: tuple[str, ...], files: Mapping[str, object]) -> Path:
    """A machine with 22 GiB available, whose `files` are below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {MACHINE // 512} kB\nMemAvailable:   {MACHINE // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(group)
    (root / "proc/self/mountinfo").write_text("\n".join((OTHERS, *mounts)) + "\n")
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def v2(group: str, limit: object, used: int = 0, **more: object) -> dict[str, object]:
    values = {"memory.max": limit, "memory.current": used}
    return {f"{group}/{name}".lstrip("/"): value for name, value in (values | more).items()}


def v1(group: str, limit: object, used: int = 0) -> dict[str, object]:
    values = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used}
    return {f"memory/{group}/{name}": value for name, value in values.items()}


NO_LIMIT_V1 = 9223372036854771712

CASES: dict[str, tuple[str, tuple[str, ...], dict[str, object], int]] = {
    "no groups": ("", (), {}, MACHINE),
    "v2, own group": ("0::/a\n", (V2,), v2("a", 4 * GIB, GIB), 3 * GIB),
    "v2, max": ("0::/a\n", (V2,), v2("a", "max", GIB), MACHINE),
    "v2, more than the machine has": ("0::/a\n", (V2,), v2("a", 64 * GIB), MACHINE),
    "v2, only an ancestor": (
        "0::/a/b/c\n",
        (V2,),
        v2("a", 4 * GIB, GIB) | v2("a/b", "max") | v2("a/b/c", "max"),
        3 * GIB,
    ),
    "v2, the narrowest of all": ("0::/a/b\n", (V2,), v2("a", 4 * GIB, GIB) | v2("a/b", 5 * GIB, 3 * GIB), 2 * GIB),
    "v2, another group's limit": ("0::/a\n", (V2,), v2("b", GIB) | v2("a", "max"), MACHINE),
    "v2, over its limit": ("0::/a\n", (V2,), v2("a", GIB, 2 * GIB), 0),
    "v2, throttled before": ("0::/a\n", (V2,), v2("a", 4 * GIB, GIB, **{"memory.high": 2 * GIB}), GIB),
    "v2, page cache": (
        "0::/a\n",
        (V2,),
        v2("a", 4 * GIB, 4 * GIB, **{"memory.stat": f"anon 1\ninactive_file {3 * GIB}\nactive_file 7"}),
        3 * GIB,
    ),
    "v2, in a namespace": ("0::/\n", (V2,), v2("", 4 * GIB, GIB), 3 * GIB),
    "v2, outside of the namespace": ("0::/../../x\n", (V2,), v2("", 4 * GIB, GIB) | v2("x", GIB), 3 * GIB),
    "v2, mounted from a group on": (
        "0::/docker/c/inner\n",
        (V2.replace(" / /sys", " /docker/c /sys"),),
        v2("", 8 * GIB) | v2("inner", 4 * GIB, GIB),
        3 * GIB,
    ),
    "v2, a path that is not below the mount": (
        "0::/docker/c\n",
        (V2,),
        v2("", 4 * GIB, GIB),  # as in a container whose mount begins at its own group, with the host's path
        3 * GIB,
    ),
    "v1, own group": ("4:memory:/a\n", (V1_MEMORY,), v1("a", 4 * GIB, GIB), 3 * GIB),
    "v1, no limit": ("4:memory:/a\n", (V1_MEMORY,), v1("a", NO_LIMIT_V1, GIB), MACHINE),
    "v1, only an ancestor": (
        "9:name=systemd:/\n4:memory:/a/b\n",
        (V1_MEMORY,),
        v1("a", 4 * GIB, GIB) | v1("a/b", NO_LIMIT_V1),
        3 * GIB,
    ),
    "v1, page cache": (
        "4:memory:/a\n",
        (V1_MEMORY,),
        v1("a", 4 * GIB, 3 * GIB) | {"memory/a/memory.stat": f"inactive_file 5\ntotal_inactive_file {2 * GIB}"},
        3 * GIB,
    ),
    "hybrid, by v1": ("4:memory:/a\n0::/b\n", (V1_MEMORY, HYBRID), v1("a", 4 * GIB, GIB), 3 * GIB),
    "hybrid, by v2": (
        "1:cpu,cpuacct:/\n0::/b\n",
        (V1_CPU, HYBRID),
        {f"unified/{name}": value for name, value in v2("b", 4 * GIB, GIB).items()},
        3 * GIB,
    ),
    "files that say nothing": ("0::/a\n", (V2,), v2("a", "", 1) | v2("", "12x"), MACHINE),
    "no line of groups": ("nonsense\n", (V2,), v2("", 4 * GIB), MACHINE),
}


@pytest.mark.parametrize("name", CASES)
def test_every_group_that_the_process_is_in_counts(tmp_path: Path, name: str) -> None:
    group, mounts, files, expected = CASES[name]
    assert available_bytes(tree(tmp_path, group, mounts, files)) == expected


def test_a_mount_point_may_hold_spaces(tmp_path: Path) -> None:
    mount = V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/with\\040space")
    files = {f"with space/{name}": value for name, value in v2("a", 4 * GIB).items()}
    assert available_bytes(tree(tmp_path, "0::/a\n", (mount,), files)) == 4 * GIB


@pytest.mark.parametrize(
    ("group", "mount", "files", "expected"),
    [
        ("0::/a/b\n", V2, {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a\n", V2, {"a/cpu.max": "50000 100000", "cpu.max": "400000 100000"}, 0.5),
        ("0::/a\n", V2, {"a/cpu.max": "max 100000"}, 3.0),
        ("0::/a\n", V2, {"a/cpu.max": "6400000 100000"}, 3.0),
        (
            "1:cpu,cpuacct:/a/b\n",
            V1_CPU,
            {"cpu,cpuacct/a/cpu.cfs_quota_us": 20_000, "cpu,cpuacct/a/cpu.cfs_period_us": 10_000},
            2.0,
        ),
        (
            "1:cpu,cpuacct:/a\n",
            V1_CPU,
            {"cpu,cpuacct/a/cpu.cfs_quota_us": -1, "cpu,cpuacct/a/cpu.cfs_period_us": 10_000},
            3.0,
        ),
    ],
)
def test_cores_are_those_of_the_affinity_or_of_the_narrowest_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, mount: str, files: dict[str, object], expected: float
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 7})  # a cpuset narrows it
    assert usable_cores(tree(tmp_path, group, (mount,), files)) == expected


def test_all_who_ask_are_told_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, "0::/a/b\n", (V2,), v2("a", 4 * GIB, 0, **{"cpu.max": "50000 100000"}))
    monkeypatch.setattr(machine.available_bytes, "__defaults__", (root,))
    monkeypatch.setattr(machine.group_room, "__defaults__", (root,))
    monkeypatch.setattr(machine.usable_cores, "__defaults__", (root,))
    assert checks.available_bytes() == 4 * GIB
    assert "4.00 GiB" in doctor.check_memory().text
    assert doctor.check_cores().text == "0.5"
    assert holdings.available_bytes() == 4 * GIB


def test_a_device_refuses_what_its_group_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its group's limit the kernel would kill the process in the midst of the allocation."""
    device = open_device("host:0", budget=64 * MIB, granularity=MIB)
    try:
        monkeypatch.setattr(machine, "group_room", lambda: 3 * MIB)
        with pytest.raises(DoesNotFit, match=r"host:0: no memory for 4.00 MiB: .* has room for 3.00 MiB more"):
            device.create(4 * MIB, "weights")
        device.release(device.create(2 * MIB, "weights"))
        handle = device.claim(8 * MIB, "weights")
        with pytest.raises(DoesNotFit, match=r"host:0: .* control group"):
            device.populate(handle, 0, 4 * MIB)
        assert device.check_integrity() == []
    finally:
        device.close()


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A group with a limit of 4 GiB and one in it without; who is to be in the inner one writes to its cgroup.procs."""
    folders = [folder for _, folder in machine._groups(machine.ROOT, "memory") if folder.is_dir()]
    if not folders:
        pytest.skip("no control group of memory can be seen")
    outer = folders[0] / f"elasticmoe-test-{os.getpid()}"
    inner = outer / "inner"
    made: list[Path] = []
    try:
        for folder in (outer, inner):
            folder.mkdir()
            made.append(folder)
        limit = next(
            (outer / name for name in ("memory.max", "memory.limit_in_bytes") if (outer / name).exists()), None
        )
        if limit is None:
            pytest.skip(f"no controller of memory is delegated to {folders[0]}")
        limit.write_text(str(4 * GIB))
        yield inner
    except PermissionError as error:
        pytest.skip(f"no control group can be made here: {error}")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    finally:
        for folder in reversed(made):
            folder.rmdir()


def test_a_real_group_counts(real_group: Path) -> None:
    code = (
        "import json, os, sys; from pathlib import Path; Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))"
    )
    code += "; from elasticmoe.cli import doctor; from elasticmoe.common import machine"
    code += "; before, available, after = machine.group_room(), machine.available_bytes(), machine.group_room()"
    code += "; print(json.dumps([available, [before, after], doctor.check_memory().text]))"
    done = subprocess.run([sys.executable, "-c", code, str(real_group)], capture_output=True, text=True, check=False)
    if "cgroup.procs" in done.stderr or "PermissionError" in done.stderr:
        pytest.skip(f"no process can be moved to a control group here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    available, rooms, text = json.loads(done.stdout)
    room = max(rooms)  # what the process itself takes grows meanwhile
    assert 3 * GIB < room <= 4 * GIB
    assert available <= room
    assert " GiB available" in text
    assert float(text.split()[0]) <= 4
    assert (group_room() or MACHINE) > room - GIB  # ours is not in that group

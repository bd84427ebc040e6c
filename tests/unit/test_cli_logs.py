"""Log files with a bound: rotated in place, because the processes hold them open."""

from __future__ import annotations

import os
from pathlib import Path

from elasticmoe.cli.children import Child, ChildSpec
from elasticmoe.cli.logs import OLD, Logs
from elasticmoe.services.router.history import History


def test_a_full_log_is_kept_once_and_its_writer_goes_on(tmp_path: Path) -> None:
    logs, path = Logs(tmp_path, 1_000), tmp_path / "hmm.log"
    old = path.with_name(path.name + OLD)
    with open(path, "ab", buffering=0) as writer:
        writer.write(b"a" * 999)
        logs.look()
        assert not old.exists()
        writer.write(b"b")
        logs.look()
        assert (path.read_bytes(), old.read_bytes()) == (b"", b"a" * 999 + b"b")
        writer.write(b"c" * 1_500)
        logs.look()
        assert (path.read_bytes(), old.read_bytes()) == (b"", b"c" * 1_500)
        writer.write(b"d")
    assert path.read_bytes() == b"d"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hmm.log", "hmm.log.1"]


def test_other_files_and_links_are_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"x" * 5_000)
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "failure.txt").write_bytes(b"x" * 5_000)
    (folder / "link.log").symlink_to(outside)
    (folder / "folder.log").mkdir()
    Logs(folder, 1_000).look()
    assert outside.stat().st_size == (folder / "failure.txt").stat().st_size == 5_000


def test_without_room_for_a_copy_the_log_ends_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "hmm.log"
    path.write_bytes(b"x" * 5_000)
    old = tmp_path / "hmm.log.1"
    old.mkdir()  # so that none can be made, as on a full disk
    (old / "entry").touch()
    Logs(tmp_path, 1_000).look()
    assert path.stat().st_size == 5_000  # that one cannot be cleared away, so nothing is lost for it
    (old / "entry").unlink()
    old.rmdir()
    Logs(tmp_path, 1_000).look()
    assert path.stat().st_size == 0


def test_the_last_line_is_found_after_a_rotation(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"of an earlier one " * 100 + b"\n")
    child = Child(
        ChildSpec("x", ("/bin/sh", "-c", "echo first; read line; echo second")), os.environ, tmp_path, log, {}
    )
    child.wait(60)
    assert child.last_line() == "second"
    Logs(tmp_path, 100).look()
    assert child.last_line() == ""
    with open(log, "ab") as file:
        file.write(b"third\n")
    assert child.last_line() == "third"
    assert child.reap() == 0


def test_a_history_that_is_full_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path, "router:1", bytes_max=4_000)
    for number in range(200):
        history.chunk("r", number, list(range(20)))
        history.flush()
    history.close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["history.jsonl", "history.jsonl.1"]
    sizes = [entry.stat().st_size for entry in tmp_path.iterdir()]
    assert max(sizes) < 4_200
    lines = (tmp_path / "history.jsonl.1").read_bytes() + path.read_bytes()
    indices = [line.split(b'"index":')[1].split(b",")[0] for line in lines.splitlines() if b'"index"' in line]
    assert indices == [b"%d" % number for number in range(200 - len(indices), 200)]

"""Folders and files that only this user can have made. (What needs a second user is in procs/test_local_user.py.)"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from elasticmoe.common.private import is_private, make_private, read_private, read_secret
from elasticmoe.common.protocol.errors import ConfigError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_made_is_private_with_everything_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "run"
    assert not is_private(path)
    make_private(path)
    make_private(path)
    assert is_private(path)
    assert {mode(folder) for folder in (path, path.parent, path.parent.parent)} == {0o700}


def test_others_lose_the_right_to_read(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=0o755)
    (path / "file").write_text("x")
    assert is_private(path)  # nobody else could have put it there
    make_private(path)
    assert mode(path) == 0o700


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_a_folder_that_others_could_fill_is_refused_unless_it_is_empty(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    path.chmod(bits)
    with pytest.raises(ConfigError, match="others could write") as refused:
        is_private(path)
    assert refused.value.code == "unsafe_run_dir"
    (path / "planted").write_text("x")
    with pytest.raises(ConfigError, match="may have filled it"):
        make_private(path)
    assert mode(path) == bits  # left as it was
    (path / "planted").unlink()
    make_private(path)
    assert mode(path) == 0o700


def test_a_folder_above_that_others_can_write_to_is_refused_unless_it_is_sticky(tmp_path: Path) -> None:
    above, path = tmp_path / "above", tmp_path / "above" / "run"
    path.mkdir(parents=True, mode=0o700)
    for bits, is_right in ((0o755, True), (0o1777, True), (0o777, False), (0o775, False), (0o757, False)):
        above.chmod(bits)
        if is_right:
            assert is_private(path)
            continue
        with pytest.raises(ConfigError, match="on the way to it has mode"):
            is_private(path)
        with pytest.raises(ConfigError, match="on the way to it has mode"):
            make_private(path / "deeper")


def test_links_of_ours_are_followed_and_loops_end(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    for number, to in enumerate((str(target), "target", "../" + tmp_path.name + "/target", "./link0")):
        link = tmp_path / f"link{number}"
        link.symlink_to(to)
        assert is_private(link)
        assert not is_private(link / "missing")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="too many links"):
        is_private(tmp_path / "loop")
    target.chmod(0o777)
    with pytest.raises(ConfigError, match="others could write"):
        is_private(tmp_path / "link1")


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is not a folder"):
        is_private(tmp_path / "file")
    assert not is_private(tmp_path / "file" / "below")
    with pytest.raises(ConfigError):
        make_private(tmp_path / "file" / "below")


def test_secrets_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "admin.token"
    with pytest.raises(ConfigError, match=r"admin\.token cannot be read"):
        read_secret(path)
    path.write_text("s3cret\n")
    assert read_secret(path) == "s3cret"
    assert read_private(path, 7) == b"s3cret\n"
    with pytest.raises(ConfigError, match="limit of 6 bytes"):
        read_private(path, 6)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not ASCII"):
        read_secret(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_secret(path)

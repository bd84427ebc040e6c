"""Small files of a checkpoint: what is read, and that nothing hangs, grows or is taken for what it is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elasticmoe.common.checkpoint_files import read_file, read_json
from elasticmoe.common.protocol.errors import CheckpointError


def test_a_file_is_read_whole_and_an_absent_one_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": 1}')
    (tmp_path / "link.json").symlink_to("a.json")
    assert read_file(tmp_path / "a.json", 8) == b'{"a": 1}'
    assert read_json(tmp_path / "link.json", 8) == {"a": 1}
    assert read_file(tmp_path / "none", 8) is None
    assert read_json(tmp_path / "none", 8) is None


def test_a_file_beyond_the_bound_is_refused_with_both_figures(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"x" * 9)
    with pytest.raises(CheckpointError, match=r"a\.json has 9 bytes; the limit is 8"):
        read_file(tmp_path / "a.json", 8)


@pytest.mark.parametrize("kind", ["fifo", "endless", "folder", "dangling"])
def test_what_is_no_regular_file_neither_hangs_nor_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
        assert read_file(path, 8) is None
        return
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_file(path, 8)


def test_a_file_of_the_kernel_that_claims_no_size_is_still_bounded(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("/proc/self/maps")  # regular, and of 0 bytes by its status
    with pytest.raises(CheckpointError, match="the limit is 8"):
        read_file(tmp_path / "a", 8)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(CheckpointError, match="git lfs pull") as caught:
        read_json(tmp_path / "tokenizer.json", 1000)
    assert caught.value.code == "lfs_pointer"


@pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000, b""])
def test_what_is_no_json_object_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"a\.json"):
        read_json(tmp_path / "a.json", 1 << 20)

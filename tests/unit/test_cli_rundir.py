"""The run directory: private, claimed by one launcher, cleared of what we made and of nothing else."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe.cli import down, rundir
from elasticmoe.cli.down import terminate
from elasticmoe.cli.keeping import is_kept
from elasticmoe.cli.main import main
from elasticmoe.cli.rundir import RunDir, ask_nothing, ask_to_keep, ensure_secret
from elasticmoe.common import record
from elasticmoe.common.config import HmmConfig
from elasticmoe.common.protocol.errors import ConfigError, Conflict
from elasticmoe.common.record import (
    DeploymentRecord,
    ProcessRecord,
    living_record,
    read_record,
    start_ticks,
    write_record,
)
from tests.unit.deployment_records import record_of


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="em-") as folder:
        yield Path(folder) / "run"


def prepare(path: Path) -> RunDir:
    run_dir = RunDir(path)
    run_dir.prepare(HmmConfig(run_dir=str(path)))
    return run_dir


def test_all_of_it_is_private_and_has_secrets(path: Path) -> None:
    run_dir = prepare(path)
    for folder in (path, *(entry for entry in path.iterdir() if entry.is_dir())):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    token = path / "secrets/admin.token"
    assert (len(token.read_text()), stat.S_IMODE(token.stat().st_mode)) == (64, 0o600)
    run_dir.remove(keep_logs=False)
    assert not path.exists()


def test_a_secret_is_made_once(path: Path) -> None:
    prepare(path).release()
    before = (path / "secrets/admin.token").read_text()
    (path / "secrets/store.password").write_text("")  # cut off while it was written
    run_dir = prepare(path)
    assert (path / "secrets/admin.token").read_text() == before
    assert len((path / "secrets/store.password").read_text()) == 64
    run_dir.release()


def test_ensure_secret_takes_others_rights_away(path: Path) -> None:
    path.mkdir()
    secret = path / "token"
    secret.write_text("mine")
    secret.chmod(0o644)
    ensure_secret(secret)
    assert (secret.read_text(), stat.S_IMODE(secret.stat().st_mode)) == ("mine", 0o600)


def test_one_launcher_at_a_time(path: Path) -> None:
    first = RunDir(path)
    with pytest.raises(Conflict, match="is used by a running deployment") as refused:
        RunDir(path)
    assert refused.value.code == "already_running"
    first.release()
    RunDir(path).release()


def test_a_claim_on_a_file_that_was_removed_is_made_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = RunDir(path)
    real, opened = os.open, []

    def open_late(name: str | Path, *args: int) -> int:
        fd = real(name, *args)
        if not opened:  # the first launcher ends between our open and our lock
            opened.append(fd)
            first.remove(keep_logs=False)
            path.mkdir()
        return fd

    monkeypatch.setattr(os, "open", open_late)
    second = RunDir(path)
    monkeypatch.undo()
    with pytest.raises(Conflict):
        RunDir(path)
    second.release()


def test_a_folder_with_somebodys_files_is_refused_and_left_alone(path: Path) -> None:
    (path / "logs").mkdir(parents=True)
    with pytest.raises(ConfigError, match="not elasticmoe's"):
        RunDir(path)
    assert list(path.iterdir()) == [path / "logs"]


def test_what_is_not_ours_survives(path: Path) -> None:
    run_dir = prepare(path)
    (path / "notes.txt").write_text("x")
    run_dir.remove(keep_logs=False)
    assert list(path.iterdir()) == [path / "notes.txt"]


def test_kept_logs_do_not_stop_the_next_start(path: Path) -> None:
    run_dir = prepare(path)
    (path / "logs/hmm.log").write_text("x")
    run_dir.note_failure("start_failed: no")
    run_dir.remove(keep_logs=True)
    assert {entry.name for entry in path.iterdir()} == {"launcher.lock", "logs"}
    again = prepare(path)
    again.clear_logs()
    assert list((path / "logs").iterdir()) == []
    again.release()


def test_a_claim_that_made_nothing_leaves_nothing(path: Path) -> None:
    RunDir(path).release()
    assert not path.exists()


def test_another_users_folder_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 4_242)
    with pytest.raises(ConfigError, match="belongs to uid"):
        RunDir(path)


def test_what_a_next_start_goes_on_with_is_kept_and_the_sockets_are_not(path: Path) -> None:
    run_dir = prepare(path)
    left = ("state/fence-hmm", "store/dump", "logs/hmm.log")
    for name in ("sockets/hmm.sock", *left):
        (path / name).write_text("x")
    run_dir.keep()
    assert {entry.name for entry in path.iterdir()} == {"launcher.lock", "logs", "secrets", "state", "store"}
    again = prepare(path)
    again.begin_anew(HmmConfig(run_dir=str(path)))
    assert all((path / name).read_text() == "x" for name in left)  # what has been seen is not forgotten
    assert (path / "state/fresh").exists()
    again.release()


def test_what_down_says_of_the_state_counts_until_the_next_start(path: Path) -> None:
    run_dir = prepare(path)
    assert not run_dir.is_keeping_asked()
    assert ask_to_keep(path)
    assert run_dir.is_keeping_asked()
    ask_nothing(path)
    assert not run_dir.is_keeping_asked()
    assert ask_to_keep(path)
    assert stat.S_IMODE((path / "keep-state").stat().st_mode) == 0o600
    run_dir.release()
    again = prepare(path)
    assert not again.is_keeping_asked()
    again.release()


def test_who_wants_to_keep_what_is_removed_already_leaves_nothing(path: Path) -> None:
    prepare(path).remove(keep_logs=False)
    assert not ask_to_keep(path)
    path.mkdir(parents=True, mode=0o700)  # in the midst of it: the lock is gone, the directory is not
    assert not ask_to_keep(path)
    assert not path.exists()


def test_half_a_file_on_a_full_disk_stays_nowhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = prepare(path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    before = sorted(path.iterdir())
    with pytest.raises(OSError, match="No space"):
        write_record(path, record_of())
    with pytest.raises(OSError, match="No space"):
        rundir.write_secret(path / "x", "y")
    assert sorted(path.iterdir()) == before
    run_dir.release()


@pytest.mark.parametrize(
    ("is_wanted", "has_failed", "has_served", "is_left", "kept"),
    [
        (False, False, True, True, False),  # stopped
        (True, False, True, False, True),
        (False, True, True, False, True),  # the deployment failed
        (True, True, True, False, True),
        (False, False, False, True, True),  # stopped, or failed, while it started
        (False, False, False, False, False),
        (True, False, False, False, True),
        (False, True, False, True, True),
        (True, True, False, False, False),  # a first start that failed has committed nothing
    ],
)
def test_what_a_run_leaves(is_wanted: bool, has_failed: bool, has_served: bool, is_left: bool, kept: bool) -> None:
    found = is_kept(is_wanted=is_wanted, has_failed=has_failed, has_served=has_served, is_left=is_left)
    assert found is kept


def test_a_plain_down_writes_nothing_on_a_full_disk_and_a_keeping_one_stops_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = prepare(path)
    launcher = ProcessRecord("launcher", os.getpid(), start_ticks(os.getpid()) or 0)
    write_record(path, record_of(launcher=launcher, keeps_state=False))
    stopped: list[ProcessRecord] = []

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def end(process: ProcessRecord, _: float) -> bool:
        stopped.append(process)
        run_dir.release()  # as a launcher that keeps its state
        return True

    monkeypatch.setattr(Path, "touch", full)
    monkeypatch.setattr(down, "terminate", end)
    assert main(["down", "--run-dir", str(path), "--keep-state"]) == 1
    assert capsys.readouterr().err.startswith("elasticmoe: storage_full: nothing was stopped: ")
    assert stopped == []
    assert main(["down", "--run-dir", str(path)]) == 0
    assert stopped == [launcher]
    assert not path.exists()


def test_a_damaged_record_is_not_cleared_where_the_state_is_to_be_kept(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(path).release()
    (path / record.FILE_NAME).write_text("{")
    assert main(["down", "--run-dir", str(path), "--keep-state"]) == 1
    assert capsys.readouterr().err.startswith("elasticmoe: damaged_record: ")
    assert (path / "store").is_dir()


def test_a_damaged_record_is_cleared_by_down_unless_its_launcher_lives(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = prepare(path)
    (path / record.FILE_NAME).write_text('{"state": "serving"')
    assert main(["down", "--run-dir", str(path)]) == 1
    assert capsys.readouterr().err.startswith("elasticmoe: damaged_record: ")
    run_dir.release()
    assert main(["down", "--run-dir", str(path)]) == 0
    assert "what an earlier run left was removed" in capsys.readouterr().out
    assert {entry.name for entry in path.iterdir()} == {"launcher.lock", "logs"}


def entry(launcher: ProcessRecord) -> DeploymentRecord:
    return record_of(launcher=launcher, state_format=0)


def test_the_record_survives_a_round_trip_and_is_private(path: Path) -> None:
    path.mkdir()
    assert read_record(path) is None
    written = entry(ProcessRecord("launcher", os.getpid(), start_ticks(os.getpid()) or 0))
    write_record(path, written)
    assert read_record(path) == written == living_record(path)
    assert stat.S_IMODE((path / record.FILE_NAME).stat().st_mode) == 0o600
    (path / record.FILE_NAME).write_text('{"state": "serving"')
    with pytest.raises(ConfigError, match="damaged"):
        read_record(path)


def test_a_reused_process_id_is_neither_alive_nor_signalled(path: Path) -> None:
    path.mkdir()
    impostor = ProcessRecord("launcher", os.getpid(), (start_ticks(os.getpid()) or 0) - 1)
    assert not impostor.is_alive()
    assert terminate(impostor, 0.0)  # had it been signalled, this test would be gone
    write_record(path, entry(impostor))
    assert living_record(path) is None


def test_a_process_that_is_gone_has_no_start_time() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert start_ticks(pid) is None  # a zombie
    os.waitpid(pid, 0)
    assert start_ticks(pid) is None

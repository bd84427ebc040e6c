"""What an orderly stop leaves with `--keep-state`, of `up` or of `down`: the launcher with stand-ins for the services
and the real store. Whole deployments: test_stop_and_go.py."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest

from elasticmoe.cli.main import main
from tests.procs.launcher_run import ALL, SERVING, Run, Start, store_command
from tests.procs.waiting import processes_of, wait_until
from tests.unit.threads import at_once

pytestmark = pytest.mark.procs

KEPT = ["deployment.json", "launcher.lock", "logs", "secrets", "state", "store"]


def serving(run: Run) -> Run:
    """The same, once it serves: with a layout that was committed, and with a key in the store."""
    run.read(SERVING)
    run.read("curl -N")
    store_command(run.run_dir, "SET key kept")
    (run.run_dir / "state/fence-layout").write_text("3")
    return run


def down(run_dir: Path, *flags: str) -> int:
    return main(["down", "--run-dir", str(run_dir), *flags])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def secrets(run_dir: Path) -> dict[str, tuple[int, bytes]]:
    """Modes and contents."""
    return {
        path.name: (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) for path in (run_dir / "secrets").iterdir()
    }


@pytest.mark.parametrize("how", ["down", "signal"])
def test_a_stop_that_keeps_the_state_leaves_all_that_the_next_start_needs(
    start: Start, run_dir: Path, how: str
) -> None:
    run = serving(start(ALL, *["--keep-state"] * (how == "signal")))
    before = secrets(run_dir)
    assert (down(run_dir, "--keep-state") if how == "down" else 0) == 0
    assert (run.end() if how == "down" else run.stop()) == 0
    assert "`elasticmoe up` goes on, `down` drops them" in "".join(run.lines)
    assert processes_of(run_dir) == {}
    assert names(run_dir) == KEPT
    assert names(run_dir / "logs") == [], "as after any clean end"
    assert secrets(run_dir) == before
    assert {mode for mode, _ in before.values()} == {0o600}
    assert run.record().processes == ()
    assert b"kept" in b"".join(path.read_bytes() for path in (run_dir / "store").rglob("*.aof"))
    again = start()
    assert run_dir.name in again.read("resuming the deployment that was stopped in ")
    assert "resumed: layout 3 with 2 replicas" in again.read("resumed: ")
    again.read(SERVING)
    assert b"kept" in store_command(run_dir, "GET key")
    assert secrets(run_dir) == before
    assert again.stop() == 0
    assert not run_dir.exists(), "what was asked for once counts once"


def test_logs_stay_with_the_state_where_both_are_asked_for(start: Start, run_dir: Path) -> None:
    run = serving(start(ALL, "--keep-state", "--keep-logs"))
    assert run.stop() == 0
    assert names(run_dir) == KEPT
    assert "store.log" in names(run_dir / "logs")


def test_a_plain_down_removes_everything_also_of_one_that_keeps_its_state(start: Start, run_dir: Path) -> None:
    run = serving(start(ALL, "--keep-state"))
    assert down(run_dir) == 0
    assert run.end() == 0
    assert not run_dir.exists()


def test_what_is_kept_stays_until_a_plain_down(start: Start, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = serving(start())
    assert down(run_dir, "--keep-state") == 0
    assert run.end() == 0
    stopping, stopped, kept = capsys.readouterr().out.splitlines()
    assert stopping == f"stopping oracle in {run_dir}"
    assert stopped.startswith("stopped in ")
    assert kept == f"{run_dir} keeps its state: `elasticmoe up` goes on with it, `elasticmoe down` removes it"
    assert down(run_dir, "--keep-state") == 0
    assert "nothing runs" in capsys.readouterr().out
    assert names(run_dir) == KEPT
    assert down(run_dir) == 0
    assert "what an earlier run left was removed" in capsys.readouterr().out
    assert names(run_dir) == ["launcher.lock", "logs"]


def test_the_last_down_counts_while_it_stops(start: Start, run_dir: Path) -> None:
    run = serving(start({**ALL, "slow": "stubborn"}))
    (slow,) = (process.pid for process in run.record().processes if process.name == "slow")
    assert down(run_dir, "--timeout", "0.01") == 1
    run.read("stopping slow")

    def end_it() -> None:
        wait_until((run_dir / "keep-state").exists, "the second one has said what it wants")
        os.kill(slow, signal.SIGKILL)

    assert at_once(lambda: down(run_dir, "--keep-state"), end_it) == [0, None]
    assert run.end() == 0
    assert names(run_dir) == KEPT


def test_a_plain_down_removes_what_a_start_goes_on_with(start: Start, run_dir: Path) -> None:
    """The start by itself would leave it: it ends nobody's layout."""
    run = serving(start(ALL, "--keep-state"))
    assert run.stop() == 0
    again = start({**ALL, "scaler": "never"})
    again.read("resuming the deployment that was stopped in ")
    again.read("loading")
    assert down(run_dir) == 0
    assert again.end() == 0
    assert not run_dir.exists() or names(run_dir) == ["launcher.lock", "logs"]
    other = start(ALL, "--dtype", "float32")
    other.read(SERVING)
    assert "resum" not in "".join(other.lines)
    assert other.stop() == 0


def test_what_is_kept_is_of_the_same_model_or_is_refused(start: Start, run_dir: Path) -> None:
    run = serving(start(ALL, "--keep-state"))
    assert run.stop() == 0
    other = start(ALL, "--model", "tiny")
    assert other.end() == 1
    assert other.lines[-1].startswith(f"elasticmoe: state_differs: {run_dir} holds what is left of a deployment")
    assert "--model was " in other.lines[-1]
    assert names(run_dir) == KEPT
    fresh = start(ALL, "--model", "tiny", "--fresh")
    fresh.read("beginning anew")
    fresh.read(SERVING)
    assert fresh.stop() == 0


def test_a_detached_one_keeps_its_state_too(start: Start, run_dir: Path) -> None:
    parent = start(ALL, "--keep-state", "--detach")
    assert parent.end() == 0
    assert parent.record().keeps_state
    (run_dir / "state/fence-layout").write_text("3")
    assert down(run_dir, "--keep-state") == 0
    assert names(run_dir) == KEPT
    again = start(ALL, "--detach")
    assert again.end() == 0
    assert "resuming the deployment that was stopped" in "".join(again.lines)
    assert down(run_dir) == 0
    wait_until(lambda: processes_of(run_dir) == {}, "nothing is left")
    assert not run_dir.exists()


def test_a_launcher_that_keeps_nothing_is_not_stopped_where_the_state_is_to_be_kept(
    start: Start, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = serving(start())
    path = run_dir / "deployment.json"
    told = json.loads(path.read_text())
    del told["keeps_state"]  # of a version that knew nothing of it
    path.write_text(json.dumps(told))
    assert down(run_dir, "--keep-state") == 1
    said = capsys.readouterr().err
    assert said.startswith("elasticmoe: version_mismatch: ")
    assert f"kill -9 {run.process.pid}" in said
    assert run.process.poll() is None
    assert down(run_dir) == 0
    assert run.end() == 0
    assert not run_dir.exists()


def test_a_start_that_is_stopped_keeps_what_it_was_asked_to(start: Start, run_dir: Path) -> None:
    run = start({**ALL, "scaler": "never"}, "--keep-state")
    run.read("loading")
    before = secrets(run_dir)
    assert run.stop() == 0
    assert secrets(run_dir) == before
    other = start(ALL, "--dtype", "float32")
    other.read(SERVING)
    assert "resum" not in "".join(other.lines), "no layout was committed, so nothing contradicts"
    assert secrets(run_dir) == before
    assert other.stop() == 0

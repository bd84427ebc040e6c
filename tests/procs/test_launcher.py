"""The launcher with stand-ins for the services and the real store: start, supervision, stop (promises P18 and P19)."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from elasticmoe.cli.embedded_store import is_answering, server_binary
from elasticmoe.cli.main import main
from tests.procs.launcher_run import ALL, SERVING, Run, Start, store_command
from tests.procs.waiting import free_port, processes_of, wait_until

pytestmark = pytest.mark.procs


def test_it_starts_in_order_serves_and_leaves_nothing(start: Start, run_dir: Path) -> None:
    run = start()
    assert "http://127.0.0.1:" in run.read(SERVING)
    assert run.read("curl -N").startswith("curl -N "), "it can be copied whole"
    text = "".join(run.lines)
    order = [text.index(f"starting {name}") for name in ALL]
    assert order == sorted(order)
    record = run.record()
    assert record.state == "serving"
    assert [process.name for process in record.processes] == list(ALL)
    assert all(process.is_alive() for process in (record.launcher, *record.processes))
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    for name in ("deployment.json", "secrets/admin.token", "secrets/store.password", "secrets/store.conf"):
        assert stat.S_IMODE((run_dir / name).stat().st_mode) == 0o600, name
    assert len((run_dir / "secrets/admin.token").read_text()) == 64
    groups = {os.getpgid(process.pid) for process in (record.launcher, *record.processes)}
    assert len(groups) == len(ALL) + 1
    assert run.stop() == 0
    stops = [line.split()[1].rstrip("…\n") for line in run.lines if line.startswith("stopping")]
    assert stops == list(reversed(ALL))
    assert not run_dir.exists()
    assert processes_of(run_dir) == {}


def test_the_store_keeps_its_password_and_its_socket_to_itself(start: Start, run_dir: Path) -> None:
    run = start({"store": "store", "scaler": "scaler", "router": "router"})
    run.read(SERVING)
    path, password = run_dir / "sockets/store.sock", (run_dir / "secrets/store.password").read_text()
    assert is_answering(path, password, timeout_s=60.0)
    assert not is_answering(path, "guess")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert password not in Path(f"/proc/{run.pid('store')}/cmdline").read_text()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b"PING\r\n")
        assert connection.recv(100).startswith(b"-NOAUTH")
    assert run.stop() == 0


def test_an_end_while_starting_is_fatal_and_shows_the_childs_own_words(start: Start, run_dir: Path) -> None:
    run = start({**ALL, "hmm": "exit"})
    assert run.end() == 1
    last = run.lines[-1].strip()
    assert last.startswith("elasticmoe: start_failed: hmm ended with exit code 3")
    assert last.endswith("elasticmoe-x: bad_thing: no luck today")
    assert "Traceback" not in "".join(run.lines)
    assert "bad_thing" in (run_dir / "logs/hmm.log").read_text()
    assert sorted(path.name for path in run_dir.iterdir()) == ["launcher.lock", "logs"]
    assert processes_of(run_dir) == {}


def test_what_the_scaler_says_ends_the_start(start: Start) -> None:
    run = start({**ALL, "scaler": "failed"})
    assert run.end() == 1
    assert run.lines[-1].strip() == "elasticmoe: bad_checkpoint: tensor x is missing"


def test_a_start_has_a_deadline_and_tells_the_phase(start: Start) -> None:
    run = start({"scaler": "never"}, "--ready-timeout", "20")
    run.read("loading: 512 B of 1.00 KiB")
    assert run.end() == 1
    assert "start_timeout: the deployment was not ready (loading) within 20 s" in run.lines[-1]


def test_sigterm_while_starting_stops_it_cleanly(start: Start, run_dir: Path) -> None:
    run = start({**ALL, "scaler": "never"})
    run.read("loading")
    assert run.stop() == 0
    assert not run_dir.exists()


def test_a_child_that_dies_is_started_again(start: Start, run_dir: Path) -> None:
    run = start()
    run.read(SERVING)
    first = run.pid("hmm")
    os.kill(first, signal.SIGKILL)
    line = run.read("hmm ended")
    assert "signal SIGKILL; restart 1 of 5 in 0.1 s; its last line: idle is up" in line

    def restarted() -> bool:
        return any((process.name, process.restarts) == ("hmm", 1) for process in run.record().processes)

    wait_until(restarted, "restart recorded")
    assert [process.name for process in run.record().processes] == list(ALL)
    assert run.pid("hmm") != first
    assert run.stop() == 0
    assert not run_dir.exists()


def test_a_dead_store_comes_back_with_its_data(start: Start, run_dir: Path) -> None:
    run = start()
    run.read(SERVING)
    store_command(run_dir, "SET key kept")
    os.kill(run.pid("store"), signal.SIGKILL)
    run.read("store ended")
    wait_until(lambda: b"kept" in store_command(run_dir, "GET key"), "store back")
    assert run.stop() == 0


def test_a_crash_loop_of_the_router_ends_the_deployment_visibly(start: Start, run_dir: Path) -> None:
    run = start({**ALL, "router": "loop-router"})
    assert run.end() == 1
    restarts = [int(found) for line in run.lines for found in re.findall(r"restart (\d) of 5", line)]
    assert restarts == [1, 2, 3, 4, 5]
    text = "router ended with exit code 7 and it was restarted 5 times within 60 s, which is the limit"
    assert run.lines[-1].strip() == f"elasticmoe: child_failed: {text}; its last line: gave in"
    assert text in (run_dir / "logs/failure.txt").read_text()
    assert processes_of(run_dir) == {}


@pytest.mark.slow
def test_a_crash_loop_of_another_process_ends_nothing_and_is_told(
    start: Start, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start({**ALL, "scaler": "loop-scaler", "odd": "superseded"})
    run.read(SERVING)
    pids = {name: run.pid(name) for name in ("store", "hmm", "pool", "router")}
    line = run.read("it does not stay up")
    assert "scaler ended with exit code 7" in line
    assert "the deployment goes on without it; restart 6 in all in 1.0 s; its last line: gave in" in line
    # It is down between two restarts, each of which is a second or more after its end.
    failing = wait_until(lambda: [one for one in run.record().down if one.name == "scaler" and one.is_failing], "told")
    assert failing[0].restarts >= 6

    def status() -> str:
        assert main(["status", "--run-dir", str(run_dir)]) == 0
        return " ".join(capsys.readouterr().out.split())

    wait_until(lambda: "scaler does not stay up and is tried again; the rest goes on" in status(), "status tells it")
    run.read("restart 7 in all in 2.0 s")
    # Its exits are not counted: it has more than a limit of five would let pass.
    while len(odd := [line for line in run.lines if line.startswith("odd ended")]) <= 5:
        run.read("odd ended")
    assert all("another has taken over from it" in line for line in odd)
    assert {name: run.pid(name) for name in pids} == pids
    assert httpx.get(f"{run.record().url}/ready", timeout=60, trust_env=False).status_code == 200
    assert run.stop() == 0


def test_ports_stay_ours_while_a_process_restarts_and_nobody_is_refused(start: Start) -> None:
    run = start()
    run.read(SERVING)
    record = run.record()
    for name, port in (("scaler", record.admin_port), ("router", record.port)):
        pid = run.pid(name)
        os.kill(pid, signal.SIGSTOP)  # it answers nobody, and still has a copy of the socket
        wait_until(lambda pid=pid: ") T " in Path(f"/proc/{pid}/stat").read_text(), "it has stopped")
        with socket.create_connection(("127.0.0.1", port), timeout=60) as early:
            early.sendall(b"GET /ready HTTP/1.0\r\n\r\n")
            os.kill(pid, signal.SIGKILL)
            while (name, pid) in (found := run.pids()) or name not in dict(found):
                for options in ((), (socket.SO_REUSEADDR,), (socket.SO_REUSEPORT,)):
                    with socket.socket() as thief:
                        for option in options:
                            thief.setsockopt(socket.SOL_SOCKET, option, 1)
                        with pytest.raises(OSError, match="Address already in use"):
                            thief.bind(("127.0.0.1", port))
                socket.create_connection(("127.0.0.1", port), timeout=1).close()  # nobody is refused meanwhile
                threading.Event().wait(0.01)  # nobody accepts these: many would fill the backlog
            early.settimeout(60)
            assert b" 200 " in early.recv(1000)  # asked before the death, answered after it
    assert run.stop() == 0
    for port in (record.admin_port, record.port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=1)


def test_sockets_go_to_those_that_serve_them_alone(start: Start, run_dir: Path) -> None:
    run = start()
    run.read(SERVING)
    listening = set()
    for table, state, inode in (("tcp", 3, 9), ("unix", 5, 6)):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[state] == ("0A" if table == "tcp" else "01") and (table == "tcp" or fields[3] == "00010000"):
                listening.add(f"socket:[{fields[inode]}]")

    def held(pid: int) -> int:
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        return sum(link in listening for link in links)

    # The store's own socket is its own; the stand-ins of hmm and pool make none.
    assert {name: held(run.pid(name)) for name in ALL} == {"store": 1, "hmm": 0, "pool": 0, "scaler": 2, "router": 1}
    assert held(run.record().launcher.pid) == 3
    assert stat.S_IMODE((run_dir / "sockets/admin.sock").stat().st_mode) == 0o600
    assert run.stop() == 0


def test_logs_have_a_bound_and_keep_the_last_full_one(start: Start, run_dir: Path) -> None:
    run = start({**ALL, "hmm": "chatty"}, log_bytes_max=64 * 1024)
    run.read(SERVING)
    log, old = run_dir / "logs/hmm.log", run_dir / "logs/hmm.log.1"

    def lines_of(path: Path) -> list[str]:
        """All but the last, which may be on its way; none while there is no file."""
        with suppress(FileNotFoundError):
            return path.read_text().splitlines()[:-1]
        return []

    lines = wait_until(lambda: [] if "chatty is up" in (found := lines_of(old)) else found, "rotated twice")
    lines = lines + wait_until(lambda: lines_of(log), "more lines")
    assert {line.split()[0] for line in lines} == {"line"}  # whole ones
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
    os.kill(run.pid("hmm"), signal.SIGKILL)
    assert "its last line: line " in run.read("hmm ended")
    assert run.stop() == 0


def test_no_orphan_survives_the_launchers_own_sigkill(start: Start, run_dir: Path) -> None:
    run = start({**ALL, "odd": "stubborn"})
    run.read(SERVING)

    def odd_children() -> list[int]:
        return [pid for pid, command in processes_of(run_dir).items() if "signal.signal(15, 1)" in command]

    (odd_child,) = wait_until(odd_children, "its child")
    assert len(processes_of(run_dir)) >= len(ALL) + 2  # the pool's child among them
    run.process.kill()
    run.process.wait()
    # Whoever holds no pipe of its parent and ignores SIGTERM is not ours to promise; our services have such pipes.
    wait_until(lambda: set(processes_of(run_dir)) <= {odd_child}, "no orphan", timeout_s=60.0)
    os.kill(odd_child, signal.SIGKILL)


def test_a_child_that_ignores_sigterm_is_killed_with_its_group(start: Start, run_dir: Path) -> None:
    run = start({**ALL, "hmm": "stubborn"})
    run.read(SERVING)
    started = time.monotonic()
    assert run.stop() == 0
    assert time.monotonic() - started >= 2.0
    text = "".join(run.lines)
    assert "hmm did not end within 2 s of SIGTERM; killed" in text
    assert f"logs are kept in {run_dir / 'logs'}" in text
    assert processes_of(run_dir) == {}


def test_a_second_interrupt_cuts_the_grace_short(start: Start) -> None:
    run = start({"first": "idle", "slow": "stubborn", "scaler": "scaler", "router": "router"})
    run.read(SERVING)
    run.process.send_signal(signal.SIGINT)
    run.read("stopping slow")
    run.process.send_signal(signal.SIGINT)
    assert run.end(timeout_s=30) == 0  # its grace is a minute


def test_a_second_sigterm_changes_nothing(start: Start, run_dir: Path) -> None:
    run = start({"hmm": "tidy", "scaler": "scaler", "router": "router"})
    run.read(SERVING)
    run.process.send_signal(signal.SIGTERM)
    run.read("stopping hmm")
    assert run.stop() == 0
    assert "ended with" not in "".join(run.lines)
    assert not run_dir.exists()


def test_a_run_directory_and_a_port_have_one_user(start: Start, run_dir: Path) -> None:
    run = start()
    run.read(SERVING)
    second = start(ALL)
    assert second.end() == 1
    assert "elasticmoe: already_running: run directory" in second.lines[-1]
    third = start(ALL, "--port", str(run.record().port), at=run_dir.with_name("other"))
    assert third.end() == 1
    port = run.record().port
    assert third.lines[-1].strip() == (
        f"elasticmoe: port_in_use: port {port} on 127.0.0.1 is in use; choose another with --port"
    )
    assert not run_dir.with_name("other").exists()
    assert run.stop() == 0


def test_two_deployments_run_side_by_side(start: Start, run_dir: Path) -> None:
    one, two = start(), start(ALL, at=run_dir.with_name("two"))
    one.read(SERVING)
    two.read(SERVING)
    store_command(run_dir, "SET key first")
    assert b"first" not in store_command(run_dir.with_name("two"), "GET key")
    assert one.stop() == 0
    assert all(process.is_alive() for process in two.record().processes)
    assert two.stop() == 0


def cut_off(run: Run) -> None:
    run.process.kill()
    run.process.wait()
    wait_until(lambda: not processes_of(run.run_dir), "all gone")


@pytest.fixture
def left(start: Start, run_dir: Path) -> Path:
    """A run directory whose deployment was cut off after a layout had been committed and a key been stored."""
    run = start()
    run.read(SERVING)
    store_command(run_dir, "SET key kept")
    wait_until(lambda: b"kept" in b"".join(p.read_bytes() for p in (run_dir / "store").rglob("*.aof")), "written")
    (run_dir / "state/fence-layout").write_text("3")
    cut_off(run)
    return run_dir


def test_a_cut_off_deployment_is_resumed_and_says_so(start: Start, left: Path) -> None:
    again = start()
    again.read("resuming the deployment that was cut off")
    assert "resumed: layout 3 with 2 replicas" in again.read("resumed: ")
    assert "--replicas" not in again.read(SERVING)
    assert b"kept" in store_command(left, "GET key")
    cut_off(again)
    more = start(ALL, "--replicas", "1")
    assert "--replicas 1 is ignored because of that" in more.read("--replicas")
    assert more.stop() == 0
    assert not left.exists()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--dtype", "float32"), "--dtype was bfloat16, and is float32 now"),
        (("--model", "tiny"), "--model was "),
        (("--store", "redis://127.0.0.1:{port}/0"), "--store was the embedded one, and is redis://127.0.0.1:"),
    ],
)
def test_what_was_cut_off_is_not_dropped_unless_asked_for(
    start: Start, left: Path, external_store: str, flags: tuple[str, ...], text: str
) -> None:
    flags = tuple(external_store if flag.startswith("redis:") else flag for flag in flags)
    refused = start(ALL, *flags)
    assert refused.end() == 1
    last = refused.lines[-1]
    assert last.startswith("elasticmoe: state_differs: ")
    assert text in last
    assert "Start with its settings to resume it, or with --fresh to begin anew" in last
    fresh = start(ALL, *flags, "--fresh")
    fresh.read("beginning anew")
    fresh.read(SERVING)
    assert (left / "state/fence-layout").read_text() == "3"  # for the scaler, which begins above it
    assert (left / "state/fresh").exists()
    assert fresh.stop() == 0
    assert not left.exists()


@pytest.mark.parametrize("how", ["older", "damaged"])
def test_what_another_version_or_a_broken_disk_left_is_not_dropped_either(start: Start, left: Path, how: str) -> None:
    path = left / "deployment.json"
    record = json.loads(path.read_text())
    del record["state_format"]
    path.write_text(json.dumps(record) if how == "older" else "{")
    refused = start()
    assert refused.end() == 1
    code = "state_differs" if how == "older" else "damaged_record"
    assert refused.lines[-1].startswith(f"elasticmoe: {code}: ")
    assert "--fresh" in refused.lines[-1]
    fresh = start(ALL, "--fresh")
    fresh.read(SERVING)
    assert (left / "state/fence-layout").read_text() == "3"
    assert fresh.stop() == 0


def test_a_start_that_fails_drops_nothing_that_was_left(start: Start, left: Path) -> None:
    failed = start({**ALL, "hmm": "exit"})
    assert failed.end() == 1
    assert "`elasticmoe up` goes on, `down` drops them" in "".join(failed.lines)
    stopped = start({**ALL, "scaler": "never"})
    stopped.read("loading")
    assert stopped.stop() == 0
    again = start()
    again.read("resuming the deployment that was cut off")
    again.read(SERVING)
    assert b"kept" in store_command(left, "GET key")
    assert again.stop() == 0


def test_a_first_start_that_was_cut_off_asks_for_nothing(start: Start, run_dir: Path) -> None:
    run = start({**ALL, "scaler": "never"})
    run.read("loading")
    cut_off(run)
    other = start(ALL, "--dtype", "float32")
    other.read(SERVING)
    assert "resum" not in "".join(other.lines)
    assert other.stop() == 0


def test_down_stops_and_says_when_nothing_runs(start: Start, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start()
    run.read(SERVING)
    assert main(["down", "--run-dir", str(run_dir)]) == 0
    assert run.end() == 0
    stopping, stopped = capsys.readouterr().out.splitlines()
    assert stopping == f"stopping oracle in {run_dir}"
    assert re.fullmatch(r"stopped in \d+\.\d s", stopped)
    assert main(["down", "--run-dir", str(run_dir)]) == 0
    assert f"nothing runs in {run_dir}" in capsys.readouterr().out


def test_down_after_a_kill_clears_what_was_left(
    start: Start, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start()
    run.read(SERVING)
    run.process.kill()
    run.process.wait()
    wait_until(lambda: not processes_of(run_dir), "all gone")
    assert main(["down", "--run-dir", str(run_dir)]) == 0
    assert "what an earlier run left was removed" in capsys.readouterr().out
    assert sorted(path.name for path in run_dir.iterdir()) == ["launcher.lock", "logs"]


@pytest.fixture
def external_store(tmp_path: Path) -> Iterator[str]:
    """The URL of a Valkey server that the test runs itself."""
    port = free_port()
    command = [server_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_until(lambda: _connects(port), "the server listens")
    yield f"redis://127.0.0.1:{port}/0"
    server.terminate()
    server.wait(60)


def _connects(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def test_an_external_store_is_not_started(start: Start, run_dir: Path, external_store: str) -> None:
    run = start({"scaler": "scaler", "router": "router"}, "--store", external_store)
    run.read(SERVING)
    environment = Path(f"/proc/{run.pid('scaler')}/environ").read_bytes().split(b"\0")
    settings = dict(entry.split(b"=", 1) for entry in environment if entry.startswith(b"ELASTICMOE_"))
    assert settings[b"ELASTICMOE_STORE_URL"].startswith(b"redis://")
    assert settings[b"ELASTICMOE_DEPLOYMENT"].startswith(b"run-")
    assert run.stop() == 0

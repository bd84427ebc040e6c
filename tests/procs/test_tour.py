"""`elasticmoe tour` to its end, interrupted, and given too little time: whatever happens, nothing is left of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

WAIT_S = 120.0  # of one of its waits
TOUR_S = 350.0
STREAM_TOKENS_MIN = 48


class Tourist:
    """A tour in a temporary folder of its own, with a model whose steps take as long on every machine."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder / "tmp"
        self.folder.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "elasticmoe.cli.main", "tour", "--model", "oracle-paced", *flags],
            env=os.environ | {"ELASTICMOE_HOME": str(folder / "home"), "TMPDIR": str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def read_until(self, words: str) -> list[str]:
        """Its lines up to the first one with `words`."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if words in line:
                return lines
        raise AssertionError(f"no {words!r} in {lines}")

    def processes(self) -> list[int]:
        """All that was started for it: its folder is in their environment."""
        mark, found = os.fsencode(self.folder), []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if mark in (entry / "environ").read_bytes() and (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended meanwhile, or it is somebody else's
        return found

    def end(self) -> tuple[int, str, str]:
        """Exit status and the rest of its output, when nothing is left of it."""
        out, err = self.process.communicate(timeout=TOUR_S)
        assert self.processes() == []
        assert list(self.folder.iterdir()) == []
        return self.process.returncode, out, err

    def close(self) -> None:
        """End what a failed test has left."""
        self.process.kill()
        self.process.communicate()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.processes(), "no process of the tour")


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="em-"))  # short: socket paths have a limit
    yield made
    shutil.rmtree(made)


def test_a_tour_grows_loses_a_rank_and_shrinks_and_no_stream_is_lost(folder: Path) -> None:
    tour = Tourist(folder, "--json", "--timeout", f"{WAIT_S:g}s")
    try:
        status, out, err = tour.end()
    finally:
        tour.close()
    assert status == 0, err
    told = json.loads(out)
    quiet, growth, kill, shrink, streams = (told[name] for name in ("quiet", "growth", "kill", "shrink", "streams"))
    assert 0 < quiet["alone_ms"] < quiet["objective_ms"] < quiet["together_ms"]
    assert (growth["replicas_before"], growth["replicas_after"]) == (1, 2)
    assert (shrink["replicas_before"], shrink["replicas_after"]) == (2, 1)
    assert "should grow" in growth["reason"] or "load grows" in growth["reason"]
    assert shrink["reason"] == "fewer replicas would do as well"
    assert min(change[name] for change in (growth, shrink) for name in ("took_s", "gap_ms")) > 0
    assert growth["took_s"] < WAIT_S, "the time to capacity"
    assert kill["rank"].startswith("r")
    assert kill["gap_ms"] >= quiet["alone_ms"], "all ranks step together, so all streams waited"
    assert 0 < kill["back_s"] < WAIT_S
    assert (streams["lost"], streams["wrong"]) == ({}, 0)
    assert streams["whole"] > quiet["streams"]
    assert streams["tokens"] >= STREAM_TOKENS_MIN * streams["whole"]


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_tour_that_is_interrupted_leaves_nothing(folder: Path, by: signal.Signals) -> None:
    tour = Tourist(folder)
    try:
        lines = tour.read_until("prompts are answered")
        assert any("Watch it in a browser: http://127.0.0.1:" in line for line in lines)
        assert tour.processes()
        tour.process.send_signal(by)
        tour.process.send_signal(by)  # who is impatient does not keep it from clearing away
        status, _, err = tour.end()
    finally:
        tour.close()
    assert (status, err) == (128 + signal.SIGINT, "elasticmoe: interrupted\n")


def test_what_does_not_happen_in_time_is_told_in_a_sentence(folder: Path) -> None:
    tour = Tourist(folder, "--timeout", "100ms")
    try:
        status, out, err = tour.end()
    finally:
        tour.close()
    assert status == 1, out
    assert err == "elasticmoe: tour_failed: the deployment was not ready within 0.1 s\n"

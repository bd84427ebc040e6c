"""Signals that end a process as a descriptor: a wait ends with them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from elasticmoe.common.stop_signals import StopSignals

# Waits for a minute where nothing else wakes it, and says how it ended.
_WAITER = """
import select, signal, sys
from elasticmoe.common.stop_signals import StopSignals
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[1] == "ignored" else signal.SIG_DFL)
told = []
signals = StopSignals(lambda: told.append("told"))
signals.listen()
poller = select.poll()
poller.register(signals.fileno(), select.POLLIN)
print("waits", flush=True)
print(bool(poller.poll(60_000)), told, flush=True)
signals.close()
signals.close()
"""


def waiter(how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", _WAITER, how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    return process


def test_each_ends_a_wait_and_is_told() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        process = waiter("")
        process.send_signal(number)
        assert process.communicate(timeout=30)[0] == "True ['told']\n"
        assert process.returncode == 0


def test_one_that_is_ignored_stays_so() -> None:
    """Ctrl-C reaches all processes of a terminal, and is the launcher's to translate."""
    process = waiter("ignored")
    status = Path(f"/proc/{process.pid}/status").read_text()
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    assert ignored >> (signal.SIGINT - 1) & 1
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "True ['told']\n"


def test_it_leaves_nothing_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    signals = StopSignals(lambda: None)
    assert signals.fileno() == -1
    signals.close()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        signals.listen()
        assert not select.select([signals.fileno()], [], [], 0)[0]
    finally:
        signals.close()
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
    assert len(os.listdir("/proc/self/fd")) == before

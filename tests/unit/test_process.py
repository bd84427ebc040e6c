"""How a process of a service ends."""

from __future__ import annotations

import subprocess
import sys

# A thread that a disk holds up, say, and something to be taken down that must not cost time.
_LEAVES = """
import sys, threading, time
from elasticmoe.common.process import leave
threading.Thread(target=time.sleep, args=(3600,)).start()
print("said", end="")
print("complained", end="", file=sys.stderr)
leave(7)
"""


def test_it_ends_with_its_status_and_what_was_printed_whatever_a_thread_waits_for() -> None:
    done = subprocess.run([sys.executable, "-c", _LEAVES], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (7, "said", "complained")

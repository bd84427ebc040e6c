"""What the fork server imports before it forks the first standby: everything that is slow to import.

What has been imported is then frozen: the garbage collector of a forked process would otherwise walk all of it, and so
copy every page that is shared with the fork server. That took 130 ms of CPU in the midst of an attach that takes 15.

The fork server dies with the pool: without that it takes seconds to notice, and longer to unload.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal

import services.worker.rank  # noqa: F401 - imported for the processes that are forked from here

gc.collect()
gc.freeze()

_PR_SET_PDEATHSIG = 1
_pool = os.getppid()
ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() != _pool:  # it died before the kernel was told
    os._exit(1)

"""What the fork server imports before it forks the first standby: everything that is slow to import.

What has been imported is then frozen: the garbage collector of a forked process would otherwise walk all of it, and so
copy every page that is shared with the fork server. That took 130 ms of CPU in the midst of an attach that takes 15.
"""

from __future__ import annotations

import gc

import services.worker.rank  # noqa: F401 - imported for the processes that are forked from here

gc.collect()
gc.freeze()

"""Every Python process that has this folder on its path has accelerators of the kind STANDIN_KIND on the stand-in of
their driver, by a library of its own in STANDIN_FOLDER. They go by their real names (`npu:0`), and as `host:N` too, for
tests of services that name those."""

from __future__ import annotations

import os
from pathlib import Path

from elasticmoe.common.devices.factory import register
from tests.devices.standins import process

backend = process(os.environ["STANDIN_KIND"], Path(os.environ["STANDIN_FOLDER"]))
for name in ("host", os.environ["STANDIN_KIND"]):
    register(name, backend)

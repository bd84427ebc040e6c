"""Every Python process that has this folder on its path has accelerators of the kind STANDIN_KIND on the stand-in of
their driver, by a library of its own in STANDIN_FOLDER. They go by their real names (`npu:0`); where STANDIN_NAME says
so, as devices of that backend instead."""

from __future__ import annotations

import os
from pathlib import Path

from elasticmoe.common.devices.factory import register
from tests.devices.standins import process

kind = os.environ["STANDIN_KIND"]
register(os.environ.get("STANDIN_NAME", kind), process(kind, Path(os.environ["STANDIN_FOLDER"])))

"""Every Python process that has this folder on its path has, as `host:N`, accelerators on the stand-in of their driver:
of the kind STANDIN_KIND, by a library of its own in STANDIN_FOLDER."""

from __future__ import annotations

import os
from pathlib import Path

from elasticmoe.common.devices.factory import register
from tests.devices.standins import process

register("host", process(os.environ["STANDIN_KIND"], Path(os.environ["STANDIN_FOLDER"])))

"""Every Python process that has this folder on its path has accelerators of the kind STANDIN_KIND on the stand-in of
their driver, by a library of its own in STANDIN_FOLDER. They go by their real names (`npu:0`); where STANDIN_NAME says
so, as devices of that backend instead.

Where STANDIN_OPERATORS is set, torch has the operators of NPUs, for CPUs: in processes that import what calls them, as
torch itself would take a second of every other process's start."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

from elasticmoe.common.devices.factory import register
from tests.devices.standins import process

CALLER = "elasticmoe.services.worker.backends.accelerator.npu_kernels.kernel_set"

kind = os.environ["STANDIN_KIND"]
register(os.environ.get("STANDIN_NAME", kind), process(kind, Path(os.environ["STANDIN_FOLDER"])))


class Operators(MetaPathFinder):
    """Finds nothing. `kept`: the operators, once they are there."""

    kept: Any = None

    def find_spec(self, name: str, _: Sequence[str] | None, __: Any = None) -> None:
        """Called for every module that is imported for the first time."""
        if name == CALLER and self.kept is None:
            from tests.devices import npu_operators

            self.kept = npu_operators.define()


if "STANDIN_OPERATORS" in os.environ:
    sys.meta_path.insert(0, Operators())

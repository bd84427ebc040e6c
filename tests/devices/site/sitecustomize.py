"""Every Python process that has this folder on its path knows the second device backend, as `host:N`."""

from __future__ import annotations

from elasticmoe.common.devices.factory import register
from tests.devices.strict import StrictDevice

register("host", StrictDevice)

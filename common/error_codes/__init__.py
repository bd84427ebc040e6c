"""Every error code of the product: what it means, what to do, its HTTP status, and whether to try again.

A code is part of the interface: it stays what it is, and no error has one that is not listed here
(`tests/unit/test_error_codes.py` looks at every place that raises one). `docs/reference/errors.md` is made from these.
"""

from __future__ import annotations

from elasticmoe.common.error_codes.clients import CLIENTS
from elasticmoe.common.error_codes.code import Code as Code
from elasticmoe.common.error_codes.commands import COMMANDS
from elasticmoe.common.error_codes.devices import DEVICES
from elasticmoe.common.error_codes.internal import INTERNAL
from elasticmoe.common.error_codes.operators import OPERATORS
from elasticmoe.common.error_codes.start import START

# By who meets them first; a code stands in one group.
GROUPS: dict[str, dict[str, Code]] = {
    "Answers of the router and of both listeners": CLIENTS,
    "Answers of the admin API, and ends of operations": OPERATORS,
    "Starting a deployment, and its store and disk": START,
    "Commands": COMMANDS,
    "Between processes: in logs, and in reasons": INTERNAL,
    "Devices: a rule of their memory was broken, or a call failed": DEVICES,
}
CODES: dict[str, Code] = {name: code for group in GROUPS.values() for name, code in group.items()}

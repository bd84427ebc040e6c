"""Performance modes: settings that go together, for all services alike. A mode is what holds where nobody has set them.

`balanced` is every setting's own default: replicas whose cores nobody else uses, short steps, activations of float32.
`throughput` gives up what costs speed on a machine of CPUs (docs/adr/0047-performance-modes.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from elasticmoe.common.machine import multiplies_bfloat16

BALANCED: Final = "balanced"
THROUGHPUT: Final = "throughput"
_STEP_TOKENS: Final = 512


def defaults_of(given: Mapping[str, Any], *, has_products: bool | None = None) -> dict[str, Any]:
    """What the mode that `given` names sets, by setting, where `given` does not; nothing in another mode, or for a name
    that is none, which is refused where it is read. `has_products`: of bfloat16 pairs, in this machine's processors;
    None: ask it."""
    if given.get("performance_mode", BALANCED) != THROUGHPUT:
        return {}
    values: dict[str, Any] = {"max_tokens_per_step": _STEP_TOKENS}
    if str(given.get("devices", "host")).startswith("host"):
        values["replicas"] = 1
        if given.get("compute", "auto") in ("auto", "host"):  # others have one thread, and do not gain by rounding
            values |= {} if _is_true(given.get("pin_cores", False)) else {"share_cores": True}
            is_bfloat16 = given.get("dtype", "bfloat16") == "bfloat16"
            if is_bfloat16 and (multiplies_bfloat16() if has_products is None else has_products):
                values["activations"] = "bfloat16"
    return {name: value for name, value in values.items() if name not in given}


def _is_true(value: object) -> bool:
    """Whether a flag that stands in a file or the environment is set, however it is spelt there."""
    return value is True or str(value).lower() in ("true", "1")

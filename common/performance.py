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
        values |= {"replicas": 1, "share_cores": True}
        if _may_round(given) and (multiplies_bfloat16() if has_products is None else has_products):
            values["activations"] = "bfloat16"
    return {name: value for name, value in values.items() if name not in given}


def _may_round(given: Mapping[str, Any]) -> bool:
    """Whether weights are bfloat16, and multiplied by kernels that gain by rounded activations."""
    return given.get("dtype", "bfloat16") == "bfloat16" and given.get("compute", "auto") in ("auto", "host")

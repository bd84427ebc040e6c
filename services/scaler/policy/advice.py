"""What stands of an advice, in the mode `advise`: whoever follows it, soon or late, must not be sent to and fro. Pure.

An order is carried out at once, and what it changes ends what it was given for; advice is followed by others in their
own time, and not at all. So one to grow stands for as long as a growth would be held, and one to shrink that is taken
back is not given again for as long.
"""

from __future__ import annotations

import msgspec

from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.state import AdvisedSize, Decision, Reason

_replace = msgspec.structs.replace


def standing(config: PolicyConfig, decision: Decision, width: int, bounds: range, now: float) -> Decision:
    """The decision of a turn at `width` with what stands of earlier advice: nothing that is out of `bounds` now."""
    state, target = decision.state, decision.target
    before = state.advice if state.advice is not None and state.advice.target in bounds else None
    if config.mode != "advise":
        return decision if state.advice is None else _replace(decision, state=_replace(state, advice=None))
    if decision.reason in (Reason.OPERATION, Reason.CANCEL_STUCK, Reason.RECOVERING):
        return decision
    if before is not None and before.target > width and now - before.at_s < (state.hold_s or config.hold_s):
        if target is None or target < before.target:
            reason = decision.reason if decision.reason in (Reason.UNKNOWN, Reason.BLIND) else Reason.ADVISED
            return _replace(decision, target=before.target, reason=reason)
    elif before is not None and before.target < width and (target is None or target > width):
        state = _replace(state, withdrawn_s=now)
    advice = None if target is None else AdvisedSize(target, now)
    return _replace(decision, state=_replace(state, advice=advice))

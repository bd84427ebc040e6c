"""From the HMM's commit until all ranks have flipped: there is only forward. Pure."""

from __future__ import annotations

import msgspec

from elasticmoe.common.protocol.scaler import TransitionStatus
from elasticmoe.services.scaler.observation import Step
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.operation.steps import enter, progressed, stay


def cut_over(operation: Operation, transition: TransitionStatus) -> Step[Operation]:
    """The HMM has committed: wait until all ranks have flipped, and count how long it took."""
    if operation.phase == "prepare":  # the commit was sent by this scaler's predecessor, or crossed an abort
        operation = progressed(operation, committed_s=operation.elapsed_s)
        return enter(operation, "commit", "the HMM has committed", error=None)
    since_s = operation.progress.committed_s
    if since_s is None:
        since_s = operation.elapsed_s
        operation = progressed(operation, committed_s=since_s)
    if transition.phase == "committed":
        return stay(operation, "the ranks flip")
    figures = operation.accounting.figures
    flip_s = max(figures.flip_s_max or 0.0, operation.elapsed_s - since_s)
    capacity_s = figures.capacity_s
    if capacity_s is None and operation.current_leg().joining:
        capacity_s = operation.elapsed_s
    figures = msgspec.structs.replace(figures, flip_s_max=flip_s, capacity_s=capacity_s)
    accounting = msgspec.structs.replace(operation.accounting, figures=figures)
    operation = msgspec.structs.replace(operation, accounting=accounting)
    return enter(flipped(operation), "migrate", "all ranks flipped")


def flipped(operation: Operation) -> Operation:
    """With the time at which that was seen."""
    return progressed(operation, flipped_s=operation.elapsed_s)

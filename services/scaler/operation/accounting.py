"""What an operation has cost, counted from what is seen. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from elasticmoe.common.protocol.scaler import RankLoad
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.operation.operation import Accounting, Operation

RANKS_COUNTED_MAX = 256


def count(operation: Operation, cluster: Cluster, loads: Mapping[int, RankLoad], now: float) -> Operation:
    """Add the time since the last count, and take over what the HMM and the ranks tell."""
    passed_s = max(0.0, now - operation.clock) if operation.clock is not None else 0.0
    elapsed_s = operation.elapsed_s + passed_s
    accounting = operation.accounting
    handed_over = dict(accounting.handed_over)
    for load in loads.values():
        first = handed_over.get(load.incarnation, (load.handed_over, 0))[0]
        if load.incarnation in handed_over or len(handed_over) < RANKS_COUNTED_MAX:
            handed_over[load.incarnation] = (first, load.handed_over)
    figures = msgspec.structs.replace(
        accounting.figures, sequences_moved=sum(last - first for first, last in handed_over.values())
    )
    bytes_prior, bytes_of = accounting.bytes_prior, accounting.bytes_of
    if cluster.phase is not None:
        # Of a block all ranks of a replica have a part, and they have as many.
        blocks = sum(device.kv_blocks for device in cluster.devices) // cluster.in_force.layout.tp
        before = blocks if figures.kv_blocks_before is None else figures.kv_blocks_before
        figures = msgspec.structs.replace(figures, kv_blocks_before=before, kv_blocks_after=blocks)
    transition = cluster.transition
    if transition is not None and transition.id.op == operation.op_id:
        if bytes_of is not None and bytes_of[0] != transition.id:
            bytes_prior += bytes_of[1]
        bytes_of = (transition.id, transition.bytes_done)
        peak = dict(figures.peak_bytes)
        for device, nbytes in transition.peak_pages.items():
            peak[device] = max(peak.get(device, 0), nbytes)
        total = max(figures.peak_bytes_total, sum(transition.peak_pages.values()))
        figures = msgspec.structs.replace(
            figures, peak_bytes=peak, peak_bytes_total=total, bytes_copied=bytes_prior + bytes_of[1]
        )
    return msgspec.structs.replace(
        operation,
        clock=now,
        elapsed_s=elapsed_s,
        phase_s=operation.phase_s + passed_s,
        is_late=operation.is_late or elapsed_s > operation.deadline_s,
        accounting=Accounting(
            timings=accounting.timings,
            bytes_prior=bytes_prior,
            bytes_of=bytes_of,
            handed_over=handed_over,
            figures=figures,
        ),
    )

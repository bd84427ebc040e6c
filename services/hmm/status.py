"""What the HMM tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from elasticmoe.common.capacity import needs_of
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import DeviceStatus, HmmStatus, MemoryFacts
from elasticmoe.services.hmm.loading.loader import ModelLoad
from elasticmoe.services.hmm.memory.holdings import Holdings
from elasticmoe.services.hmm.sessions.attachments import Attachments
from elasticmoe.services.hmm.sessions.membership import Membership, slots_of_mask
from elasticmoe.services.hmm.transition.transition import Transitions


class Loading:
    """The latest load of this process, also when it is over; `error` where it failed."""

    def __init__(
        self, load: ModelLoad | None = None, *, is_at_work: bool = False, error: Refused | None = None
    ) -> None:
        self.load = load
        self.is_at_work = is_at_work
        self.error = error

    def op_id(self, holdings: Holdings) -> str | None:
        """Of this load, or of a predecessor's."""
        if self.load is not None:
            return self.load.request.op_id
        return holdings.loaded.load.op_id if holdings.loaded else None

    def phase(self, holdings: Holdings) -> Literal["empty", "loading", "ready", "failed"]:
        """As HmmStatus has it."""
        if self.is_at_work:
            return "loading"
        if holdings.loaded is not None:
            return "ready"
        return "failed" if self.error is not None else "empty"


def hmm_status(
    holdings: Holdings,
    attachments: Attachments,
    members: Membership,
    loading: Loading,
    transitions: Transitions,
    large_pages: Mapping[str, int],
    num_fenced: int = 0,
) -> HmmStatus:
    """The answer to GetHmmStatus. `large_pages`: bytes in them, by device; `num_fenced`: commands that
    were refused as superseded."""
    load = loading.load
    # Before the members: ranks may flip in between, and whoever reads that they have must read the new members.
    transition = transitions.status()
    generation, mask, is_running, _ = members.current()
    return HmmStatus(
        phase=loading.phase(holdings),
        bytes_done=load.bytes_done if load else 0,
        bytes_total=load.bytes_total if load else 0,
        error=loading.error,
        devices=tuple(_device_status(name, holdings, attachments, members, large_pages) for name in holdings.memories),
        generation=generation,
        members=slots_of_mask(mask),
        running=is_running,
        op_id=loading.op_id(holdings),
        layout=holdings.loaded.layout if holdings.loaded else None,
        memory=_memory_facts(holdings),
        transition=transition,
        num_fenced=num_fenced,
    )


def _memory_facts(holdings: Holdings) -> MemoryFacts | None:
    loaded = holdings.loaded
    if loaded is None:
        return None
    needs = needs_of(loaded.load, loaded.spec, loaded.kv, holdings.granularity)
    return MemoryFacts(
        granularity=holdings.granularity,
        kv=loaded.kv,
        footprint=loaded.footprint,
        ledger=needs.ledger,
        kv_handles_min=needs.kv_handles_min,
        kv_handles_load=loaded.kv_handles,
        mailbox=needs.mailbox,
    )


def _device_status(
    name: str, holdings: Holdings, attachments: Attachments, members: Membership, large_pages: Mapping[str, int]
) -> DeviceStatus:
    memory, loaded = holdings.memories[name], holdings.loaded
    attached = next((one for one in attachments.by_slot.values() if one.device == name), None)
    used, ledger = dict(memory.device.used), memory.ledger
    other = ledger.nbytes if ledger is not None else 0
    num_experts, num_blocks = 0, 0
    if loaded is not None:  # else the load's thread may be at work on these
        num_experts = sum(key.kind == "expert" for key in memory.records)
        num_blocks = len(memory.kv) * loaded.kv.blocks_per_handle
    return DeviceStatus(
        device=name,
        budget=memory.device.budget,
        weights=used["weights"],
        kv=used["kv"],
        other=used["mailbox"] + other,
        free=memory.device.budget - sum(used.values()) - other,
        num_experts=num_experts,
        kv_blocks=num_blocks,
        attached=attached.incarnation if attached else None,
        pages=memory.device.pages,
        progress=members.progress(attached.slot) if attached else 0,
        is_waiting=attached is not None and members.is_waiting_for_device(attached.slot),
        total=holdings.told[name].total if name in holdings.told else 0,
        large_pages=min(large_pages.get(name, 0), used["weights"] + used["kv"]),  # some may have gone since
        failure=memory.device.failure,
    )

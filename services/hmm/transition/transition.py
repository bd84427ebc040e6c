"""The HMM's part of a transition: it brings memory from one layout's to the next one's, forward or back.

What the transition is, and how far it has come, is in the catalog and so survives the HMM; what is missing is found
anew in every turn by comparing what is held with what is wanted. `advance` takes one turn and never waits: ranks answer
on the handle channel, and threads make pages and give them back. The catalog names handles only while they are whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from operator import attrgetter
from typing import Final

import msgspec

from elasticmoe.common.capacity import sizes_of
from elasticmoe.common.clock import Clock
from elasticmoe.common.devices.base import Handle
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.layout import Layout
from elasticmoe.common.protocol.errors import Conflict, ElasticMoEError, NotFound
from elasticmoe.common.protocol.hmm import StageLayout
from elasticmoe.common.protocol.ids import TransitionId
from elasticmoe.common.protocol.replies import Refused, refusal
from elasticmoe.common.protocol.scaler import TransitionStatus
from elasticmoe.common.telemetry import Logger
from elasticmoe.services.hmm.memory.blocks import BlockCopies
from elasticmoe.services.hmm.memory.catalog import Loaded, Phase, Transition, keys_of
from elasticmoe.services.hmm.memory.holdings import Holdings
from elasticmoe.services.hmm.memory.memory import DeviceMemory
from elasticmoe.services.hmm.memory.transfer import Supply
from elasticmoe.services.hmm.sessions.attachments import Attached, Attachments
from elasticmoe.services.hmm.sessions.handles import seat_memory, wanted_view
from elasticmoe.services.hmm.sessions.membership import Membership
from elasticmoe.services.hmm.transition.staging import check_stage

_RESUME_S: Final = 5.0  # after a start, or its connection's end: a living rank has introduced itself by then


class Transitions:
    """The one transition at a time. Belongs to the service's loop."""

    def __init__(
        self,
        holdings: Holdings,
        attachments: Attachments,
        members: Membership,
        copies: BlockCopies,
        supply: Supply,
        log: Logger,
        clock: Clock,
    ) -> None:
        self._holdings = holdings
        self._attachments = attachments
        self._members = members
        self._copies = copies
        self._supply = supply
        self._log = log
        self._clock = clock
        self._version = 0  # of what ranks shall have: grows when any of it changes
        self._growth_error: ElasticMoEError | None = None  # why KV could not be made again
        self._unseen: set[int] = set()  # slots whose rank may live, but has not resumed
        self._ended_at: dict[int, float] = {}  # slot -> when its rank's connection ended; it has not resumed since
        self._resume_until = 0.0
        self._is_flip_logged = False

    # ---- Life

    def adopt(self) -> None:
        """Go on after a restart, with what the catalog says."""
        transition, loaded = self._holdings.transition, self._holdings.loaded
        if loaded is None:
            return
        self._unseen = set(self._holdings.doorbells)
        self._resume_until = self._clock.monotonic() + _RESUME_S
        if transition is None:
            return
        self._supply.begin(transition.peak_pages)
        if transition.phase in ("vacating", "copying"):
            error = Refused("interrupted", f"the HMM ended while operation {transition.request.id} was staged")
            self._enter("failed", error)

    def stop(self) -> None:
        """Let threads end soon: the process does."""
        self._supply.stop()

    def on_attach(self, slot: int) -> None:
        """A rank has attached or resumed."""
        self._forget_ends((slot,))

    def _forget_ends(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._unseen.discard(slot)
            self._ended_at.pop(slot, None)

    def on_detach(self, slot: int) -> None:
        """A rank's connection has ended. A rank that fails in a step ends it to end the generation, and resumes."""
        self._ended_at[slot] = self._clock.monotonic()

    # ---- Commands

    def stage(self, request: StageLayout) -> None:
        """StageLayout. Raises what check_stage raises, and Conflict while another transition is under way."""
        holdings, current = self._holdings, self._holdings.transition
        loaded = holdings.loaded
        if loaded is None:
            raise Conflict("no model is ready", code="not_ready")
        if current is not None and current.request.id == request.id:
            return
        if current is not None and not current.is_over:
            raise Conflict(f"operation {current.request.id} is {current.phase}", code="in_transition")
        failpoint("hmm.stage")
        check_stage(holdings.catalog(), loaded, request, self._members.max_ranks)
        holdings.open_layout(request.layout)
        before = {seat.device: len(holdings.memories[seat.device].kv) for seat in loaded.layout.seats}
        self._supply.begin()
        sizes = sizes_of(loaded.spec, holdings.granularity)
        bytes_total = sum(sizes.of(copy.key) for copy in request.copies)
        holdings.transition = Transition(request, loaded.layout, before, "vacating", bytes_total=bytes_total)
        self._is_flip_logged = False
        error = self._supply.lacking_access(request.layout, loaded)  # before a rank is told to give KV away
        self._enter("failed" if error else "vacating", refusal(error) if error else None)
        self.advance()

    def commit(self, transition_id: TransitionId) -> None:
        """CommitLayout. Raises Conflict `not_prepared` with what is missing."""
        transition = self._named(transition_id)
        if transition.phase in ("committed", "releasing", "released"):
            return
        if transition.phase in ("aborting", "aborted"):
            raise Conflict(f"operation {transition_id} is {transition.phase}", code="aborted")
        if transition.phase != "staged":
            raise Conflict(f"operation {transition_id} is {transition.phase}", code="not_prepared")
        missing = sorted(set(transition.after.slots) - set(self._prepared()))
        if missing:
            raise Conflict(f"slot {missing[0]} has no rank that has mapped everything", code="not_prepared")
        loaded = self._holdings.loaded
        assert loaded is not None, "a transition is of a loaded model"
        self._holdings.loaded = msgspec.structs.replace(loaded, layout=transition.after)
        self._enter("committed")
        self._members.stage(transition.after)

    def release(self, transition_id: TransitionId, gone: tuple[int, ...] = ()) -> None:
        """ReleaseLayout. Raises Conflict `not_flipped`."""
        transition = self._named(transition_id)
        self._forget_ends(gone)
        if transition.phase in ("releasing", "released"):
            return
        if transition.phase != "committed" or not self._members.has_flipped(transition.after):
            raise Conflict(f"operation {transition_id} is {transition.phase}, and not flipped", code="not_flipped")
        self._growth_error = None
        self._enter("releasing")
        self.advance()

    def abort(self, transition_id: TransitionId, gone: tuple[int, ...] = ()) -> None:
        """AbortLayout. Raises Conflict `committed` or `still_attached`."""
        transition = self._named(transition_id)
        self._forget_ends(gone)
        if transition.phase in ("aborting", "aborted"):
            return
        if transition.phase in ("committed", "releasing", "released"):
            raise Conflict(f"operation {transition_id} is committed: there is only forward", code="committed")
        joining = set(transition.after.slots) - set(transition.before.slots)
        attached = sorted(joining & set(self._attachments.by_slot))
        if attached:
            raise Conflict(f"slot {attached[0]} is new, and a rank is attached there", code="still_attached")
        self.stop()
        self._growth_error = None
        self._enter("aborting")
        self.advance()

    def _named(self, transition_id: TransitionId) -> Transition:
        transition = self._holdings.transition
        if transition is None or transition.request.id != transition_id:
            latest = str(transition.request.id) if transition is not None else "none"
            raise NotFound(f"operation {transition_id} is not known; the latest is {latest}")
        return transition

    # ---- Status

    def status(self) -> TransitionStatus | None:
        """The latest transition."""
        transition = self._holdings.transition
        if transition is None:
            return None
        return TransitionStatus(
            id=transition.request.id,
            epoch=transition.after.epoch,
            phase="flipped" if self._is_flipped(transition) else transition.phase,
            prepared=self._prepared(),
            bytes_done=self._supply.bytes_copied if transition.phase == "copying" else transition.bytes_done,
            bytes_total=transition.bytes_total,
            peak_pages=dict(self._supply.peaks.by_device),
            error=transition.error,
        )

    def _is_flipped(self, transition: Transition) -> bool:
        is_flipped = transition.phase == "committed" and self._members.has_flipped(transition.after)
        if is_flipped and not self._is_flip_logged:
            self._is_flip_logged = True
            self._log.info("transition", **transition.names, phase="flipped")
        return is_flipped

    def _prepared(self) -> tuple[int, ...]:
        return tuple(slot for slot, one in sorted(self._attachments.by_slot.items()) if self._is_settled(one))

    def _is_settled(self, attached: Attached) -> bool:
        return attached.version == self._version and attached.applied == attached.sent.revision

    # ---- Turns

    def advance(self) -> None:
        """Do what can be done now, without waiting. Called in every turn of the loop."""
        while True:
            self._tell()
            transition, loaded = self._holdings.transition, self._holdings.loaded
            if transition is None or loaded is None or not self._step(transition, loaded):
                return

    def _step(self, transition: Transition, loaded: Loaded) -> bool:
        """One step; whether there may be another one at once."""
        if transition.phase == "vacating":
            return self._vacate(transition, loaded)
        if transition.phase == "committed":
            is_whole = set(transition.after.slots) <= set(self._attachments.by_slot)
            if not self._is_flipped(transition) and is_whole:
                self._members.stage(transition.after)  # again, where a restart came in between
            return False
        if transition.phase == "releasing":
            return self._retreat(transition, transition.after, transition.request.kv_handles_after, "released")
        if transition.phase == "aborting":
            return self._retreat(transition, transition.before, transition.kv_before, "aborted")
        return False

    def _enter(self, phase: Phase, error: Refused | None = None) -> None:
        """Begin a phase, durably."""
        transition = self._holdings.transition
        assert transition is not None, "there is one to change"
        self._holdings.transition = msgspec.structs.replace(
            transition, phase=phase, peak_pages=dict(self._supply.peaks.by_device), error=error or transition.error
        )
        failpoint(f"hmm.{phase}.before")
        self._changed()
        failpoint(f"hmm.{phase}.after")
        self._log.info(
            "transition",
            **transition.names,
            layout_epoch=transition.after.epoch,
            phase=phase,
            **({"code": error.code, "reason": error.message} if error else {}),
        )

    def _changed(self) -> None:
        """The catalog is another one now."""
        self._version += 1
        self._holdings.write()

    def _tell(self) -> None:
        """Send every rank what it shall have, where that has changed."""
        loaded, transition = self._holdings.loaded, self._holdings.transition
        for attached in self._attachments.by_slot.values():
            if attached.version == self._version or loaded is None:
                continue
            memory = self._holdings.memories[attached.device]
            view = wanted_view(memory, loaded, transition)
            if view is not None:
                self._attachments.share(attached, partial(seat_memory, view, memory, self._holdings))
            attached.version = self._version

    def _vacate(self, transition: Transition, loaded: Loaded) -> bool:
        is_done = True
        for seat in transition.before.seats:
            memory = self._holdings.memories[seat.device]
            wanted = transition.request.kv_handles[seat.device]
            if len(memory.kv) <= wanted:
                continue
            is_done = False
            attached = self._attachments.by_slot.get(seat.slot)  # only a living rank can move its blocks
            if attached is None or not self._is_settled(attached) or self._is_used(memory):
                continue
            gone, memory.kv[:] = memory.kv[wanted:], memory.kv[:wanted]
            self._changed()
            failpoint("hmm.vacate")
            self._supply.give_back([(memory, handle) for handle in gone])
            return True
        if not is_done or self._supply.is_releasing:
            return False
        try:
            if not self._supply.claim_stage(transition, loaded):
                return False
        except ElasticMoEError as error:
            self._fail(error)
            return True
        self._enter("copying")
        self._supply.start(transition.request.bytes_per_s_max, loaded, self._on_copied)
        return False

    def _on_copied(self, error: ElasticMoEError | None) -> None:
        transition = self._holdings.transition
        assert transition is not None, "a transfer is a transition's"
        self._holdings.transition = msgspec.structs.replace(transition, bytes_done=self._supply.bytes_done)
        if transition.phase != "copying":
            return  # it was given up: `advance` takes the claims back
        error = error or self._supply.settle()
        if error is not None:
            self._fail(error)
            return
        self._enter("staged")

    def _fail(self, error: ElasticMoEError) -> None:
        self._supply.drop_claims()
        self._enter("failed", refusal(error))

    # ---- Giving memory back

    def _is_used(self, memory: DeviceMemory) -> bool:
        """Whether a thread of this process uses memory that may be given back; none does so for long."""
        return self._holdings.num_readers > 0 or self._copies.is_busy(memory.device.name)

    def _retreat(self, transition: Transition, layout: Layout, kv_handles: Mapping[str, int], end: Phase) -> bool:
        """Keep what `layout` needs and give back the rest; then make the KV that it shall have."""
        if self._supply.is_transferring:
            return False
        if not self._supply.is_claiming:
            self._supply.drop_claims()
        if not self._take_back(transition, layout) or self._supply.is_releasing:
            return False
        if self._growth_error is None and self._grow(transition, kv_handles):
            return False
        slots = set(self._holdings.doorbells) - set(layout.slots)
        self._enter(end, refusal(self._growth_error) if self._growth_error is not None else None)
        self._holdings.close_slots(slots)
        return True

    def _take_back(self, transition: Transition, layout: Layout) -> bool:
        """Give back what `layout` does not need, once no rank uses it. Returns whether no device held any of that."""
        is_done = True
        gone: list[tuple[DeviceMemory, Handle | HostShared]] = []
        seats = sorted({*transition.before.seats, *transition.after.seats}, key=attrgetter("slot"))
        for seat in seats:
            memory = self._holdings.memories[seat.device]
            keys = keys_of((layout,), seat.device)
            extra = [key for key in memory.records if key not in keys]
            if not extra and (keys or not (memory.kv or memory.ledger or memory.mailbox)):
                continue
            is_done = False
            # All ranks map a mailbox, also while not attached. A leader has KV of all its replica's ranks copied.
            others = seats if memory.mailbox else [one for one in seats if one.rank.replica == seat.rank.replica]
            holders = (seat,) if keys else others
            if not all(self._is_let_go(one.slot, one in layout.seats) for one in holders) or self._is_used(memory):
                continue
            taken = [memory.records.pop(key) for key in extra] if keys else memory.take_all()
            gone += [(memory, one) for one in taken]
        if gone:
            failpoint("hmm.give_back.before")
            self._changed()
            failpoint("hmm.give_back.after")
            self._supply.give_back(gone)
        return is_done

    def _is_let_go(self, slot: int, stays: bool) -> bool:
        """Whether the rank in `slot` has unmapped what it shall not have, or has ended. `stays`: its seat stays."""
        attached = self._attachments.by_slot.get(slot)
        if attached is not None:
            return stays and self._is_settled(attached)
        now = self._clock.monotonic()
        if slot in self._unseen:
            # In a seat that stays, a rank resumes or a new one comes; one that left may have ended before this start.
            return not stays and now > self._resume_until
        # This HMM has seen the connection end. Where the seat stays, the rank may have failed in a step and resume.
        return not stays or slot not in self._ended_at or now - self._ended_at[slot] > _RESUME_S

    def _grow(self, transition: Transition, kv_handles: Mapping[str, int]) -> bool:
        """Start to make the KV handles that are missing; whether there are any."""
        loaded = self._holdings.loaded
        assert loaded is not None, "a transition is of a loaded model"
        memories = self._holdings.memories
        missing = [(memories[name], count - len(memories[name].kv)) for name, count in sorted(kv_handles.items())]
        missing = [(memory, count) for memory, count in missing if count > 0]
        try:
            is_claimed = self._supply.claim_kv(missing, loaded)
        except ElasticMoEError as error:
            self._on_grown(error)
            return False
        if missing and is_claimed:
            self._supply.start(transition.request.bytes_per_s_max, loaded, self._on_grown)
        return bool(missing)

    def _on_grown(self, error: ElasticMoEError | None) -> None:
        error = error or self._supply.settle()
        if error is not None:  # the deployment goes on with less KV
            self._growth_error = error
            self._log.warning("KV did not grow", code=error.code, reason=error.message)
            self._supply.drop_claims()
            return
        failpoint("hmm.kv_grown.before")
        self._changed()
        failpoint("hmm.kv_grown.after")
